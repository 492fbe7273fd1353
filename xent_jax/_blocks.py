"""The blocks of logits that a linear head holds at a time: their size, and loops.

All sizes are static: they follow from shapes alone, so that a program and its memory
are the same on every machine.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_ROW_TILE_BYTES = 64 * 2**20
_CLASS_TILE_BYTES = 32 * 2**20
_MOST_ROWS = 1024
_FEWEST_CLASSES = 1536
_LANES = 128
_SUBLANES = 8


def rows_per_block(rows: int, features: int, classes: int, itemsize: int) -> int:
    """Returns how many rows a block of a scalar reduction has.

    A block of R rows reads the kernel and adds to its gradient once, so it moves about
    12·D·V bytes for 6·R·D·V operations. At 1024 rows an accelerator computes as long as
    it moves; more would cost memory alone. The tile of logits takes half as much as the
    kernel's gradient, then, but not more than 1024 rows do, and 64 MiB at least.

    Args:
      rows: N, which may be symbolic.
      features: D.
      classes: V.
      itemsize: bytes of a logit.
    """
    half = itemsize * features * classes // 2
    budget = max(_ROW_TILE_BYTES, min(half, itemsize * _MOST_ROWS * classes))
    most = _whole(budget // (itemsize * classes))
    return _balanced(rows, most, _SUBLANES) if isinstance(rows, int) else most


def classes_per_block(rows: int, classes: int, itemsize: int) -> int:
    """Returns how many classes a block of a result per row has.

    The tile of logits takes 32 MiB, or has 1536 classes where that is more.

    Args:
      rows: N. A symbolic number counts as many.
      classes: V.
      itemsize: bytes of a logit.
    """
    most = _FEWEST_CLASSES
    if isinstance(rows, int) and rows > 0:
        most = max(most, _whole(_CLASS_TILE_BYTES // (itemsize * rows)))
    return _balanced(classes, most, _LANES)


def _whole(size: int) -> int:
    """Returns `size`, at least 1, rounded down to whole registers if it has any."""
    unit = _LANES if size >= _LANES else _SUBLANES if size >= _SUBLANES else 1
    return max(1, size // unit * unit)


def _balanced(total: int, most: int, unit: int) -> int:
    """Returns the block size for as few blocks of `most` as cover `total`."""
    blocks = max(1, -(-total // most))
    size = -(-total // blocks)
    return max(1, min(-(-size // unit) * unit, most, total))


def loop(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, blocks: Any
) -> tuple[Any, Any]:
    """Like `jax.lax.scan`, for what is not differentiated.

    To differentiate a scan, JAX takes all that does not change from step to step out
    of it, constants of the size of a tile among them, which then are held in memory.
    """
    count = jax.tree.leaves(blocks)[0].shape[0]
    if isinstance(count, int) and count == 0:
        return jax.lax.scan(step, start, blocks)

    def block(index: jax.Array | int) -> Any:
        return jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False),
            blocks,
        )

    def body(state: Any) -> Any:
        index, carry, results = state
        carry, result = step(carry, block(index))
        results = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, 0),
            results,
            result,
        )
        return index + 1, carry, results

    _, shapes = jax.eval_shape(lambda: step(start, block(0)))

    def room(out: jax.ShapeDtypeStruct) -> jax.Array:
        # Sharded like a result, because jax 0.7.2 wants both to name the same mesh. Not
        # `zeros_like(out)`: inside a `shard_map` over some axes of a mesh, a shape that
        # JAX infers names axes that it varies over, but not their mesh, and jax 0.10
        # to 0.12 make no array like that.
        alike = jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=out.sharding)
        zero = jnp.broadcast_to(jnp.zeros_like(alike), (count, *out.shape))
        return varying(zero, out)

    results = jax.tree.map(room, shapes)
    state = jnp.zeros((), jnp.int32), start, results
    state = jax.lax.while_loop(lambda state: state[0] < count, body, state)
    return state[1:]


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, references: Any) -> jax.Array:
    """Returns zeros that vary over every mesh axis that a reference varies over."""
    return varying(jnp.zeros(shape, dtype), references)


def varying(array: jax.Array, references: Any, but: tuple[str, ...] = ()) -> jax.Array:
    """Returns an array that varies over every mesh axis that a reference varies over.

    Inside `jax.shard_map` the carry of a loop has to start as what it becomes, and the
    branches of a condition have to agree. JAX has no name for it that all its versions
    share. A factor of 1 that depends on the device's place does it, for a NaN too: XLA
    drops it, and its transposition is one sum over the axis.

    Args:
      array: any.
      references: a tree of arrays, or of their `jax.ShapeDtypeStruct`.
      but: mesh axes that do not count.
    """
    for name in sorted(mesh_axes(references) - mesh_axes(array) - set(but)):
        one = jnp.ones((), array.dtype)
        one = jnp.where(jax.lax.axis_index(name) >= 0, one, one)
        array = array & one if array.dtype == jnp.bool_ else array * one
    return array


def mesh_axes(arrays: Any) -> frozenset[str]:
    """Returns the mesh axes of `jax.shard_map` that some of the arrays vary over."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(arrays):
        kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        manual = getattr(kind, "manual_axis_type", None)  # `vma` before jax 0.8
        found = getattr(kind, "vma", None) or getattr(manual, "varying", None)
        axes |= frozenset(found or ())
    return axes
