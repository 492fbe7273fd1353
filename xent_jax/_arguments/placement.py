"""Where arrays are on a mesh of Explicit axes: companions go to the logits.

There the type of an array says how it is sharded, and JAX refuses to combine arrays
that are sharded differently. So whatever comes with the logits (labels, targets, masks,
weights) is brought to their sharding before anything is computed of it, and results are
sharded as the rows of the logits are. Everywhere else (no mesh, Auto axes, inside a
`jax.shard_map` over all axes) types say nothing, and nothing is done.
"""

import functools
from collections.abc import Sequence

import jax


def beside(
    array: jax.Array, logits: jax.Array, axes: Sequence[int | None] | None = None
) -> jax.Array:
    """Returns an array, sharded as the logits are.

    Args:
      array: what comes with the logits, of a checked shape.
      logits: or what stands for them.
      axes: which axis of the logits each axis of the array goes along; `None` for one
        that is not to be sharded. Without it, the leading ones.
    """
    placed = on_explicit_mesh(logits, array)
    if placed is None:
        return array
    of_logits = jax.typeof(logits).sharding.spec
    axes = range(array.ndim) if axes is None else axes
    spec = jax.P(*(None if axis is None else of_logits[axis] for axis in axes))
    return resharded(array, spec, placed)


def on_explicit_mesh(*arrays: jax.Array) -> jax.Array | None:
    """Returns the first array that is on a mesh with an Explicit axis."""
    for array in arrays:
        types = jax.typeof(array).sharding.mesh.axis_types
        if jax.sharding.AxisType.Explicit in types:
            return array
    return None


def resharded(array: jax.Array, spec: jax.P, placed: jax.Array) -> jax.Array:
    """Returns an array, sharded by `spec` over the mesh that another one is on."""
    mesh = jax.typeof(placed).sharding.mesh
    sharding = jax.sharding.NamedSharding(mesh, spec)
    if jax.typeof(array).sharding == sharding:
        return array
    # It says which devices the mesh is of, also without `jax.set_mesh`.
    return _resharded(sharding, jax.lax.stop_gradient(placed), array)


@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def _resharded(
    sharding: jax.sharding.NamedSharding, placed: jax.Array, array: jax.Array
) -> jax.Array:
    del placed
    return jax.sharding.reshard(array, sharding)
