"""Reductions over the class axis that XLA does well on a CPU, a GPU and a TPU.

What is reduced is an elementwise function of the logits. Everywhere but on a CPU the
plain reduction is one pass over them; there, the sums of partial results are written
out. Masks, labels and dtypes are the business of that function.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# XLA:CPU vectorises an elementwise fusion, exponentials included, but falls back to
# slow loops, or to a materialised copy of the operand, for a reduction of anything
# but a bare array. Many classes are therefore folded into `_FOLDS` slices of `_LANES`
# lanes whose elementwise tree of partial results is one fusion.
_FOLDS = 8
_LANES = 16
_SMALLEST_FOLDED = 2048


class Reduction(NamedTuple):
    """A way to reduce over classes.

    Attributes:
      reduce: like `jnp.sum`, of an array over an axis.
      combine: the same for two arrays.
      reduce_folded: of an array over its last two axes, (blocks, lanes).
    """

    reduce: Callable[..., jax.Array]
    combine: Callable[[jax.Array, jax.Array], jax.Array]
    reduce_folded: Callable[[jax.Array], jax.Array]


def reduce_classes(
    reduction: Reduction,
    term: Callable[..., jax.Array],
    operands: tuple[Any, ...],
    axis: int,
) -> jax.Array:
    """Reduces the elementwise `term(*operands)` over the class axis, which is kept.

    Args:
      reduction: `SUM`, `SPLIT_SUM` or `MAX`.
      term: an elementwise function of the operands.
      operands: pytrees of arrays of one rank, of size 1 or V along `axis`.
      axis: the class axis, negative.

    Returns:
      The reduction, of size 1 along `axis`.
    """

    def plain(*operands: Any) -> jax.Array:
        return reduction.reduce(term(*operands), axis=axis, keepdims=True)

    def folded(*operands: Any) -> jax.Array:
        # One shape for all: (..., blocks, folds, lanes). The slices run over the middle
        # axis, so that a sharded class axis stays where it is.
        def fold(array: jax.Array) -> jax.Array:
            block = (1, 1) if array.shape[-1] == 1 else (_FOLDS, _LANES)
            blocks = array.shape[-1] // math.prod(block)
            return array.reshape(*array.shape[:-1], blocks, *block)

        def piece(array: jax.Array, index: int) -> jax.Array:
            return array[..., index if array.shape[-2] > 1 else 0, :]

        arrays = jax.tree.map(fold, operands)
        parts = [
            term(*jax.tree.map(functools.partial(piece, index=index), arrays))
            for index in range(_FOLDS)
        ]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [reduction.combine(*pair) for pair in pairs]
        return reduction.reduce_folded(_apart(parts[0]))[..., None]

    leaves = jax.tree.leaves(operands)
    size = next((a.shape[axis] for a in leaves if a.shape[axis] != 1), 1)
    # A symbolic number of classes is no int. An axis of an Explicit mesh can be split
    # only where every shard can.
    if axis != -1 or not isinstance(size, int) or any(map(is_sharded, leaves)):
        return plain(*operands)
    if size < _SMALLEST_FOLDED or size % (_FOLDS * _LANES):
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cpu=folded, default=plain)


def _apart(array: jax.Array) -> jax.Array:
    """Returns the array; XLA:CPU does not fuse what follows with what made it."""
    return jnp.where(array == array, array, -array)


def _split(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the numbers below 1 and the others, each with 0 in the others' places.

    The two comparisons are not one and its complement, because XLA:GPU would write a
    mask that two reductions share to memory. A NaN is in both.
    """
    return jnp.where(values >= 1, 0, values), jnp.where(values < 1, 0, values)


def _split_sum(values: jax.Array, **options: Any) -> jax.Array:
    """Returns the sum of numbers whose largest is about 1, the small ones apart.

    So the 1 is rounded once, and not with every small number that is added to it.
    """
    small, large = _split(values)
    return jnp.sum(small, **options) + jnp.sum(large, **options)


def _split_sum_folded(part: jax.Array) -> jax.Array:
    # As one complex sum, because XLA:CPU would write the exponentials to memory before
    # it fuses them into two. In two steps, because it adds complex numbers in a row.
    pair = jnp.sum(jax.lax.complex(*_split(part)), axis=-2)
    pair = jnp.sum(_apart(pair), axis=-1)
    return jnp.real(pair) + jnp.imag(pair)


SUM = Reduction(jnp.sum, operator.add, functools.partial(jnp.sum, axis=(-2, -1)))
MAX = Reduction(jnp.max, jnp.maximum, functools.partial(jnp.max, axis=(-2, -1)))
SPLIT_SUM = Reduction(_split_sum, operator.add, _split_sum_folded)


def sum_classes(
    term: Callable[..., jax.Array], operands: tuple[Any, ...], axis: int
) -> jax.Array:
    """Returns Σ over the classes of `term(*operands)`, of size 1 along `axis`."""
    return reduce_classes(SUM, term, operands, axis)


def max_classes(
    term: Callable[..., jax.Array], operands: tuple[Any, ...], axis: int
) -> jax.Array:
    """Returns the maximum over the classes of `term(*operands)`."""
    return reduce_classes(MAX, term, operands, axis)


def is_sharded(array: jax.Array) -> bool:
    """Whether an array is known to be sharded: on a mesh of Explicit axes."""
    return any(name is not None for name in jax.typeof(array).sharding.spec)
