"""The linear layer that makes the logits, and a block of them at a time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._reductions.tangents import unless_zero
from xent_jax._targets.teacher import Target


class Layer(NamedTuple):
    """What makes the logits, softcap·tanh((hidden @ kernel + bias) / softcap).

    `None` stands for an option that is not used. Rows are of the accumulation dtype.
    """

    kernel: jax.Array  # [D, V], in the caller's dtype
    bias: jax.Array | None  # [1, V]
    softcap: jax.Array | None  # []
    class_mask: jax.Array | None  # bool[1, V]
    class_weights: jax.Array | None  # [1, V]
    teacher: "Layer | None" = None  # what makes the logits that these are compared with


class TeacherRows(NamedTuple):
    """What a teacher makes its logits of."""

    hidden: jax.Array  # [N, D], of another D
    pivot: Any = None  # of the kind of target, [N, 1]


class Rows(NamedTuple):
    """What is known of N rows."""

    hidden: jax.Array  # [N, D]
    target: Any  # `Labels` or `TeacherRows`
    keep: jax.Array | None  # bool[N, 1]
    temperature: jax.Array | None = None  # [N, 1], divides the logits


def kept_hidden(rows: Rows) -> jax.Array:
    """Returns the rows' features, 0 in a dropped row, whatever it holds."""
    if rows.keep is None:
        return rows.hidden
    return jnp.where(rows.keep, rows.hidden, 0)


def product(
    left: jax.Array, right: jax.Array, contracted: tuple[int, int] = (1, 0)
) -> jax.Array:
    """Returns a product of matrices, accumulated and left in the accumulation dtype.

    Args:
      left: a matrix.
      right: a matrix of the same dtype.
      contracted: the axis of each that is summed over.
    """
    axes = (contracted[:1], contracted[1:])
    return jax.lax.dot_general(
        left,
        right,
        (axes, ((), ())),
        preferred_element_type=accumulation_dtype(left.dtype),
    )


def logits_of(
    linear: jax.Array, bias: Any, softcap: Any, temperature: Any
) -> jax.Array:
    """Returns the logits that a product with the kernel becomes."""
    if bias is not None:
        linear = linear + bias
    if softcap is not None:
        linear = _softcapped(linear, softcap)
    return linear if temperature is None else quotient(linear, temperature)


def target_of(rows: Rows, layer: Layer) -> Any:
    """Returns what the logits of rows and a layer, or a part of it, go with."""
    teacher = layer.teacher
    if teacher is None:
        return rows.target
    hidden = rows.target.hidden
    if rows.keep is not None:
        hidden = jnp.where(rows.keep, hidden, 0)
    linear = product(hidden, teacher.kernel.astype(hidden.dtype))
    linear = linear.astype(accumulation_dtype(rows.hidden.dtype))
    logits = logits_of(linear, teacher.bias, teacher.softcap, rows.temperature)
    return Target(logits, rows.target.pivot)


@jax.custom_jvp
def _softcapped(logits: jax.Array, softcap: jax.Array) -> jax.Array:
    """Returns softcap·tanh(logits / softcap), for every positive normal softcap.

    A logit far below the softcap is left alone: the quotient of a small number and a
    large one would underflow.
    """
    ratio = _ratio(logits, softcap)
    # tanh(r) = r·(1 − r²/3 + …)
    alone = jnp.square(ratio) < jnp.finfo(ratio.dtype).eps / 4
    return jnp.where(alone, logits, softcap * jnp.tanh(ratio))


@functools.partial(_softcapped.defjvp, symbolic_zeros=True)
def _softcapped_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    # In closed form: the chain rule goes by way of 1 / softcap, which underflows for a
    # large one, and of logits / softcap², which overflows for a small one.
    # The slope is made of the result, which is kept anyway.
    value = _softcapped(*primals)
    slope = 1 - jnp.square(quotient(value, primals[1]))
    logits_dot, softcap_dot = map(unless_zero, tangents)
    change = jnp.zeros_like(value)
    if logits_dot is not None:
        change += slope * logits_dot
    if softcap_dot is not None:
        change += _slope_by_softcap(_ratio(*primals), slope) * softcap_dot
    return value, change


def _slope_by_softcap(ratio: jax.Array, slope: jax.Array) -> jax.Array:
    """Returns tanh(r) − r·slope, by its series where the two terms cancel."""
    small = jnp.abs(ratio) < jnp.finfo(ratio.dtype).eps ** (1 / 8)
    near = jnp.where(small, ratio, 0)
    square = jnp.square(near)
    series = near * square * (2 / 3 - square * (8 / 15 - square * (34 / 105)))
    return jnp.where(small, series, jnp.tanh(ratio) - ratio * slope)


def _ratio(logits: jax.Array, softcap: jax.Array) -> jax.Array:
    """Returns logits / softcap, a constant ±20 from where tanh is ±1 in every dtype."""
    high = jnp.abs(logits) >= 20 * jnp.abs(softcap)
    ratio = quotient(jnp.where(high, 0, logits), softcap)
    return jnp.where(high, 20 * jnp.sign(logits), ratio)


@jax.custom_jvp
def quotient(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns left / right, whose derivatives never take the square of `right`."""
    return left / right


@quotient.defjvp
def quotient_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    value, right = quotient(*primals), primals[1]
    left_dot, right_dot = tangents
    return value, quotient(left_dot - value * right_dot, right)


def class_total(layer: Layer, dtype: jnp.dtype, class_axis: ClassAxis) -> jax.Array:
    """Returns the sum of the kept classes' weights, or their number, [1, 1]."""
    weights, classes = layer.class_weights, layer.kernel.shape[1]
    if weights is None and layer.class_mask is None:
        return jnp.full((1, 1), class_axis.count(classes), dtype)
    if weights is None:
        weights = jnp.ones((1, classes), dtype)
    if layer.class_mask is not None:
        weights = jnp.where(layer.class_mask, weights, 0)
    return class_axis.total(jnp.sum(weights, axis=-1, keepdims=True))
