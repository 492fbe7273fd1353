"""Where the classes are: on an axis of the arrays, sharded over the mesh or not.

Each shard reduces its own classes; what is left are numbers a row, which one collective
adds up over the shards. Class ids count over all shards, so that comparing with them is
the same everywhere.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


class ClassAxis(NamedTuple):
    """What is static about the classes. Without an `axis_name`, all are here.

    Attributes:
      axis: of the arrays, negative.
      axis_name: the mesh axis, or axes, that `jax.shard_map` shards it over.
    """

    axis: int
    axis_name: AxisName = None

    @property
    def names(self) -> tuple[str, ...]:
        """The mesh axes, one after another."""
        name = self.axis_name
        return (name,) if isinstance(name, str) else name or ()

    def count(self, local: Any) -> Any:
        """Returns the number of classes, of which `local` are here."""
        return local * axis_size(self.axis_name)

    def first(self, local: int) -> jax.Array | int:
        """Returns the id of the first class here, where `local` classes are."""
        if self.axis_name is None:
            return 0
        return jax.lax.axis_index(self.axis_name) * local

    def total(self, sums: Any) -> Any:
        """Returns the sums over the classes here, added up over all shards.

        Args:
          sums: a tree of arrays of one dtype, with a few numbers a row, or just one,
            along the class axis.

        Returns:
          The tree; where there are shards, all arrays have as many rows as the widest.
          One all-reduce: the numbers of a row lie side by side in it.
        """
        leaves, structure = jax.tree.flatten(sums)
        if self.axis_name is None or not leaves:
            return sums
        sizes = [leaf.shape[self.axis] for leaf in leaves]
        # By a sum, which on a mesh of Explicit axes is sharded as the rows are.
        single = [leaf for leaf, size in zip(leaves, sizes, strict=True) if size == 1]
        zero = functools.reduce(jnp.add, map(jnp.zeros_like, single))
        rows = [leaf if leaf.shape == zero.shape else leaf + zero for leaf in leaves]
        packed = jax.lax.psum(jnp.concatenate(rows, self.axis), self.axis_name)
        # Slices: jax 0.7.2 does not transpose a split of which a part is unused.
        parts, start = [], 0
        for size in sizes:
            stop = start + size
            parts.append(jax.lax.slice_in_dim(packed, start, stop, axis=self.axis))
            start = stop
        return structure.unflatten(parts)

    def largest(self, values: jax.Array) -> jax.Array:
        """Returns the maxima over the classes here, over all shards; a constant."""
        values = jax.lax.stop_gradient(values)
        if self.axis_name is None:
            return values
        return jax.lax.pmax(values, self.axis_name)


def psum(values: Any, axis_name: AxisName) -> Any:
    """Returns the sum over the shards, if there are shards."""
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def axis_size(axis_name: AxisName) -> int:
    """Returns the number of shards, 1 without an axis."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    size = 1
    for name in names:
        size *= jax.lax.axis_size(name)
    return size
