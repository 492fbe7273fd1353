"""Loops over blocks, and what they start from inside a `jax.shard_map`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
