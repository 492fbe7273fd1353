"""The accurate normalisers: what every softmax loss is made of.

Every loss here is a log-normaliser minus a linear term, so its gradient is the mean
parameter minus the target. Written the plain way, `logsumexp(x) − x[y]`, the
difference of two rounded numbers loses every digit once the label wins by more than
the precision of the dtype: the loss and its gradient become exactly 0. The two
functions of this module keep the difference instead of the numbers:

* `settled` (one label a row) leaves the label out of the normaliser. With
  the best rival m = max_{j≠y} x_j as the pivot, R = Σ_{j≠y} exp(x_j − m) and
  w = R·exp(m − x_y), the loss is log1p(w) and the label's gradient −w / (1 + w):
  sums and products of non-negative terms, so errors add up and never amplify.
* `target_statistics` (any targets) leaves one occurrence of the maximum out, which
  needs no arg max: r = Σ_{x<max} exp(x − max) + (number of maxima − 1).

Rows are kept as arrays of size 1 along the class axis, so that nothing here depends on
which axis the classes are on. Masks are handled once, in `masked`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._class_axis import ClassAxis
from xent_jax._class_reductions import (
    Reduction,
    is_sharded,
    max_classes,
    reduce_classes,
    sum_classes,
)


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
    """Returns numbers a class, exactly 0 where the row, or the class, is dropped."""
    if inputs.keep_class is not None:
        values = jnp.where(inputs.keep_class, values, 0)
    return zero_in_dropped_rows(values, inputs)


def zero_in_dropped_rows(values: jax.Array, inputs: Masked) -> jax.Array:
    """Returns numbers a class or a row, exactly 0 where the row is dropped."""
    return values if inputs.keep_row is None else jnp.where(inputs.keep_row, values, 0)


def scaled(factor: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `factor·values`, 0 where a factor of 0 meets an infinite value.

    A finite value keeps its derivative by a factor of 0.
    """
    absent = (factor == 0) & jnp.isinf(values)
    return factor * jnp.where(absent, 0, values)


def nan_where(bad: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the values, NaN where they are bad: no NaN is made for any other.

    A constant NaN beside them would raise under `jax_debug_nans` on data that are good.
    """
    return jnp.where(bad, jnp.sqrt(-bad.astype(values.dtype)), values)


def unless_zero(tangent: Any) -> Any:
    """Returns a tangent, or `None` where it is known to be zero."""
    zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return None if zero else tangent


def known_tangents(tangents: Any) -> Any:
    """Returns a tree of tangents, `None` for those that are known to be zero."""
    zero = jax.custom_derivatives.SymbolicZero
    return jax.tree.map(
        unless_zero, tangents, is_leaf=lambda leaf: isinstance(leaf, zero)
    )


def tangent_of(
    function: Callable[..., Any], primals: Any, tangents: Any
) -> tuple[Any, Any]:
    """Returns `jax.jvp` of a function, `None` standing for an argument or no tangent.

    What has no tangent is a constant, so that nothing is computed for it.
    """
    values, structure = jax.tree.flatten(primals, is_leaf=lambda leaf: leaf is None)
    dots = structure.flatten_up_to(tangents)
    places = [place for place, dot in enumerate(dots) if dot is not None]

    def of_moving(*moving: jax.Array) -> Any:
        leaves = list(values)
        for place, value in zip(places, moving, strict=True):
            leaves[place] = value
        return function(*jax.tree.unflatten(structure, leaves))

    return jax.jvp(
        of_moving,
        tuple(values[place] for place in places),
        tuple(dots[place] for place in places),
    )


def class_index(logits: jax.Array, classes: ClassAxis) -> jax.Array:
    """Returns the ids of the classes here, of size 1 along every other axis.

    Comparing with it stands in for every gather and scatter: a scatter, or a gather
    from an upcast copy, would cost a second array of the logits' size.
    """
    axis = classes.axis
    shape = [1] * logits.ndim
    shape[axis] = logits.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis % logits.ndim)
    if classes.axis_name is None:
        return index
    return index + classes.first(logits.shape[axis])


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
def label_logits(classes: ClassAxis, inputs: Masked, labels: jax.Array) -> jax.Array:
    """Returns the logit of each row's label, 0 where the label is on another shard.

    A sum over a mask, which shares a pass over the logits with the other reductions,
    except on a CPU, where a gather saves that pass. On a mesh of Explicit axes a gather
    from a sharded array would have to be told the sharding of its result.
    """
    axis = classes.axis

    def by_mask(inputs: Masked, labels: jax.Array) -> jax.Array:
        return sum_classes(
            lambda inputs, index, labels: jnp.where(index == labels, masked(inputs), 0),
            (inputs, class_index(inputs.logits, classes), labels),
            axis,
        )

    def by_gather(inputs: Masked, labels: jax.Array) -> jax.Array:
        last = inputs.logits.shape[axis] - 1
        here = labels - classes.first(last + 1)
        ids = jnp.maximum(here, 0)
        if classes.axis_name is not None:
            ids = jnp.minimum(ids, last)
        # Half-precision bits, because XLA:CPU would convert the whole array first.
        logits, dtype = inputs.logits, inputs.logits.dtype
        if dtype.itemsize == 2:
            logits = jax.lax.bitcast_convert_type(logits, jnp.uint16)
        picked = jnp.take_along_axis(logits, ids, axis)
        if dtype.itemsize == 2:
            picked = jax.lax.bitcast_convert_type(picked, dtype)
        kept = inputs.keep_class
        kept = None if kept is None else jnp.take_along_axis(kept, ids, axis)
        picked = masked(Masked(picked, kept, inputs.keep_row))
        return (
            picked if classes.axis_name is None else jnp.where(ids == here, picked, 0)
        )

    if is_sharded(inputs.logits):
        return by_mask(inputs, labels)
    return jax.lax.platform_dependent(inputs, labels, cpu=by_gather, default=by_mask)


@label_logits.defjvp
def _label_logits_jvp(
    classes: ClassAxis, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    inputs, labels = primals
    values = masked(inputs)
    direction = zero_where_dropped(tangents[0].logits.astype(values.dtype), inputs)
    hit = class_index(values, classes) == labels
    slope = jnp.sum(jnp.where(hit, direction, 0), axis=classes.axis, keepdims=True)
    return label_logits(classes, inputs, labels), slope


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


def best_rival(inputs: Masked, labels: jax.Array, classes: ClassAxis) -> jax.Array:
    """Returns the largest logit but the label's, over all shards; −inf for none."""

    def rival(inputs: Masked, index: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.where(index == labels, -jnp.inf, masked(inputs))

    index = class_index(inputs.logits, classes)
    local = max_classes(rival, (inputs, index, labels), classes.axis)
    return classes.largest(local)


def sum_of_rivals(
    reduction: Reduction,
    inputs: Masked,
    labels: jax.Array,
    pivot: jax.Array,
    classes: ClassAxis,
) -> jax.Array:
    """Returns Σ_{j≠y} exp(x_j − pivot) over the classes here.

    The sum is a `SPLIT_SUM`, or a `SUM`, which costs less and rounds more.
    """

    def power(inputs: Masked, index: Any, labels: Any, pivot: Any) -> jax.Array:
        return jnp.where(index == labels, 0, jnp.exp(masked(inputs) - pivot))

    index = class_index(inputs.logits, classes)
    return reduce_classes(
        reduction, power, (inputs, index, labels, pivot), classes.axis
    )


def pivot_of(best_rival: jax.Array) -> jax.Array:
    """Returns what to subtract from rivals: their best, 0 where there is none."""
    return jnp.where(best_rival == -jnp.inf, 0, best_rival)


def defined(label_logit: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the label's logit, NaN where it makes the row undefined.

    +inf − +inf would hide in exp(−inf) = 0.
    """
    undefined = (labels < 0) | (label_logit == jnp.inf)
    return nan_where(undefined, label_logit)


def settled(
    best_rival: jax.Array, rivals: jax.Array, label_logit: jax.Array
) -> LabelStatistics:
    """Returns the statistics that three numbers a row determine.

    Args:
      best_rival: the largest logit but the label's, `-inf` where there is none.
      rivals: Σ_{j≠y} exp(x_j − best_rival), 0 where there is none.
      label_logit: x_y, NaN where the row is undefined.
    """
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
        pivot=pivot_of(best_rival),
        rival_scale=jnp.where(wins, power, 1) / total,
        rival_mass=odds / total,
        label_mass=jnp.where(wins, 1, power) / total,
    )


class TargetStatistics(NamedTuple):
    """Per row, of size 1 along the class axis; T is the sum of the row's targets."""

    loss: jax.Array  # Σ t_j (log-normaliser − x_j)
    log_normalizer: jax.Array
    largest: jax.Array  # the largest logit
    ties: jax.Array  # how many classes have it
    excess: jax.Array  # r: Σ exp(x_j − largest) − 1
    total: jax.Array  # T
    rest: jax.Array  # T without the targets of the largest logits


@functools.partial(jax.jit, static_argnames="classes")
def target_statistics(
    inputs: Masked, targets: jax.Array, classes: ClassAxis
) -> TargetStatistics:
    """Returns the statistics of rows with a target for every class.

    Args:
      inputs: the logits and their masks.
      targets: of the logits' shape, in the accumulation dtype, 0 where dropped.
      classes: the class axis.
    """
    largest = classes.largest(max_classes(masked, (inputs,), classes.axis))

    # Logits are compared, not their distances from the largest, which XLA may round in
    # other ways for other sums. Two comparisons, not one and its complement, because
    # XLA:GPU would write the mask that two sums share to memory.
    def terms(inputs: Masked, targets: jax.Array, largest: jax.Array) -> Any:
        values = masked(inputs)
        return (
            # First, as the one sum that the gradient does without: on a CPU it then
            # has read the logits before the gradient takes their memory. In pairs that
            # read the same.
            # 0·inf is never formed: a class without a target adds nothing.
            targets * jnp.where(targets == 0, 0, largest - values),
            jnp.where(values >= largest, 0, targets),
            jnp.where(values >= largest, 0, jnp.exp(values - largest)),
            jnp.where(values < largest, 0, jnp.ones_like(values)),
            targets,
        )

    sums = sum_classes(terms, (inputs, targets, largest), classes.axis)
    distance, rest, below, ties, total = classes.total(sums)
    # Without a finite logit, or with an infinite one, the row is undefined.
    ties = nan_where(~jnp.isfinite(largest), ties)
    excess = below + (ties - 1)
    log_mass = jnp.log1p(excess)
    return TargetStatistics(
        loss=distance + total * log_mass,
        log_normalizer=largest + log_mass,
        largest=largest,
        ties=ties,
        excess=excess,
        total=total,
        rest=rest,
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
    top = jnp.where(statistics.ties == 1, largest, jnp.inf)
    return jnp.where(values >= top, at_top, plain)
