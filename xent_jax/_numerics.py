"""The accurate normalisers: what every softmax loss is made of.

Every loss here is a log-normaliser minus a linear term, so its gradient is the mean
parameter minus the target. Written the plain way, `logsumexp(x) − x[y]`, the
difference of two rounded numbers loses every digit once the label wins by more than
the precision of the dtype: the loss and its gradient become exactly 0. The two
functions of this module keep the difference instead of the numbers:

* `label_statistics` (one label a row) leaves the label out of the normaliser. With
  the best rival m = max_{j≠y} x_j as the pivot, R = Σ_{j≠y} exp(x_j − m) and
  w = R·exp(m − x_y), the loss is log1p(w) and the label's gradient −w / (1 + w):
  sums and products of non-negative terms, so errors add up and never amplify.
* `target_statistics` (any targets) leaves one occurrence of the maximum out, which
  needs no arg max: r = Σ_{x<max} exp(x − max) + (number of maxima − 1).

Rows are kept as arrays of size 1 along the class axis, so that nothing here depends on
which axis the classes are on. Masks are handled once, in `masked`.
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


class Masked(NamedTuple):
    """Logits with the classes and rows that count.

    `keep_class` has the logits' shape; `keep_row` has size 1 along the class axis.
    """

    logits: jax.Array
    keep_class: jax.Array | None
    keep_row: jax.Array | None


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which everything is computed: float64 only for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def masked(inputs: Masked) -> jax.Array:
    """Returns the logits to compute with, in the accumulation dtype.

    A dropped class is a class of probability 0, a dropped row a row of zeros: neither
    can put an inf or a NaN into a value or a derivative, whatever it holds.
    """
    logits, keep_class, keep_row = inputs
    values = logits.astype(accumulation_dtype(logits.dtype))
    if keep_class is not None:
        values = jnp.where(keep_class, values, -jnp.inf)
    if keep_row is not None:
        values = jnp.where(keep_row, values, 0)
    return values


def zero_where_dropped(values: jax.Array, inputs: Masked) -> jax.Array:
    """Returns `values`, exactly 0 where the row, or the class, is dropped."""
    if inputs.keep_class is not None and values.shape == inputs.logits.shape:
        values = jnp.where(inputs.keep_class, values, 0)
    if inputs.keep_row is not None:
        values = jnp.where(inputs.keep_row, values, 0)
    return values


def unless_zero(tangent: Any) -> Any:
    """Returns a tangent, or `None` where it is known to be zero."""
    zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return None if zero else tangent


def is_sharded(array: jax.Array) -> bool:
    """Whether an array is known to be sharded: on a mesh of Explicit axes."""
    return any(name is not None for name in jax.typeof(array).sharding.spec)


def class_index(logits: jax.Array, axis: int) -> jax.Array:
    """Returns the class ids along `axis`, of size 1 along every other axis.

    Comparing with it stands in for every gather and scatter: a scatter, or a gather
    from an upcast copy, would cost a second array of the logits' size.
    """
    shape = [1] * logits.ndim
    shape[axis] = logits.shape[axis]
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis % logits.ndim)


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
    return jnp.where(array == array, array, jnp.nan)


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


def two_sum(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and its rounding error (Knuth's TwoSum).

    The error is 0 where the sum is not finite, and a constant to differentiation.
    """
    total = left + right
    virtual = total - left
    error = (left - (total - virtual)) + (right - virtual)
    error = jnp.where(jnp.isfinite(total), error, 0)
    return total, jax.lax.stop_gradient(error)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def label_logits(axis: int, inputs: Masked, labels: jax.Array) -> jax.Array:
    """Returns the logit of each row's label, of size 1 along `axis`.

    A sum over a mask, which shares a pass over the logits with the other reductions,
    except on a CPU, where a gather saves that pass. On a mesh of Explicit axes a gather
    from a sharded array would have to be told the sharding of its result.
    """

    def by_mask(inputs: Masked, labels: jax.Array) -> jax.Array:
        return sum_classes(
            lambda inputs, index, labels: jnp.where(index == labels, masked(inputs), 0),
            (inputs, class_index(inputs.logits, axis), labels),
            axis,
        )

    def by_gather(inputs: Masked, labels: jax.Array) -> jax.Array:
        ids = jnp.maximum(labels, 0)
        # Half-precision bits, because XLA:CPU would convert the whole array first.
        logits, dtype = inputs.logits, inputs.logits.dtype
        if dtype.itemsize == 2:
            logits = jax.lax.bitcast_convert_type(logits, jnp.uint16)
        picked = jnp.take_along_axis(logits, ids, axis)
        if dtype.itemsize == 2:
            picked = jax.lax.bitcast_convert_type(picked, dtype)
        kept = inputs.keep_class
        kept = None if kept is None else jnp.take_along_axis(kept, ids, axis)
        return masked(Masked(picked, kept, inputs.keep_row))

    if is_sharded(inputs.logits):
        return by_mask(inputs, labels)
    return jax.lax.platform_dependent(inputs, labels, cpu=by_gather, default=by_mask)


@label_logits.defjvp
def _label_logits_jvp(
    axis: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    inputs, labels = primals
    values = masked(inputs)
    direction = zero_where_dropped(tangents[0].logits.astype(values.dtype), inputs)
    hit = class_index(values, axis) == labels
    slope = jnp.sum(jnp.where(hit, direction, 0), axis=axis, keepdims=True)
    return label_logits(axis, inputs, labels), slope


class LabelStatistics(NamedTuple):
    """Per row, of size 1 along the class axis.

    The probability of a rival j is exp(x_j − pivot)·rival_scale.
    """

    loss: jax.Array  # log-normaliser − label's logit
    log_normalizer: jax.Array
    largest: jax.Array  # the largest logit
    log_mass: jax.Array  # log-normaliser − largest
    pivot: jax.Array  # the best rival, 0 where there is none
    rival_scale: jax.Array
    rival_mass: jax.Array  # 1 − p_y
    label_mass: jax.Array  # p_y


@functools.partial(jax.jit, static_argnames="axis")
def label_statistics(inputs: Masked, labels: jax.Array, axis: int) -> LabelStatistics:
    """Returns the statistics of rows with one label each, without cancellation.

    Args:
      inputs: the logits and their masks.
      labels: int32 class ids, of size 1 along `axis`; a negative id is an id outside
        the classes and makes the whole row NaN.
      axis: the class axis, negative.
    """
    index = class_index(inputs.logits, axis)
    operands = (inputs, index, labels)
    best_rival = jax.lax.stop_gradient(
        max_classes(
            lambda inputs, index, labels: jnp.where(
                index == labels, -jnp.inf, masked(inputs)
            ),
            operands,
            axis,
        )
    )
    label_logit = label_logits(axis, inputs, labels)
    # +inf − +inf hides in exp(−inf) = 0: what is undefined is made NaN here.
    undefined = (labels < 0) | (label_logit == jnp.inf)
    label_logit = jnp.where(undefined, jnp.nan, label_logit)
    pivot = jnp.where(best_rival == -jnp.inf, 0, best_rival)
    rivals = reduce_classes(
        SPLIT_SUM,
        lambda inputs, index, labels, pivot: jnp.where(
            index == labels, 0, jnp.exp(masked(inputs) - pivot)
        ),
        (*operands, pivot),
        axis,
    )
    # How far the best rival is ahead: the one subtraction, done without error.
    lead, error = two_sum(best_rival, -label_logit)
    wins = lead <= 0
    power = jnp.exp(jnp.where(wins, lead, -lead))
    power = power + power * jnp.where(wins, error, -error)
    odds = jnp.where(wins, rivals * power, rivals)
    total, tail = two_sum(odds, jnp.where(wins, 1, power))
    # log(1 + odds) where the label wins. XLA:CPU's log1p is off by half an ulp for
    # small odds, but by 2.4 ulp near 1, where the logarithm of the rounded sum and its
    # rest are better.
    rare = wins & (odds < 0.1)
    log_mass = jnp.where(
        rare, jnp.log1p(jnp.where(rare, odds, 0)), jnp.log(total) + tail / total
    )
    largest = jnp.where(wins, label_logit, best_rival)
    return LabelStatistics(
        loss=jnp.where(wins, log_mass, lead + (log_mass + error)),
        log_normalizer=largest + log_mass,
        largest=largest,
        log_mass=log_mass,
        pivot=pivot,
        rival_scale=jnp.where(wins, power, 1) / total,
        rival_mass=odds / total,
        label_mass=jnp.where(wins, 1, power) / total,
    )


class TargetStatistics(NamedTuple):
    """Per row, of size 1 along the class axis; T is the sum of the row's targets."""

    loss: jax.Array  # Σ t_j (log-normaliser − x_j)
    log_normalizer: jax.Array
    largest: jax.Array  # the largest logit
    excess: jax.Array  # r: Σ exp(x_j − largest) − 1
    total: jax.Array  # T
    rest: jax.Array  # T without the targets of the largest logits
    unique: jax.Array  # whether one class alone has the largest logit


@functools.partial(jax.jit, static_argnames="axis")
def target_statistics(
    inputs: Masked, targets: jax.Array, axis: int
) -> TargetStatistics:
    """Returns the statistics of rows with a target for every class.

    Args:
      inputs: the logits and their masks.
      targets: of the logits' shape, in the accumulation dtype, 0 where dropped.
      axis: the class axis, negative.
    """
    largest = max_classes(masked, (inputs,), axis)
    operands = (inputs, targets, largest)

    def over(term: Callable[..., jax.Array]) -> jax.Array:
        return sum_classes(
            lambda inputs, *others: term(masked(inputs), *others), operands, axis
        )

    # Two comparisons, not one and its complement, as in `_split`: a NaN, for which
    # both are False, so reaches both sums.
    below = over(lambda x, t, top: jnp.where(x >= top, 0, jnp.exp(x - top)))
    ties = over(lambda x, t, top: jnp.where(x < top, 0, jnp.exp(x - top)))
    rest = over(lambda x, t, top: jnp.where(x >= top, 0, t))
    total = rest + over(lambda x, t, top: jnp.where(x < top, 0, t))
    # 0·inf is never formed: a class without a target adds nothing.
    gap = over(lambda x, t, top: t * jnp.where(t == 0, 0, top - x))
    excess = below + (ties - 1)
    log_mass = jnp.log1p(excess)
    return TargetStatistics(
        loss=gap + total * log_mass,
        log_normalizer=largest + log_mass,
        largest=largest,
        excess=excess,
        total=total,
        rest=rest,
        unique=ties == 1,
    )


def target_gradient(
    values: jax.Array, targets: jax.Array, statistics: TargetStatistics
) -> jax.Array:
    """Returns T·softmax(x) − t, elementwise.

    At the largest logit k it is (Σ_{j≠k} t_j − t_k·r) / (1 + r), which keeps the digits
    that T·p_k − t_k loses when the target sits on a class that wins.
    """
    excess, largest = statistics.excess, statistics.largest
    scale = 1 / (1 + excess)
    plain = statistics.total * (jnp.exp(values - largest) * scale) - targets
    at_top = (statistics.rest - targets * excess) * scale
    return jnp.where((values >= largest) & statistics.unique, at_top, plain)
