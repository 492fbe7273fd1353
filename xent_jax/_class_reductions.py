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
# but a bare array. Classes are therefore folded: an elementwise tree over a few slices
# of them, of many lanes each, is one fusion. With fewer lanes XLA:CPU would fuse the
# reduction of the lanes as well, and vectorise nothing.
_FOLDS = (8, 12, 10, 9, 7, 6, 5, 4)
_FEWEST_LANES = 48
# Slices are cut within groups of classes, so that classes that are sharded over 2, 4 or
# 8 devices stay where they are.
_GROUPS = 8
# From here on an odd number of classes is folded whatever its divisors are.
_MANY = 1024


_EDGE = 2.0**-6  # a power of two, so that `_split` is exact


class Folding(NamedTuple):
    """How classes are folded: as (groups, folds, lanes), or into overlapping slices."""

    groups: int
    folds: int
    lanes: int


def _folding(size: int) -> Folding | None:
    """Returns how `size` classes are folded, `None` where they are not."""
    groups = math.gcd(size, _GROUPS)
    for folds in _FOLDS:
        lanes, rest = divmod(size, groups * folds)
        if rest == 0 and lanes >= _FEWEST_LANES:
            return Folding(groups, folds, lanes)
    if groups > 1 or size < _MANY:
        return None
    return Folding(1, _FOLDS[0], -(-size // _FOLDS[0]))


class Reduction(NamedTuple):
    """A way to reduce over classes.

    Attributes:
      reduce: like `jnp.sum`, of an array over an axis.
      combine: the same for two arrays.
      reduce_folded: of an array over its last two axes, (groups, lanes).
      neutral: what changes nothing.
    """

    reduce: Callable[..., jax.Array]
    combine: Callable[[jax.Array, jax.Array], jax.Array]
    reduce_folded: Callable[[jax.Array], jax.Array]
    neutral: float


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

    leaves = jax.tree.leaves(operands)
    size = next((a.shape[axis] for a in leaves if a.shape[axis] != 1), 1)
    # A symbolic number of classes is no int. An axis of an Explicit mesh can be split
    # only where every shard can.
    if axis != -1 or not isinstance(size, int) or any(map(is_sharded, leaves)):
        return plain(*operands)
    folding = _folding(size)
    if folding is None:
        return plain(*operands)
    folded = functools.partial(_reduce_folded, reduction, term, folding)
    return jax.lax.platform_dependent(*operands, cpu=folded, default=plain)


def _reduce_folded(
    reduction: Reduction,
    term: Callable[..., jax.Array],
    folding: Folding,
    *operands: Any,
) -> jax.Array:
    leaves, structure = jax.tree.flatten(operands)
    slices = zip(*(_slices(array, folding) for array in leaves), strict=True)
    parts = [term(*jax.tree.unflatten(structure, leaves)) for leaves in slices]
    size = max(array.shape[-1] for array in leaves)
    counted = folding.folds * folding.lanes - size
    if counted:
        # The last slice overlaps the one before it.
        fresh = jnp.arange(folding.lanes) >= counted
        parts[-1] = jnp.where(fresh, parts[-1], reduction.neutral)
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [reduction.combine(*pair) for pair in pairs] + odd
    return reduction.reduce_folded(_apart(parts[0]))[..., None]


def _slices(array: jax.Array, folding: Folding) -> list[jax.Array]:
    """Returns the slices of an array of V classes, or of 1: (..., groups, lanes)."""
    groups, folds, lanes = folding
    size = array.shape[-1]
    if size == 1:
        return [array[..., None]] * folds
    if array.dtype.itemsize == 2:
        # XLA:CPU would write slices of 16 bits that two reductions share.
        array = array.astype(jnp.float32)
    if size == groups * folds * lanes:
        array = array.reshape(*array.shape[:-1], groups, folds, lanes)
        return [array[..., index, :] for index in range(folds)]
    starts = [min(index * lanes, size - lanes) for index in range(folds)]
    return [array[..., None, start : start + lanes] for start in starts]


def _apart(array: jax.Array) -> jax.Array:
    """Returns the array; XLA:CPU does not fuse what follows with what made it."""
    return jnp.where(array == array, array, -array)


def _split(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two parts of non-negative numbers: up to `_EDGE`, and what is above.

    Both are exact, and continuous: XLA may compute the numbers anew for each of two
    reductions and round them otherwise, so that a number that goes to the one or the
    other could get into both, or into neither. Two comparisons, not one and its
    complement or a minimum, because XLA:GPU would write to memory what two reductions
    share. A NaN is in both.
    """
    small = jnp.where(values > _EDGE, _EDGE, values)
    return small, jnp.where(values < _EDGE, 0, values - _EDGE)


def _split_sum(values: jax.Array, **options: Any) -> jax.Array:
    """Returns the sum of numbers whose largest is about 1, the small parts apart.

    So the 1 is rounded once, and not with every small number that is added to it.
    """
    small, large = _split(values)
    return jnp.sum(small, **options) + jnp.sum(large, **options)


def _split_sum_folded(part: jax.Array) -> jax.Array:
    # As one complex sum, because XLA:CPU would write the exponentials to memory before
    # it fuses them into two.
    pair = jnp.sum(jax.lax.complex(*_split(part)), axis=-1)
    pair = jnp.sum(_apart(pair), axis=-1)
    return jnp.real(pair) + jnp.imag(pair)


_sum_folded = functools.partial(jnp.sum, axis=(-2, -1))
_max_folded = functools.partial(jnp.max, axis=(-2, -1))
SUM = Reduction(jnp.sum, operator.add, _sum_folded, 0)
MAX = Reduction(jnp.max, jnp.maximum, _max_folded, -math.inf)
SPLIT_SUM = Reduction(_split_sum, operator.add, _split_sum_folded, 0)


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
