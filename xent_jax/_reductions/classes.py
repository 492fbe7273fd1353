"""Sums and maxima over the class axis that XLA does well on a CPU, a GPU and a TPU.

What is reduced is an elementwise function of the logits. Everywhere but on a CPU the
plain reduction is one pass over them; there, the sums of slices are written out. Masks,
labels and dtypes are the business of that function.

Every sum on a CPU is a tree. A number goes through at most 5 additions of slices, 5 in
each cut of the lanes (of which there are 3 for a million classes), 15 of the fewer than
16 lanes that are left then, and 3 of groups. In `SPLIT_SUM` what is above `_EDGE`, as
the largest number of a row is, which is 1, is added to smaller numbers in the first of
these only, and joined with their sum at last. No sum of up to a million numbers is off
by more than 38 roundings of what is small in it and 8 of what is large; a test holds
rows that are made to round badly.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xent_jax._reductions.lowering import CPU, Place, by_place
from xent_jax._reductions.vectors import in_vectors

# XLA:CPU vectorises an elementwise fusion, exponentials included, but falls back to
# slow loops, or to a materialised copy of the operand, for a reduction of anything
# but a bare array. The classes are therefore cut into slices: an elementwise tree over
# them is one fusion, whose result has the lanes of one slice. Few classes are a slice
# each; fewer in half precision, of which a vector from one slice is converted at once.
_MOST_SINGLE, _MOST_SINGLE_HALF = 32, 20
# XLA:CPU does not fuse what it would have to compute more than 15 times. Slices of an
# operand that is converted first are fewer; slices of that first result, which is not
# to be computed again for each of them, are more.
_MOST_SLICES = 14
_FEWEST_SLICES_OF_RESULT, _FEWEST_TO_CUT = 16, 64
# Sums of fewer classes are computed anew in less time than they are written and read:
# with the gradient, 4 classes take 10 ms in place of 12, but 5 take 20 in place of 9.
_FEWEST_WRITTEN = 5
# More slices come in groups, one after the other, so that the lanes stay in the cache,
# and in memory that the allocator gives out again without clearing it; few groups, as
# each is compiled. Of [2048, 32768], two take nine tenths of the time of four and half
# of the time to compile; in one, five results of a mask and weights take a quarter
# longer than in four.
_MOST_GROUPS, _MOST_BYTES_OF_RESULT, _FEWEST_LANES_OF_GROUP = 8, 8 << 20, 128
_VECTOR = 16  # lanes that do not fill the last vector are computed one by one
_EDGE = 2.0**-6  # a power of two, so that `_split` is exact


class Reduction(NamedTuple):
    """A way to reduce over classes.

    Attributes:
      reduce: like `jnp.sum`, of an array over an axis.
      combine: the same for two arrays.
      reduce_lanes: of arrays over an axis, which is kept, on a CPU.
      together: how many arrays that takes at once.
      neutral: what changes nothing.
      on_tpu: what stands for `reduce` on a TPU, `None` for itself.
      reused: whether several fusions use the result: it is written to memory then, and
        not computed anew for each of them.
    """

    reduce: Callable[..., jax.Array]
    combine: Callable[[jax.Array, jax.Array], jax.Array]
    reduce_lanes: Callable[..., list[jax.Array]]
    together: int
    neutral: float
    on_tpu: Callable[..., jax.Array] | None = None
    reused: bool = False


class _Slices(NamedTuple):
    """Slices of an axis, all of one size; the last may overlap the one before it."""

    axis: int
    starts: tuple[int, ...]
    lanes: int
    overlap: int

    @classmethod
    def of(cls, axis: int, size: int, lanes: int) -> "_Slices":
        """Returns the slices of an axis of `size` numbers."""
        starts = range(0, size, lanes)
        overlap = len(starts) * lanes - size
        return cls(axis, (*starts[:-1], size - lanes), lanes, overlap)

    def groups(self, slices: int) -> "list[_Slices]":
        """Returns the slices in groups of equally many, but for the last."""
        parts = [
            self._replace(starts=self.starts[start : start + slices], overlap=0)
            for start in range(0, len(self.starts), slices)
        ]
        return [*parts[:-1], parts[-1]._replace(overlap=self.overlap)]

    def cut(self, array: jax.Array) -> list[jax.Array]:
        """Returns the slices of an array, or copies of one that is to be broadcast."""
        axis, lanes = self.axis, self.lanes
        if array.shape[axis] == 1:
            return [array] * len(self.starts)
        return [
            jax.lax.slice_in_dim(array, start, start + lanes, axis=axis)
            for start in self.starts
        ]

    def combined(
        self,
        combine: Callable[[Any, Any], Any],
        neutral: float,
        *parts: Any,
    ) -> Any:
        """Returns what was made of the slices, combined in a tree, each number once."""
        if self.overlap:
            # A constant: XLA:CPU would split the loop where an iota is compared.
            fresh = np.arange(self.lanes) >= self.overlap
            fresh = np.expand_dims(fresh, tuple(range(1, -self.axis)))
            last = jax.tree.map(lambda part: jnp.where(fresh, part, neutral), parts[-1])
            parts = (*parts[:-1], last)
        return _in_a_tree(combine, *parts)


def _in_a_tree(combine: Callable[[Any, Any], Any], *parts: Any) -> Any:
    """Returns the parts combined, neighbours first: sums are rounded a few times."""
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = (*(combine(*pair) for pair in pairs), *odd)
    return parts[0]


def reduce_classes(
    reduction: Reduction,
    terms: Callable[..., Any],
    operands: tuple[Any, ...],
    axis: int,
) -> Any:
    """Reduces the elementwise `terms(*operands)` over the class axis, which is kept.

    Args:
      reduction: `SUM`, `SPLIT_SUM` or `MAX`.
      terms: an elementwise function of the operands, which returns an array or a pytree
        of arrays of one shape. Where one of several is NaN, all of them may be.
      operands: pytrees of arrays of one rank, of size 1 or V along `axis`.
      axis: the class axis, negative.

    Returns:
      The reductions of all terms, of size 1 along `axis`.
    """

    def plain(reduce: Callable[..., jax.Array], *operands: Any) -> Any:
        reduce = functools.partial(reduce, axis=axis, keepdims=True)
        return jax.tree.map(reduce, terms(*operands))

    def at(place: Place) -> Callable[..., Any] | None:
        if place.chip == CPU:
            # Slices of classes that are sharded would be gathered.
            alone = functools.partial(_reduce_in_slices, reduction, terms, axis)
            if axis == -1 and size <= _most_single(leaves):
                alone = functools.partial(in_vectors, alone)
            return alone if place.whole else None
        on_tpu = None if place.chip is None else reduction.on_tpu
        return None if on_tpu is None else functools.partial(plain, on_tpu)

    default = functools.partial(plain, reduction.reduce)
    leaves = jax.tree.leaves(operands)
    size = next((a.shape[axis] for a in leaves if a.shape[axis] != 1), 1)
    if not isinstance(size, int) or size == 1:  # a symbolic number of classes is no int
        return default(*operands)
    return by_place(default, at)(*operands)


def _most_single(leaves: Sequence[jax.Array]) -> int:
    half = any(array.dtype.itemsize == 2 for array in leaves)
    return _MOST_SINGLE_HALF if half else _MOST_SINGLE


def _slices_of_operands(leaves: Sequence[jax.Array], axis: int) -> list[_Slices]:
    """Returns groups of slices, of a result each."""
    shape = jnp.broadcast_shapes(*(array.shape for array in leaves))
    size = shape[axis]
    if size <= _most_single(leaves):
        return [_Slices.of(axis, size, 1)]
    # Symbolic sizes are not counted.
    numbers = math.prod(count for count in shape if isinstance(count, int))
    groups = min(
        4 * numbers // (_MOST_SLICES * _MOST_BYTES_OF_RESULT),
        size // (_MOST_SLICES * _FEWEST_LANES_OF_GROUP),
        _MOST_GROUPS,
    )
    lanes = -(-size // (_MOST_SLICES * max(groups, 1)))
    lanes = min(-(-lanes // _VECTOR) * _VECTOR, size)
    return _Slices.of(axis, size, lanes).groups(_MOST_SLICES)


def _reduce_in_slices(
    reduction: Reduction, terms: Callable[..., Any], axis: int, *operands: Any
) -> Any:
    # Traced once and called; as sizes and starts are constants, XLA makes slices of it.
    @functools.partial(jax.jit, static_argnums=0)
    def terms_of(lanes: int, start: Any, operands: Any) -> Any:
        def cut(array: jax.Array) -> jax.Array:
            if array.shape[axis] == 1:
                return array
            return jax.lax.dynamic_slice_in_dim(array, start, lanes, axis)

        return terms(*jax.tree.map(cut, operands))

    @jax.jit
    def combined(left: Any, right: Any) -> Any:
        return jax.tree.map(reduction.combine, left, right)

    totals, last = [], None
    for slices in _slices_of_operands(jax.tree.leaves(operands), axis):
        results = [
            terms_of(slices.lanes, np.int32(start), operands) for start in slices.starts
        ]
        result = slices.combined(combined, reduction.neutral, *results)
        parts, names = jax.tree.flatten(result)
        reduced = []
        for start in range(0, len(parts), reduction.together):
            first, *rest = parts[start : start + reduction.together]
            # One after the other, or XLA:CPU keeps the lanes of all in memory at once.
            first = unfused(first, last)
            if slices.lanes > 1:
                reduced += map(unfused, reduction.reduce_lanes(axis, first, *rest))
            elif reduction.reused and len(slices.starts) >= _FEWEST_WRITTEN:
                reduced += [_written(axis, reduction, part) for part in (first, *rest)]
            else:
                reduced += [first, *rest]
            last = reduced[-1]
        totals.append(jax.tree.unflatten(names, reduced))
    return jax.tree.map(functools.partial(_in_a_tree, reduction.combine), *totals)


@jax.jit
def unfused(array: jax.Array, after: jax.Array | None = None) -> jax.Array:
    """Returns the array, which XLA:CPU does not fuse with a reduction that follows.

    It would take parts of the expression into its library routine for reductions, and
    write the other parts to memory, one by one.

    Args:
      array: any.
      after: what has to be computed before. Where it is NaN, so is the result.
    """
    if after is None:
        return jnp.where(array == array, array, -array)
    return jnp.where(after == after, array, after)


def unfused_on_cpu(array: jax.Array) -> jax.Array:
    """Returns the array, as of `unfused`: other platforms would only compute more."""

    def at(place: Place) -> Callable[..., Any] | None:
        return unfused if place.chip == CPU else None

    return by_place(lambda array: array, at)(array)


def _written(axis: int, reduction: Reduction, part: jax.Array) -> jax.Array:
    """Returns the array, of size 1 along the axis, which XLA:CPU writes to memory.

    Its library routine for reductions, which this calls, takes arrays from there.
    """
    neutral = jnp.full_like(part, reduction.neutral)
    pair = unfused(jnp.concatenate([part, neutral], axis))
    return reduction.reduce(pair, axis=axis, keepdims=True)


@jax.jit
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


def _in_lanes(
    axis: int, cut: Callable[[_Slices], list[list[jax.Array]]], size: int
) -> list[jax.Array]:
    """Returns the sums over an axis of `size` numbers, in trees of slices.

    Args:
      axis: negative.
      cut: the slices of one array or more.
      size: of the axis.
    """
    lanes = 1 if size < _FEWEST_TO_CUT else size // _FEWEST_SLICES_OF_RESULT
    shape = _Slices.of(axis, size, lanes)
    sums = [shape.combined(operator.add, 0, *parts) for parts in cut(shape)]
    if lanes == 1:
        return sums
    sums = list(map(unfused, sums))
    if lanes < _FEWEST_SLICES_OF_RESULT:
        return [jnp.sum(part, axis=axis, keepdims=True) for part in sums]
    return [_in_more_lanes(axis, part) for part in sums]


@functools.partial(jax.jit, static_argnums=0)
def _in_more_lanes(axis: int, array: jax.Array) -> jax.Array:
    return _in_lanes(axis, lambda parts: [parts.cut(array)], array.shape[axis])[0]


# The reductions of lanes are functions, traced once and called by every group.
@functools.partial(jax.jit, static_argnums=0)
def _sums_of_lanes(axis: int, *parts: jax.Array) -> list[jax.Array]:
    def cut(slices: _Slices) -> list[list[jax.Array]]:
        if len(parts) == 1:
            return [slices.cut(parts[0])]
        # Two as one complex array, for which XLA:CPU reads the operands once.
        halves = map(_halves, slices.cut(jax.lax.complex(*parts)))
        return list(map(list, zip(*halves, strict=True)))

    return _in_lanes(axis, cut, parts[0].shape[axis])


@jax.jit
def _halves(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.real(pair), jnp.imag(pair)


@functools.partial(jax.jit, static_argnums=0)
def _split_sum_of_lanes(axis: int, part: jax.Array) -> list[jax.Array]:
    def cut(slices: _Slices) -> list[list[jax.Array]]:
        return list(map(list, zip(*map(_split, slices.cut(part)), strict=True)))

    small, large = _in_lanes(axis, cut, part.shape[axis])
    return [small + large]


@functools.partial(jax.jit, static_argnums=0)
def _max_of_lanes(axis: int, part: jax.Array) -> list[jax.Array]:
    return [jnp.max(part, axis=axis, keepdims=True)]


SUM = Reduction(jnp.sum, operator.add, _sums_of_lanes, 2, 0)
MAX = Reduction(jnp.max, jnp.maximum, _max_of_lanes, 1, -math.inf)
# A TPU's exponential is coarser than what the split saves, and adding up is what it is
# slowest at.
SPLIT_SUM = Reduction(
    _split_sum, operator.add, _split_sum_of_lanes, 1, 0, on_tpu=jnp.sum
)


def sum_classes(terms: Callable[..., Any], operands: tuple[Any, ...], axis: int) -> Any:
    """Returns Σ over the classes of `terms(*operands)`, of size 1 along `axis`."""
    return reduce_classes(SUM, terms, operands, axis)


def max_classes(
    term: Callable[..., jax.Array],
    operands: tuple[Any, ...],
    axis: int,
) -> jax.Array:
    """Returns the maximum over the classes of `term(*operands)`.

    On a CPU, XLA may pass over a NaN.
    """
    return reduce_classes(MAX, term, operands, axis)
