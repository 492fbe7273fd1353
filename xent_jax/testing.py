"""chex assertions that a loss obeys its gradient law.

The laws are written in NumPy float64 and run on the host, whatever device the loss runs
on, so they share nothing with what they judge: a law is a value and its closed-form
gradient, "mean parameter minus target". `assert_gradient_law` holds a loss to one of
them in your own tests; `assert_law_differentiates` holds a law to finite differences.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import xent_jax
from xent_jax._checking.closed_forms import (
    BINARY_LAW,
    CATEGORICAL_LAW,
    DIVERGENCE_LAW,
    ENTROPY_LAW,
    LINEARIZED_LAW,
    NLL_LAW,
    SIGMOID_LAW,
    SOFTMAX_LAW,
    Array,
    Law,
)

__all__ = [
    "BINARY_LAW",
    "CATEGORICAL_LAW",
    "DIVERGENCE_LAW",
    "ENTROPY_LAW",
    "LINEARIZED_LAW",
    "NLL_LAW",
    "SIGMOID_LAW",
    "SOFTMAX_LAW",
    "Law",
    "assert_gradient_law",
    "assert_law_differentiates",
    "gradient_bound",
    "in_magnitudes",
    "law_of",
]


def law_of(loss: Callable[..., Any]) -> Law:
    """Returns the law of one of the package's losses, jitted or not.

    Raises:
      ValueError: `loss` is not one of them; name its law with `law=` then.
    """
    laws = {
        xent_jax.softmax_cross_entropy: SOFTMAX_LAW,
        xent_jax.softmax_cross_entropy_with_integer_labels: SOFTMAX_LAW,
        xent_jax.softmax_cross_entropy_with_sparse_targets: SOFTMAX_LAW,
        xent_jax.softmax_kl_divergence: DIVERGENCE_LAW,
        xent_jax.linearized_softmax_cross_entropy: LINEARIZED_LAW,
        xent_jax.sigmoid_binary_cross_entropy: SIGMOID_LAW,
        xent_jax.nll_loss: NLL_LAW,
        xent_jax.categorical_cross_entropy: CATEGORICAL_LAW,
        xent_jax.binary_cross_entropy: BINARY_LAW,
    }
    known = {inspect.unwrap(function): law for function, law in laws.items()}.get(
        inspect.unwrap(loss)
    )
    if known is None:
        raise ValueError(
            f"{loss!r} is none of {sorted(known.__name__ for known in laws)}: name the "
            "law that it should obey, e.g. law=xent_jax.testing.SOFTMAX_LAW."
        )
    return known


def gradient_bound(dtype: jnp.dtype) -> float:
    """Returns the bound on a gradient's error, relative to the law's magnitude.

    4 ulp for float32 and float64; 0.52 ulp for narrower dtypes, whose gradient is
    computed in float32 and rounded once.
    """
    ulp = float(jnp.finfo(dtype).eps)
    return (4 if jnp.finfo(dtype).bits >= 32 else 0.52) * ulp


def in_magnitudes(gradient: ArrayLike, magnitude: Array) -> Array:
    """Returns a gradient in units of its law's magnitude, where that is not 0."""
    exact = np.asarray(gradient).astype(np.float64)
    return exact / np.where(magnitude == 0, 1, magnitude)


def assert_gradient_law(
    loss: Callable[..., jax.Array],
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    law: Law | None = None,
    bound: float | None = None,
    device: jax.Device | None = None,
    **options: Any,
) -> None:
    """Asserts that the gradient of a loss is its closed form, on one device.

    The gradient of `loss(logits, labels, **options).sum()` by the logits is compared,
    in reverse mode (eager and jitted) and in forward mode, with the float64 closed form
    of the same logits: `(Σt)·softmax(x) − t`, `σ(x) − t`, with masks, smoothing,
    weights and z-loss if `options` say so.

    Args:
      loss: A function of logits and labels, one loss per example or element.
      logits: `float[...]`.
      labels: Class ids or targets, as `loss` takes them.
      law: The law; that of `loss` if it is one of the package's.
      bound: Largest error allowed, relative to the law's magnitude; `gradient_bound` of
        the logits' dtype unless given.
      device: Where the loss runs; JAX's default device unless given.
      **options: Passed to the loss and to the law.

    Raises:
      AssertionError: The gradient does not obey the law. The numbers shown are in
        units of the law's magnitude.
      ValueError: `law` is missing and `loss` is not one of the package's.

    Examples:
      >>> import jax.numpy as jnp
      >>> import xent_jax
      >>> from xent_jax.testing import assert_gradient_law
      >>> assert_gradient_law(
      ...     xent_jax.softmax_cross_entropy_with_integer_labels,
      ...     jnp.array([[0.0, 25.0, 1.0]]),
      ...     jnp.array([1]),
      ... )
    """
    law = law_of(loss) if law is None else law
    array = jax.device_put(jnp.asarray(logits), device)
    targets = jax.device_put(jnp.asarray(labels), device)

    def total(logits: jax.Array) -> jax.Array:
        return loss(logits, targets, **options).sum()

    # The loss first: its messages about its arguments are better than a law's.
    gradients = {
        "grad": jax.grad(total)(array),
        "jit of grad": jax.jit(jax.grad(total))(array),
    }
    exact = np.asarray(array), np.asarray(targets)
    expected = law.gradient(*exact, **options)
    magnitude = law.magnitude(*exact, **options)
    chex.assert_shape(expected, array.shape)
    units = "in units of the law's magnitude"
    for mode, gradient in gradients.items():
        chex.assert_equal_shape([gradient, array])
        chex.assert_type(gradient, array.dtype)
        chex.assert_trees_all_close(
            in_magnitudes(gradient, magnitude),
            in_magnitudes(expected, magnitude),
            rtol=0,
            atol=gradient_bound(array.dtype) if bound is None else bound,
            custom_message=f"{mode} of {loss}, {units}",
        )
    chex.assert_trees_all_close(
        *forward_mode(
            lambda x: loss(x, targets, **options), array, expected, magnitude
        ),
        rtol=0,
        atol=gradient_bound(jnp.dtype(jnp.float32)) if bound is None else bound,
        custom_message=f"jvp of {loss}, {units}",
    )


def forward_mode(
    loss: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    gradient: Array,
    magnitude: Array,
) -> tuple[Array, Array]:
    """Returns the slopes of a loss and of its law along the signs of the gradient.

    Both in units of the law's magnitude, one an example. Along these signs no term of a
    slope cancels another.
    """
    signs = np.sign(np.nan_to_num(gradient))
    direction = jax.device_put(jnp.asarray(signs, inputs.dtype), inputs.sharding)
    slope = jax.jit(lambda x, d: jax.jvp(loss, (x,), (d,))[1])(inputs, direction)
    size, truth = np.broadcast_to(magnitude, gradient.shape), np.abs(gradient)
    if slope.ndim < truth.ndim:
        classes = [k for k in range(truth.ndim) if magnitude.shape[k] != truth.shape[k]]
        axis = classes[0] if classes else -1
        size, truth = size.sum(axis), truth.sum(axis)
    return in_magnitudes(slope, size), in_magnitudes(truth, size)


def assert_law_differentiates(
    law: Law,
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    step: float = 1e-5,
    tolerance: float = 1e-8,
    **options: Any,
) -> None:
    """Asserts that a law's gradient is the finite difference of its value, in float64.

    Every entry is compared with a fourth-order central difference, on the host.

    Args:
      law: The law.
      logits: `float[...]`, few: the value is computed four times an entry.
      labels: Class ids or targets.
      step: Of the difference.
      tolerance: Largest absolute error allowed.
      **options: Passed to the law.

    Raises:
      AssertionError: The law is not the gradient of its value.

    Examples:
      >>> import numpy as np
      >>> from xent_jax.testing import SOFTMAX_LAW, assert_law_differentiates
      >>> assert_law_differentiates(
      ...     SOFTMAX_LAW, np.array([[0.0, 5.0, 1.0]]), np.array([1])
      ... )
    """
    x = np.asarray(logits).astype(np.float64)

    def value(x: Array) -> float:
        return float(law.value(x, labels, **options).sum())

    difference = np.zeros_like(x)
    for entry in np.ndindex(x.shape):
        near, far = (functools.partial(_moved, x, entry, step * k) for k in (1, 2))
        inner = value(near(1)) - value(near(-1))
        outer = value(far(1)) - value(far(-1))
        difference[entry] = (8 * inner - outer) / (12 * step)
    chex.assert_trees_all_close(
        law.gradient(x, labels, **options), difference, rtol=0, atol=tolerance
    )


def _moved(x: Array, entry: tuple[int, ...], step: float, sign: int) -> Array:
    moved = x.copy()
    moved[entry] += sign * step
    return moved
