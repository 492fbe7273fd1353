"""Numbers a row, in loops that XLA vectorizes on a CPU.

XLA:CPU gives every thread an equal share of the outermost axis. Where the last share is
smaller, the loop asks for each number whether it exists, and an exponential or a
logarithm after that question is not vectorized: on two cores 1398101 rows of 3 classes
took six times as long as 1398100. Rows are therefore put on two axes: the outer one is
shared, and the loop over the inner one asks nothing. Those of images and sequences are
on two axes already, and XLA:CPU does not fuse over a change of shape: 8 × 160 × 160
pixels of 21 classes would take 1.6 times as long, of 3 with the gradient 4 times.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The inner axis is long beside a vector, and the outer one beside the threads. To have
# fewer rows in vectors would save less than a tenth of a millisecond.
_FEWEST_INNER, _MOST_INNER, _FEWEST_OUTER = 64, 1024, 64


def in_vectors(function: Callable[..., Any], *operands: Any) -> Any:
    """Returns `function(*operands)`, of rows on two axes.

    Where the number of rows has no divisor that suits, the last few are apart.

    Args:
      function: elementwise but for the last axis; of pytrees of arrays of one rank, to
        a pytree of such arrays, each of the shape of the rows but for the last axis.
      *operands: of the shape of the rows, or one that broadcasts to it, but for the
        last axis.
    """
    leaves, structure = jax.tree.flatten(operands)
    shape = jnp.broadcast_shapes(*(leaf.shape[:-1] for leaf in leaves))
    # A symbolic number of rows is no int.
    rows = math.prod(shape) if all(isinstance(size, int) for size in shape) else 0
    if rows < _FEWEST_INNER * _FEWEST_OUTER or _FEWEST_INNER <= shape[-1] < rows:
        return function(*operands)
    sizes = range(min(_MOST_INNER, rows // _FEWEST_OUTER), _FEWEST_INNER - 1, -1)
    inner = next((size for size in sizes if rows % size == 0), _FEWEST_INNER)

    whole = rows - rows % inner

    def part(leaf: jax.Array, start: int, stop: int, inner: int) -> jax.Array:
        numbers = leaf.shape[-1]
        if leaf.size == numbers:
            return leaf.reshape(1, 1, numbers)
        leaf = jnp.broadcast_to(leaf, (*shape, numbers)).reshape(rows, numbers)
        return leaf[start:stop].reshape(-1, inner, numbers)

    def results(start: int, stop: int, inner: int) -> Any:
        parts = [part(leaf, start, stop, inner) for leaf in leaves]
        found = function(*jax.tree.unflatten(structure, parts))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), found)

    found = [results(0, whole, inner)]
    if whole < rows:
        found.append(results(whole, rows, rows - whole))

    def joined(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate(parts).reshape(*shape, parts[0].shape[-1])

    return jax.tree.map(joined, *found)
