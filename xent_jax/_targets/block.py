"""A block of logits: what every kind of target looks at.

It may be all logits of a call, the logits that one block of rows or of classes of a
linear head has, or those of a shard. Rows are kept as arrays of size 1 along the class
axis, so that nothing depends on which axis the classes are on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.precision import accumulation_dtype


class Block(NamedTuple):
    """Logits of some rows and some classes, and what counts of them.

    `None` stands for a mask that keeps all, and for weights of 1.
    """

    logits: jax.Array  # of any floating dtype
    class_ids: jax.Array  # int32, of size 1 along the other axes; over all shards
    keep_class: jax.Array | None = None  # bool, broadcasts to the logits
    keep_row: jax.Array | None = None  # bool, of size 1 along the class axis
    class_weights: jax.Array | None = None  # of size 1 along the other axes


def class_ids(logits: jax.Array, axis: int, first: jax.Array | int) -> jax.Array:
    """Returns the ids of the classes of a block, of which the first is `first`.

    Comparing with them stands in for every gather and scatter: a scatter, or a gather
    from an upcast copy, would cost a second array of the logits' size.
    """
    shape = [1] * logits.ndim
    shape[axis] = logits.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis % logits.ndim)
    return index if isinstance(first, int) and first == 0 else index + first


def block_of(
    logits: jax.Array,
    classes: ClassAxis,
    keep_class: jax.Array | None = None,
    keep_row: jax.Array | None = None,
) -> Block:
    """Returns the one block that all logits here are."""
    axis = classes.axis
    ids = class_ids(logits, axis, classes.first(logits.shape[axis]))
    return Block(logits, ids, keep_class, keep_row)


def values_of(block: Block) -> jax.Array:
    """Returns the logits to compute with, in the accumulation dtype.

    A dropped class is a class of probability 0, a dropped row a row of zeros: neither
    can put an inf or a NaN into a value or a derivative, whatever it holds.
    """
    values = block.logits.astype(accumulation_dtype(block.logits.dtype))
    if block.keep_class is not None:
        values = jnp.where(block.keep_class, values, -jnp.inf)
    if block.keep_row is not None:
        values = jnp.where(block.keep_row, values, 0)
    return values


def block_at(axis: int, block: Block, ids: jax.Array) -> Block:
    """Returns the block of one class a row, by its place in the block.

    By a gather, which a CPU does faster than a sum over a mask.
    """

    def picked(array: jax.Array) -> jax.Array:
        whole = jnp.broadcast_to(array, block.logits.shape)
        return jnp.take_along_axis(whole, ids, axis)

    # Half-precision bits, because XLA:CPU would convert the whole array first.
    logits, dtype = block.logits, block.logits.dtype
    if dtype.itemsize == 2:
        bits = jax.lax.bitcast_convert_type(logits, jnp.uint16)
        logits = jax.lax.bitcast_convert_type(picked(bits), dtype)
    else:
        logits = picked(logits)
    keep, weights = block.keep_class, block.class_weights
    return Block(
        logits,
        ids,
        None if keep is None else picked(keep),
        block.keep_row,
        None if weights is None else jnp.reshape(weights, -1)[ids],
    )


def zero_where_dropped(numbers: jax.Array, block: Block) -> jax.Array:
    """Returns numbers a class, exactly 0 where the row, or the class, is dropped."""
    if block.keep_class is not None:
        numbers = jnp.where(block.keep_class, numbers, 0)
    return zero_in_dropped_rows(numbers, block.keep_row)


def zero_in_dropped_rows(numbers: jax.Array, keep_row: jax.Array | None) -> jax.Array:
    """Returns numbers a class or a row, exactly 0 where the row is dropped."""
    return numbers if keep_row is None else jnp.where(keep_row, numbers, 0)
