"""Rows in blocks, for a loop that goes over them, and its results as rows again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._forms.head import Rows, kept_hidden
from xent_jax._forms.loops import zeros
from xent_jax._reductions.lowering import is_sharded, one_device


class RowBlock(NamedTuple):
    """The part of the arguments that one step of a loop over rows takes."""

    rows: Rows
    coefficients: Any
    transposed: jax.Array | None  # the features of the rows, [D, N]


def split(rows: Rows, coefficients: Any, size: int, together: bool) -> RowBlock:
    """Returns the rows in blocks; a dropped row is what is missing.

    On several devices a block has every n-th row of n blocks: where rows are sharded
    over a mesh, all shards then have their part in every block, and none is sent
    around. Otherwise, and for blocks that may be left out, as dropped rows lie
    together, a block is of rows that lie together, which takes no copy.

    Args:
      rows: N of them.
      coefficients: a tree of arrays of N rows.
      size: rows a block.
      together: whether the rows of a block lie together in any case.
    """
    rows = rows._replace(hidden=kept_hidden(rows))
    count = rows.hidden.shape[0]
    blocks = -(-count // size)
    missing = blocks * size - count
    whole = isinstance(missing, int) and missing == 0
    if not whole and rows.keep is None:
        rows = rows._replace(keep=jnp.ones((count, 1), jnp.bool_))

    def part(array: jax.Array) -> jax.Array:
        if not whole:
            array = jnp.pad(array, ((0, missing), (0, 0)))
        features = array.shape[-1]
        return _together_or_apart(
            together,
            lambda array: array.reshape(blocks, size, features),
            lambda array: array.reshape(size, blocks, features).swapaxes(0, 1),
            array,
        )

    rows, coefficients = jax.tree.map(part, (rows, coefficients))
    if not whole:
        rows = rows._replace(options=rows.options.where(rows.keep, "n"))
    return RowBlock(rows, coefficients, None)


def joined(blocks: jax.Array, together: bool) -> jax.Array:
    """Returns the rows of all blocks as one axis, in their order before `split`."""
    count, size, features = blocks.shape
    return _together_or_apart(
        together,
        lambda blocks: blocks.reshape(count * size, features),
        lambda blocks: blocks.swapaxes(0, 1).reshape(count * size, features),
        blocks,
    )


def _together_or_apart(
    always: bool, together: Any, apart: Any, array: jax.Array
) -> jax.Array:
    """Returns one of two functions of an array, by where the rows of a block are."""
    if always:
        return together(array)
    if is_sharded(array):
        return apart(array)
    return jax.lax.cond(one_device(), together, apart, array)


def unless_idle(step: Any) -> Any:
    """Returns the step of a scan, left out for a block of dropped rows."""

    def idle(carry: Any, block: RowBlock) -> tuple[Any, Any]:
        _, shapes = jax.eval_shape(lambda: step(carry, block))

        def nothing(out: jax.ShapeDtypeStruct) -> jax.Array:
            # XLA:GPU takes a constant out of the branch, and then copies the kernel's
            # gradient in every step.
            zero = zeros(out.shape, out.dtype, out)
            return jnp.where(jnp.ravel(jnp.asarray(block.rows.keep))[0], zero, zero)

        return carry, jax.tree.map(nothing, shapes)

    def guarded(carry: Any, block: RowBlock) -> tuple[Any, Any]:
        counts = jnp.any(jnp.asarray(block.rows.keep))
        return jax.lax.cond(counts, step, idle, carry, block)

    return guarded
