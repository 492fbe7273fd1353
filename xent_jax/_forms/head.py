"""The linear layer that makes the logits, and a block of them at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._arguments.options import LogitOptions, changed
from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets.teacher import Target


class Layer(NamedTuple):
    """What makes the logits: the product of features and kernel, then the options.

    `None` stands for an option that is not used.
    """

    kernel: jax.Array  # [D, V], in the caller's dtype
    options: LogitOptions  # those that are not one number a row
    class_mask: jax.Array | None  # bool[1, V]
    class_weights: jax.Array | None  # [1, V], in the accumulation dtype
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
    options: LogitOptions = LogitOptions()  # those that are one number a row, [N, 1]


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
    logits = changed(linear, teacher.options, rows.options)
    return Target(logits, rows.target.pivot)


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
