"""Laws of what is made of a loss: heads, statistics, Sinkhorn's loss, means.

Each is a function of its first argument alone; what else it is made of is fixed, in
float64 here and on the device there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from xent_jax._checking.closed_forms import SOFTMAX_LAW, Array, Law


def of_head(law: Law, kernel: Array, **fixed: Any) -> Law:
    """Returns the law of a loss of `hidden @ kernel`, by the features.

    Args:
      law: of the logits.
      kernel: [D, V].
      **fixed: options of the law.
    """

    def of_logits(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda hidden, labels, **options: function(
            _wide(hidden) @ kernel, labels, **fixed, **options
        )

    value, slope, size = map(of_logits, (law.value, law.gradient, law.magnitude))

    def gradient(hidden: Array, labels: Array, **options: Any) -> Array:
        return slope(hidden, labels, **options) @ kernel.T

    def magnitude(hidden: Array, labels: Array, **options: Any) -> Array:
        terms = np.abs(slope(hidden, labels, **options)) @ np.abs(kernel.T)
        largest = size(hidden, labels, **options)
        return terms.max(-1, keepdims=True) + largest * np.abs(kernel).max()

    return Law(value, gradient, magnitude)


def of_kernel(law: Law, hidden: Array) -> Law:
    """Returns the law of such losses of all rows, by the kernel.

    The gradient is that of their sum.
    """

    def of_logits(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda kernel, labels: function(hidden @ _wide(kernel), labels)

    value, slope, size = map(of_logits, (law.value, law.gradient, law.magnitude))

    def gradient(kernel: Array, labels: Array) -> Array:
        return hidden.T @ slope(kernel, labels)

    def magnitude(kernel: Array, labels: Array) -> Array:
        terms = np.abs(hidden.T) @ np.abs(slope(kernel, labels))
        largest = (size(kernel, labels) * np.abs(hidden)).max()
        return terms.max(0, keepdims=True) + largest

    return Law(value, gradient, magnitude)


def of_divergence(law: Law, kernel: Array, teacher: Array) -> Law:
    """Returns the law of a divergence of heads with one kernel, by the features."""
    inner = of_head(law, kernel)
    logits = _wide(teacher) @ kernel

    def fixed(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda hidden, labels: function(hidden, logits[labels])

    return Law(*map(fixed, inner))


def of_sinkhorn(scores: Array, epsilon: float, iterations: int) -> Law:
    """Returns the law of the loss of a Sinkhorn assignment, by the logits.

    The iteration is the written-out one: columns to N/K, then rows to 1.
    """
    exponent = _wide(scores) / epsilon
    targets = np.exp(exponent - exponent.max())
    rows, columns = targets.shape
    for _ in range(iterations):
        targets = targets * (rows / columns / targets.sum(0, keepdims=True))
        targets = targets / targets.sum(1, keepdims=True)

    def fixed(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda logits, labels: function(logits, targets)

    return Law(*map(fixed, SOFTMAX_LAW))


def _mean(values: Array, weights: Array) -> Array:
    return (_wide(values) * weights).sum() / weights.sum()


def _mean_slope(values: Array, weights: Array) -> Array:
    return weights / weights.sum() * np.ones_like(_wide(values))


MEAN_LAW = Law(_mean, _mean_slope, _mean_slope)
"""`weights / Σ weights`, by the values."""


def _wide(array: Any) -> Array:
    return np.asarray(array).astype(np.float64)
