"""The linear layer that makes the logits, and a block of them at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.precision import accumulation_dtype


class Layer(NamedTuple):
    """logits = softcap·tanh((hidden @ kernel + bias) / softcap), and their classes.

    `None` stands for an option that is not used. Rows are of the accumulation dtype.
    """

    kernel: jax.Array  # [D, V], in the caller's dtype
    bias: jax.Array | None  # [1, V]
    softcap: jax.Array | None  # []
    class_mask: jax.Array | None  # bool[1, V]
    class_weights: jax.Array | None  # [1, V]


class Rows(NamedTuple):
    """What is known of N rows."""

    hidden: jax.Array  # [N, D]
    labels: jax.Array  # int32[N, 1], −1 where not a class
    keep: jax.Array | None  # bool[N, 1]


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


def capped(linear: jax.Array, bias: Any, softcap: Any) -> jax.Array:
    """Returns the logits that a product with the kernel becomes."""
    if bias is not None:
        linear = linear + bias
    if softcap is not None:
        linear = softcap * jnp.tanh(linear / softcap)
    return linear


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
