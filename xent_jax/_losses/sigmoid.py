"""Sigmoid (binary) cross-entropy."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import arrays, checks, placement
from xent_jax._arguments.options import read_number
from xent_jax._reductions.classes import unfused_on_cpu
from xent_jax._reductions.lowering import on_one_device
from xent_jax._reductions.precision import accumulation_dtype, log1p_of_share, scaled
from xent_jax._reductions.tangents import unless_zero

# Up to so many losses are written to memory on a CPU, before they are added up.
_MOST_WRITTEN = 1 << 23


@jax.named_scope("sigmoid_binary_cross_entropy")
def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    """Binary cross-entropy between logits and labels in [0, 1], elementwise, in nats.

        loss = pos_weight·t·log(1 + exp(−logits)) + (1 − t)·log(1 + exp(logits))
        t = (1 − label_smoothing)·labels + label_smoothing / 2

    Use it for yes-or-no questions that are not exclusive: several labels an example.
    Every element costs one `exp` and one `log1p`; both terms are non-negative, so
    confident elements lose no digits. The gradient,
    `(1 − t)·σ(x) − pos_weight·t·σ(−x)`, keeps logits and labels.

    Args:
      logits: `float[...]`. At ±inf, loss and gradient are the limits.
      labels: `[...]`, the shape of `logits`. Integer and boolean labels are taken as
        numbers. The formula is used for numbers outside [0, 1] too.
      where: `bool[...]`, the shape of `logits`. Elements that count; a dropped element
        has loss and gradient exactly 0, whatever it holds. A mask of the examples is
        `jnp.broadcast_to(keep[:, None], logits.shape)`.
      pos_weight: Real numbers of a shape that broadcasts to that of `logits` by NumPy's
        rules: `[]`, `[C]` for the last axis, `[C, 1, 1]` for logits of `[N, C, H, W]`.
        Multiplies the loss of the positive part, as in PyTorch.
      label_smoothing: In [0, 1]. Pulls the labels towards 1/2, as in Keras.

    Returns:
      `float32[...]` (float64 for float64 logits), the shape of `logits`: sum or average
      over the questions of an example as the task asks. Differentiable by every
      floating argument, in every mode and order.

    Raises:
      TypeError: `logits` are not floating, `where` is not boolean, an option is not a
        real number.
      ValueError: A shape differs from what is said here (labels of shape (N, 1) for
        logits of shape (N,) are refused, not broadcast to (N, N)), or
        `label_smoothing` is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import sigmoid_binary_cross_entropy
      >>> jnp.set_printoptions(precision=4)
      >>> logits = jnp.array([2.0, -1.0, 40.0])
      >>> labels = jnp.array([1.0, 0.0, 1.0])
      >>> print(sigmoid_binary_cross_entropy(logits, labels))
      [1.2693e-01 3.1326e-01 4.2484e-18]

    References:
      Bishop, *Pattern Recognition and Machine Learning*, section 4.3.2.
    """
    function = "sigmoid_binary_cross_entropy"
    array = checks.as_array(function, "logits", logits)
    checks.check_floating(function, "logits", array)
    dtype = accumulation_dtype(array.dtype)
    targets = checks.as_real(function, "labels", labels)
    meaning = "that of logits"
    checks.check_shape(function, "labels", targets, array.shape, meaning)
    targets = placement.beside(targets, array).astype(dtype)
    keep = arrays.read_mask(function, where, array.shape, meaning, array)
    if keep is not None:
        targets = jnp.where(keep, targets, 0)
    smoothing = read_number(function, "label_smoothing", label_smoothing, dtype)
    if smoothing is not None:
        targets = (1 - smoothing) * targets + smoothing / 2
    weight = None if pos_weight is None else _read_pos_weight(pos_weight, array)
    return _binary_terms(False, array, targets, weight, keep)


def _read_pos_weight(pos_weight: ArrayLike, logits: jax.Array) -> jax.Array:
    """Returns the weight in the accumulation dtype, of the rank of the logits."""
    function = "sigmoid_binary_cross_entropy"
    weight = checks.as_real(function, "pos_weight", pos_weight)
    pairs = zip(reversed(weight.shape), reversed(logits.shape), strict=False)
    fits = all(size in (1, whole) for size, whole in pairs)
    if weight.ndim > logits.ndim or not fits:
        expected = f"have a shape that broadcasts to {logits.shape} (that of logits)"
        checks.fail(ValueError, function, "pos_weight", expected, weight.shape)
    missing = tuple(range(logits.ndim - weight.ndim))
    weight = jnp.expand_dims(weight, missing)
    axes = [axis if size > 1 else None for axis, size in enumerate(weight.shape)]
    weight = placement.beside(weight, logits, axes)
    return weight.astype(accumulation_dtype(logits.dtype))


class _Parts(NamedTuple):
    """What value and derivatives are made of, elementwise."""

    positive: jax.Array  # the weighted target of the positive class
    negative: jax.Array  # the target of the negative class
    ahead: jax.Array  # whether logits >= 0
    size: jax.Array  # |logits|
    small: jax.Array  # exp(−|logits|)


def _parts(
    logits: jax.Array,
    targets: jax.Array,
    weight: jax.Array | None,
    keep: jax.Array | None,
) -> _Parts:
    values = logits.astype(targets.dtype)
    if keep is not None:
        values, targets = jnp.where(keep, values, 0), jnp.where(keep, targets, 0)
    ahead = values >= 0
    positive = targets if weight is None else weight * targets
    size = _size(values)
    return _Parts(positive, 1 - targets, ahead, size, jnp.exp(-size))


@jax.custom_jvp
def _size(values: jax.Array) -> jax.Array:
    """Returns |values|, whose derivative at 0 is 1: a second derivative there is 1/4.

    That of `jnp.abs` is 0.
    """
    return jnp.abs(values)


_size.defjvps(lambda dot, _, values: jnp.where(values >= 0, dot, -dot))


def _kept(values: jax.Array, keep: jax.Array | None) -> jax.Array:
    return values if keep is None else jnp.where(keep, values, 0)


def _in_routine(differentiated: bool, logits: jax.Array, keep: Any) -> bool:
    """Returns whether losses are to be added up without being written on a CPU.

    Few of them are faster by way of memory. So are those of half precision with their
    gradient: the routine takes float32, into which all is copied.
    """
    if keep is not None or (differentiated and logits.dtype.itemsize == 2):
        return False
    # A symbolic number is no int.
    return isinstance(logits.size, int) and logits.size > _MOST_WRITTEN


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _binary_terms(
    differentiated: bool,
    logits: jax.Array,
    targets: jax.Array,
    weight: jax.Array | None,
    keep: jax.Array | None,
) -> jax.Array:
    if not _in_routine(differentiated, logits, keep):
        return _terms(logits, targets, weight, keep)
    choose = on_one_device(functools.partial(_terms, keep=None), _arithmetic_terms)
    return choose(logits, targets, weight)


def _terms(
    logits: jax.Array, targets: jax.Array, weight: jax.Array | None, keep: Any
) -> jax.Array:
    parts = _parts(logits, targets, weight, keep)
    losing = jnp.where(parts.ahead, parts.negative, parts.positive)
    linear = losing * jnp.where(losing == 0, 0, parts.size)
    log_mass = log1p_of_share(parts.small)
    if weight is not None:  # else they add up to 1
        log_mass = (parts.positive + parts.negative) * log_mass
    return _kept(unfused_on_cpu(log_mass + linear), keep)


def _arithmetic_terms(
    logits: jax.Array, targets: jax.Array, weight: jax.Array | None
) -> jax.Array:
    """Returns the same without a select, and in few operations.

    XLA:CPU then takes the loss as a whole into its library routine for the sum or mean
    that follows, and writes it nowhere. Each operation is a loop there.
    """
    values = logits.astype(targets.dtype)
    positive = targets if weight is None else weight * targets
    negative = 1 - targets
    log_mass = jnp.log1p(jnp.exp(jnp.minimum(values, -values)))
    if weight is not None:
        log_mass = (positive + negative) * log_mass
    nothing = -0.0  # no constant of the gradient's, which would be written for both
    linear = _product(negative, jnp.maximum(values, nothing))
    return log_mass + (linear + _product(positive, jnp.maximum(-values, nothing)))


def _product(factor: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the product with non-negative values, 0 where a factor of 0 meets inf."""
    large = jnp.finfo(values.dtype).max
    # 0 for a factor of 0, and inf for every other.
    cap = jnp.abs(factor * large) * large
    return factor * jnp.minimum(values, cap)


@functools.partial(_binary_terms.defjvp, symbolic_zeros=True)
def _binary_terms_jvp(
    differentiated: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    del differentiated
    dots = [unless_zero(tangent) for tangent in tangents]
    rule = jax.checkpoint(_binary_terms_dot, prevent_cse=False)
    loss, arguments = _binary_terms(True, *primals), (*primals, *dots[:3])
    if not _in_routine(True, primals[0], primals[3]):
        return loss, rule(*arguments)
    # What loss and tangent share, constants too, XLA:CPU would write to memory. In
    # another shape it is not the same to XLA.
    return loss, rule(*jax.tree.map(lambda array: array[None], arguments))[0]


def _binary_terms_dot(
    logits: jax.Array,
    targets: jax.Array,
    weight: jax.Array | None,
    keep: jax.Array | None,
    logits_dot: jax.Array | None,
    targets_dot: jax.Array | None,
    weight_dot: jax.Array | None,
) -> jax.Array:
    """Returns the tangent of the loss, linear in the three directions."""
    parts = _parts(logits, targets, weight, keep)
    log_mass = log1p_of_share(parts.small)
    loss = jnp.zeros_like(parts.small)
    if logits_dot is not None:
        # negative·sigmoid(x) − positive·sigmoid(−x), where the larger sigmoid is 1 less
        # the smaller one.
        loser = parts.small * (1 / (1 + parts.small))
        if weight is not None:
            loser = (parts.positive + parts.negative) * loser
        over = jnp.where(parts.ahead, parts.negative, loser)
        under = jnp.where(parts.ahead, loser, parts.positive)
        gradient = over - under
        loss += _kept(gradient, keep) * _kept(logits_dot.astype(loss.dtype), keep)
    if targets_dot is not None:
        # pos_weight·softplus(−x) − softplus(x); without a weight this is −x.
        signed = jnp.where(parts.ahead, -parts.size, parts.size)
        if weight is not None:
            weighted = scaled(weight, parts.size)
            signed = jnp.where(parts.ahead, -parts.size, weighted)
            signed = signed + (weight - 1) * log_mass
        loss += _kept(signed, keep) * _kept(targets_dot, keep)
    if weight_dot is not None:
        softplus = log_mass + jnp.where(parts.ahead, 0, parts.size)
        share = scaled(targets, softplus)
        loss += _kept(share, keep) * _kept(
            jnp.broadcast_to(weight_dot, loss.shape), keep
        )
    return loss
