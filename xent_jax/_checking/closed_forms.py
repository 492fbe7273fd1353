"""The losses and their gradient laws in NumPy float64, on the host.

They share nothing with what they judge. The complement of a row's largest probability
is summed, not subtracted, so a law is exact to float64 for confident rows too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


class Law(NamedTuple):
    """A loss in float64: its value and its gradient by the first argument.

    All are called as the loss is: `(logits, labels, **options)`. The magnitude is what
    the error of a gradient is relative to, of the gradient's shape or of size 1 along
    the classes: the sum of its absolute terms, row by row at the largest entry, because
    the gradient of a confident row is small as a whole.
    """

    value: Callable[..., Array]
    gradient: Callable[..., Array]
    magnitude: Callable[..., Array]


class _Probabilities(NamedTuple):
    """Rows of probabilities, as given and as the logarithm sees them."""

    targets: Array
    total: Array  # the sum that the row is divided by
    probability: Array
    clipped: Array


class _Rows(NamedTuple):
    """A softmax loss with its classes last, and the targets that its options make."""

    logits: Array
    targets: Array
    keep_class: Array
    keep_row: Array


def _rows(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
    probs: ArrayLike | None = None,
) -> _Rows:
    x = np.moveaxis(np.asarray(logits).astype(np.float64), axis, -1)
    y = np.asarray(labels)
    keep_class = np.ones(x.shape, bool)
    keep_row = np.ones((*x.shape[:-1], 1), bool)
    if where is not None and np.ndim(where) == x.ndim:
        keep_class = np.moveaxis(np.asarray(where, bool), axis, -1)
        keep_row = np.asarray(keep_class.any(-1))[..., None]
    elif where is not None:
        keep_row = np.asarray(where, bool)[..., None]
    if probs is not None:
        targets = np.where(keep_class, _dense(y, probs, keep_row, x.shape[-1]), 0)
    elif y.ndim < x.ndim:
        # The mass of a class id counts on a dropped class too: its loss is +inf.
        ids = np.where(keep_row, y[..., None], 0)
        targets = (np.arange(x.shape[-1]) == ids).astype(np.float64)
        # An id outside the classes makes its row NaN.
        targets = np.where((ids < 0) | (ids >= x.shape[-1]), np.nan, targets)
    else:
        targets = np.where(keep_class, np.moveaxis(y, axis, -1), 0).astype(np.float64)
    count = np.maximum(keep_class.sum(-1, keepdims=True), 1)
    spread = np.where(keep_class, label_smoothing / count, 0)
    targets = (1 - label_smoothing) * targets + spread
    if class_weights is not None:
        targets = targets * np.asarray(class_weights).astype(np.float64)
    x = np.where(keep_row, np.where(keep_class, x, -np.inf), 0)
    return _Rows(x, targets, keep_class, keep_row)


def _dense(ids: Array, probs: ArrayLike, keep_row: Array, classes: int) -> Array:
    """Returns dense targets from K ids a row, NaN where one with mass is no class."""
    ids, mass = np.where(keep_row, ids, 0), np.where(keep_row, probs, 0)
    hit = ids[..., None] == np.arange(classes)
    targets = (hit * mass[..., None].astype(np.float64)).sum(-2)
    outside = ((ids < 0) | (ids >= classes)) & (mass != 0)
    return np.where(outside.any(-1, keepdims=True), np.nan, targets)


class _Softmax(NamedTuple):
    """The softmax of a row, with the complement of its largest probability exact."""

    surprise: Array  # log-normaliser − x
    probability: Array
    top: Array  # one True a row, at a largest logit
    complement: Array  # 1 − the largest probability
    log_normalizer: Array


def _softmax(x: Array) -> _Softmax:
    top = np.arange(x.shape[-1]) == np.argmax(x, axis=-1)[..., None]
    largest = np.max(x, axis=-1, keepdims=True)
    power = np.exp(x - largest)
    excess = np.where(top, 0, power).sum(-1, keepdims=True)
    return _Softmax(
        (largest - x) + np.log1p(excess),
        power / (1 + excess),
        top,
        excess / (1 + excess),
        largest + np.log1p(excess),
    )


def _softmax_value(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    z_loss: float = 0.0,
    **options: Any,
) -> Array:
    rows = _rows(logits, labels, axis, where, **options)
    softmax = _softmax(rows.logits)
    terms = np.where(rows.targets == 0, 0, rows.targets) * np.where(
        rows.targets == 0, 0, softmax.surprise
    )
    value = terms.sum(-1) + z_loss * softmax.log_normalizer[..., 0] ** 2
    return np.where(rows.keep_row[..., 0], value, 0)


def _softmax_terms(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    z_loss: float = 0.0,
    **options: Any,
) -> tuple[Array, Array]:
    """Returns the mean parameter and the target, whose difference is the gradient."""
    rows = _rows(logits, labels, axis, where, **options)
    softmax, targets = _softmax(rows.logits), rows.targets
    rest = np.where(softmax.top, 0, targets).sum(-1, keepdims=True)
    total = targets.sum(-1, keepdims=True)
    # At the top T·p − t is rest·p − t·(1 − p): nothing is subtracted from 1.
    mean = np.where(softmax.top, rest, total) * softmax.probability
    mean = mean + 2 * z_loss * softmax.log_normalizer * softmax.probability
    target = np.where(softmax.top, softmax.complement, 1) * targets
    keep = rows.keep_class & rows.keep_row
    mean, target = np.where(keep, mean, 0), np.where(keep, target, 0)
    return np.moveaxis(mean, -1, axis), np.moveaxis(target, -1, axis)


def _linearized_value(logits: ArrayLike, labels: ArrayLike, axis: int = -1) -> Array:
    mean, target = _softmax_terms(logits, labels, axis)
    return ((mean - target) * np.asarray(logits).astype(np.float64)).sum(axis)


def _pair(
    logits: ArrayLike,
    teacher: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    temperature: float,
    direction: str,
) -> tuple[_Rows, Array, Array, Array]:
    """Returns the student's rows, its probabilities, and log p − log q of both."""
    none = np.zeros(np.shape(logits))  # of targets: only the rows are wanted
    student, other = (
        _rows(np.asarray(one).astype(np.float64) / temperature, none, axis, where)
        for one in (logits, teacher)
    )
    own, reference = _softmax(student.logits), _softmax(other.logits)
    with np.errstate(invalid="ignore"):
        change = reference.surprise - own.surprise
    first = own if direction == "reverse" else reference
    change = np.where(first.probability == 0, 0, change)
    return student, own.probability, reference.probability, change


def _divergence_value(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
) -> Array:
    rows, p, q, change = _pair(logits, labels, axis, where, temperature, direction)
    if direction == "reverse":
        terms = np.where(p == 0, q, p * (np.expm1(-change) + change))
    else:
        terms = np.where(q == 0, p, q * (np.expm1(change) - change))
    return np.where(rows.keep_row[..., 0], terms.sum(-1), 0)


def _divergence_terms(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    rows, p, q, change = _pair(logits, labels, axis, where, temperature, direction)
    mean, target = p, q
    if direction == "reverse":
        mean, target = p * change, p * (p * change).sum(-1, keepdims=True)
    keep = rows.keep_class & rows.keep_row
    mean, target = (np.where(keep, term, 0) / temperature for term in (mean, target))
    return np.moveaxis(mean, -1, axis), np.moveaxis(target, -1, axis)


def _entropy_value(logits: ArrayLike, labels: ArrayLike) -> Array:
    softmax = _softmax(np.asarray(logits).astype(np.float64))
    del labels
    return (softmax.probability * softmax.surprise).sum(-1)


def _entropy_terms(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    softmax = _softmax(np.asarray(logits).astype(np.float64))
    entropy = _entropy_value(logits, labels)[..., None]
    return softmax.probability * softmax.surprise, softmax.probability * entropy


def _binary_targets(labels: ArrayLike, label_smoothing: float) -> Array:
    y = np.asarray(labels).astype(np.float64)
    return (1 - label_smoothing) * y + label_smoothing / 2


def _sigmoid_value(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    label_smoothing: float = 0.0,
) -> Array:
    x = np.asarray(logits).astype(np.float64)
    t = _binary_targets(labels, label_smoothing)
    weight = np.asarray(pos_weight).astype(np.float64)
    value = weight * t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)
    return value if where is None else np.where(np.asarray(where), value, 0)


def _sigmoid_terms(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Array, Array]:
    x = np.asarray(logits).astype(np.float64)
    t = _binary_targets(labels, label_smoothing)
    weight = np.asarray(pos_weight).astype(np.float64)
    # σ(x) = exp(−log(1 + exp(−x))), without overflow on either side.
    mean = (1 - t) * np.exp(-np.logaddexp(0, -x))
    target = weight * t * np.exp(-np.logaddexp(0, x))
    keep = True if where is None else np.asarray(where, bool)
    return np.where(keep, mean, 0), np.where(keep, target, 0)


def _nll_value(
    log_probs: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    **options: Any,
) -> Array:
    rows = _rows(log_probs, labels, axis, where, **options)
    present = rows.targets != 0
    terms = np.where(present, -rows.targets, 0) * np.where(present, rows.logits, 0)
    return np.where(rows.keep_row[..., 0], terms.sum(-1), 0)


def _nll_terms(
    log_probs: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    rows = _rows(log_probs, labels, axis, where, **options)
    target = np.where(rows.keep_class & rows.keep_row, rows.targets, 0)
    target = np.moveaxis(target, -1, axis)
    return np.zeros_like(target), target


def _normalized(probs: ArrayLike, labels: ArrayLike, epsilon: float) -> _Probabilities:
    p = np.asarray(probs).astype(np.float64)
    total = p.sum(-1, keepdims=True)
    return _Probabilities(
        np.asarray(labels).astype(np.float64),
        total,
        p / total,
        np.clip(p / total, epsilon, 1 - epsilon),
    )


def _categorical_value(
    probs: ArrayLike, labels: ArrayLike, epsilon: float = 1e-7
) -> Array:
    row = _normalized(probs, labels, epsilon)
    return -(row.targets * np.log(row.clipped)).sum(-1)


def _categorical_terms(
    probs: ArrayLike, labels: ArrayLike, epsilon: float = 1e-7
) -> tuple[Array, Array]:
    row = _normalized(probs, labels, epsilon)
    slope = row.targets / row.clipped
    mean = (row.probability * slope).sum(-1, keepdims=True)
    return mean / row.total, slope / row.total


def _binary_value(probs: ArrayLike, labels: ArrayLike, epsilon: float = 1e-7) -> Array:
    p = np.clip(np.asarray(probs).astype(np.float64), epsilon, 1 - epsilon)
    y = np.asarray(labels).astype(np.float64)
    return -y * np.log(p) - (1 - y) * np.log1p(-p)


def _binary_terms(
    probs: ArrayLike, labels: ArrayLike, epsilon: float = 1e-7
) -> tuple[Array, Array]:
    p = np.clip(np.asarray(probs).astype(np.float64), epsilon, 1 - epsilon)
    y = np.asarray(labels).astype(np.float64)
    return (1 - y) / (1 - p), y / p


def _law(
    value: Callable[..., Array],
    terms: Callable[..., tuple[Array, Array]],
    *,
    elementwise: bool = False,
) -> Law:
    """Makes a law of a value and of the two terms whose difference is its gradient."""

    def gradient(*arguments: Any, **options: Any) -> Array:
        mean, target = terms(*arguments, **options)
        return mean - target

    def magnitude(*arguments: Any, **options: Any) -> Array:
        mean, target = terms(*arguments, **options)
        size = np.abs(mean) + np.abs(target)
        return size if elementwise else size.max(options.get("axis", -1), keepdims=True)

    return Law(value, gradient, magnitude)


SOFTMAX_LAW = _law(_softmax_value, _softmax_terms)
"""`(Σt)·softmax(x) − t`, for class ids, dense and sparse targets, with every option.

Sparse targets are class ids with `probs=`.
"""

DIVERGENCE_LAW = _law(_divergence_value, _divergence_terms)
"""`(p − q) / temperature`, reverse `p·(log p − log q − loss) / temperature`."""

ENTROPY_LAW = _law(_entropy_value, _entropy_terms)
"""`p·(−log p − H)`, of the entropy H of the softmax."""

SIGMOID_LAW = _law(_sigmoid_value, _sigmoid_terms, elementwise=True)
"""`(1 − t)·σ(x) − pos_weight·t·σ(−x)`, elementwise."""

LINEARIZED_LAW = _law(_linearized_value, _softmax_terms)
"""The surrogate's value, with the gradient of the softmax law."""

NLL_LAW = _law(_nll_value, _nll_terms)
"""`−w·e_y`, by the log-probabilities."""

CATEGORICAL_LAW = _law(_categorical_value, _categorical_terms)
"""`(s − Σ q·s) / Σp` with `q = p / Σp`, `s = −t / clip(q)`, by the probabilities."""

BINARY_LAW = _law(_binary_value, _binary_terms, elementwise=True)
"""`(1 − t) / (1 − p) − t / p` at the clipped probability, elementwise."""
