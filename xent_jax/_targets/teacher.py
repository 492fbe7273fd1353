"""A second softmax as the target: the divergence of two rows of logits.

With q the first distribution, p the second and δ = log p − log q, the divergence is
Σ q·(exp(δ) − 1 − δ): a sum of non-negative terms, of which those of near distributions
are a power series in δ, so that a divergence of 1e-9 keeps its digits and that of equal
logits is 0. It needs no exact normalizers. With p̃ and q̃ off by factors P and Q, and
d = log p̃ − log q̃,

    divergence = Σ q̃·(exp(d) − 1 − d) / Q − (e − log1p(e)),  e = (P − Q) / Q

where e, a sum of p̃ − q̃ that cancels nothing either, is small.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.classes import SUM, max_classes, reduce_classes
from xent_jax._reductions.precision import nan_where, two_sum
from xent_jax._targets import label_row
from xent_jax._targets.block import (
    Block,
    values_of,
    zero_in_dropped_rows,
    zero_where_dropped,
)

# Distances for which the series is taken. Beyond, the largest of the terms of
# exp(d) − 1 − d is five times the result.
_NEAR = 0.5
_MOST_POWER = 60.0


class Pivot(NamedTuple):
    """What logits are relative to, per row, of size 1 along the class axis.

    log p̃ = student's logit − student + offset, log q̃ = teacher's logit − teacher.
    """

    student: jax.Array
    teacher: jax.Array
    offset: jax.Array


class Target(NamedTuple):
    """The teacher's logits of a block, of its shape, in the accumulation dtype."""

    logits: jax.Array
    pivot: Pivot | None = None  # of all blocks; without it, there is one block


class Sums(NamedTuple):
    """Per row, of size 1 along the class axis; relative to the pivot."""

    pivot: Pivot
    student_largest: jax.Array
    teacher_largest: jax.Array
    student: jax.Array  # Σ exp(x − student_largest)
    teacher: jax.Array  # Q, and the three below relative to teacher_largest
    excess: jax.Array  # P − Q
    terms: jax.Array  # Σ q̃·(exp(d) − 1 − d); reverse: Σ p̃·(exp(−d) − 1 + d)
    distance: jax.Array | None  # Σ −q̃·d; reverse: Σ exp(x − student_largest)·d


class TeacherStatistics(NamedTuple):
    """What derivatives are made of, relative to the pivot."""

    pivot: Pivot
    student: jax.Array  # log-normalizer of the student
    teacher: jax.Array  # log-normalizer of the teacher
    shift: jax.Array  # their difference, accurate where the two are near


class Results(NamedTuple):
    """Per row, of size 1 along the class axis; the first is 0 in a dropped row."""

    loss: jax.Array  # the divergence
    log_normalizer: jax.Array  # of the student, relative to the pivot
    statistics: TeacherStatistics
    others: None = None
    uniform: None = None
    prediction: None = None
    total_weight: None = None


class Dots(NamedTuple):
    """The tangents of the results that are sums over the classes."""

    loss: jax.Array
    log_normalizer: jax.Array


class Teacher(NamedTuple):
    """The kind of target that is a second row of logits, which are constants."""

    classes: ClassAxis
    reverse: bool = False  # KL(student ‖ teacher), not KL(teacher ‖ student)
    differentiated: bool = False

    def sums(self, block: Block, target: Target) -> Sums:
        """Returns the sums over one block of classes."""
        pair = block, block._replace(logits=target.logits)
        pivot, student, teacher = target.pivot, None, None
        axis = self.classes.axis
        if pivot is None:
            pivot, student, teacher = self._pivot(pair)
            largest = jnp.zeros_like(student), jnp.zeros_like(student)
        else:
            largest = (
                max_classes(_relative, (pair[0], pivot.student), axis),
                max_classes(_relative, (pair[1], pivot.teacher), axis),
            )
        safe = tuple(map(label_row.pivot_of, largest))
        operands = pair, pivot, safe
        whole = target.pivot is None
        terms = functools.partial(_terms, self.reverse, whole)
        add = SUM._replace(reused=self.differentiated)
        excess, total, *others = reduce_classes(add, terms, operands, axis)
        distance = None
        if student is None or teacher is None:
            distance, student, teacher = others
        return Sums(
            pivot, largest[0], largest[1], student, teacher, excess, total, distance
        )

    def pivot_of(self, block: Block, logits: jax.Array) -> Pivot:
        """Returns a pivot from some of the classes, the same on all shards."""
        classes = self.classes
        pair = block, block._replace(logits=logits)
        pivot, *_ = self._replace(classes=ClassAxis(classes.axis))._pivot(pair)
        pivot = jax.tree.map(
            lambda number: jnp.where(jnp.isfinite(number), number, 0), pivot
        )
        return jax.tree.map(classes.largest, pivot)

    def _pivot(self, pair: tuple[Block, Block]) -> tuple[Pivot, jax.Array, jax.Array]:
        """Returns the pivot that normalises all classes, and sums of exponentials.

        These are of the classes here, relative to the largest logits of all.
        """
        axis = self.classes.axis
        largest = [
            self.classes.largest(max_classes(values_of, (one,), axis)) for one in pair
        ]
        safe = tuple(map(label_row.pivot_of, largest))
        add = SUM._replace(reused=True)
        sums = reduce_classes(add, _powers, (pair, safe), axis)
        student, teacher = self.classes.total(sums)
        # Without a finite logit a row is undefined.
        teacher = nan_where(teacher == 0, teacher)
        offset = jnp.log(teacher) - jnp.log(nan_where(student == 0, student))
        return Pivot(safe[0], safe[1], offset), *sums

    def merged(self, left: Sums, right: Sums) -> Sums:
        """Returns the sums of two blocks together."""
        student = jnp.maximum(left.student_largest, right.student_largest)
        teacher = jnp.maximum(left.teacher_largest, right.teacher_largest)
        both = (self._relative_to(student, teacher, one) for one in (left, right))
        left, right = both
        added = jax.tree.map(jnp.add, left[3:], right[3:])
        # Of the same numbers, and varying over a mesh as both do.
        pivot = jax.tree.map(
            lambda one, other: jnp.where(other == other, other, one),
            left.pivot,
            right.pivot,
        )
        return Sums(pivot, student, teacher, *added)

    def nothing(self, sums: Sums) -> Sums:
        """Returns the sums of no classes from zeros of the shapes of `sums`."""
        lowest = sums.student_largest - jnp.inf
        return sums._replace(student_largest=lowest, teacher_largest=lowest)

    def over_shards(self, sums: Sums) -> Sums:
        """Returns the sums over all shards' classes from those of each."""
        if self.classes.axis_name is None:
            return sums
        student = self.classes.largest(sums.student_largest)
        teacher = self.classes.largest(sums.teacher_largest)
        own = self._relative_to(student, teacher, sums)
        return Sums(sums.pivot, student, teacher, *self.classes.total(own[3:]))

    def _relative_to(self, student: jax.Array, teacher: jax.Array, sums: Sums) -> Sums:
        """Returns the sums relative to larger logits."""

        def factor(own: jax.Array, largest: jax.Array) -> jax.Array:
            return jnp.where(own == -jnp.inf, 0, jnp.exp(own - largest))

        of_student = factor(sums.student_largest, student)
        of_teacher = factor(sums.teacher_largest, teacher)
        distance = sums.distance
        if distance is not None:
            distance = distance * (of_student if self.reverse else of_teacher)
        return sums._replace(
            student=sums.student * of_student,
            teacher=sums.teacher * of_teacher,
            excess=sums.excess * of_teacher,
            terms=sums.terms * of_teacher,
            distance=distance,
        )

    def results(
        self, sums: Sums, target: Target, keep_row: jax.Array | None
    ) -> Results:
        """Returns what the sums over all classes come to."""
        # Of a loop over blocks it may vary over a mesh, and is the same all over it.
        pivot = sums.pivot if target.pivot is None else target.pivot
        mass = nan_where(sums.teacher == 0, sums.teacher)
        other = nan_where(sums.student == 0, sums.student)
        student = sums.student_largest + jnp.log(other)
        teacher = sums.teacher_largest + jnp.log(mass)
        first = mass + sums.excess if self.reverse else mass
        excess = (-sums.excess if self.reverse else sums.excess) / first
        ratio = jnp.log1p(sums.excess / mass)
        shift = ratio - pivot.offset
        loss = sums.terms / first - _log_rest(excess)
        if sums.distance is not None:
            # A pivot that is far off: the distributions are not near.
            near = jnp.abs(excess) < _NEAR
            shift = jnp.where(near, shift, student - teacher)
            rise = shift + pivot.offset
            plain = sums.distance / (other if self.reverse else mass)
            plain = plain - rise if self.reverse else plain + rise
            loss = jnp.where(near, loss, plain)
        loss = jnp.maximum(loss, 0)
        return Results(
            zero_in_dropped_rows(loss, keep_row),
            zero_in_dropped_rows(student, keep_row),
            TeacherStatistics(pivot, student, teacher, shift),
        )

    def slope(
        self, block: Block, target: Target, results: Results, factors: Results
    ) -> jax.Array:
        """Returns the slope of the divergence, times its factor, over a block."""
        return factors.loss * self.slopes(block, target, results).loss

    def slopes(self, block: Block, target: Target, results: Results) -> Dots:
        """Returns the derivatives of the results by the logits, elementwise."""
        row = results.statistics
        pair = block, block._replace(logits=target.logits)
        student, teacher, change = _differences(pair, row.pivot)
        change = change - row.shift
        mean = jnp.exp(student - row.student)
        if self.reverse:
            slope = jnp.where(mean == 0, 0, change) - results.loss
            slope = jnp.where(mean == 0, 0, mean * slope)
        else:
            own = jnp.exp(teacher - row.teacher)
            near = jnp.abs(change) < _NEAR
            slope = own * jnp.expm1(jnp.where(near, change, 0))
            slope = jnp.where(near, slope, mean - own)
        slopes = Dots(slope, mean)
        return jax.tree.map(lambda slope: zero_where_dropped(slope, block), slopes)

    def tangents(
        self,
        block: Block,
        target: Target,
        results: Results,
        logits_dot: jax.Array | None,
        weights_dot: jax.Array | None,
    ) -> Dots:
        """Returns what a block adds to the tangents, linear in that of its logits."""
        del weights_dot  # there are none
        zero = zero_in_dropped_rows(jnp.zeros_like(results.loss), block.keep_row)
        if logits_dot is None:
            return self.no_tangents(results, zero)
        direction = zero_where_dropped(logits_dot.astype(zero.dtype), block)
        return jax.tree.map(
            lambda slope: jnp.sum(
                slope * direction, axis=self.classes.axis, keepdims=True
            ),
            self.slopes(block, target, results),
        )

    def no_tangents(self, results: Results, zero: jax.Array) -> Dots:
        """Returns the tangents of no classes."""
        del results
        return Dots(zero, zero)

    def completed(self, results: Results, dots: Dots) -> Results:
        """Returns the tangents of all results, from those that are sums over blocks."""
        row = results.statistics
        statistics = TeacherStatistics(
            jax.tree.map(jnp.zeros_like, row.pivot),
            student=dots.log_normalizer,
            teacher=jnp.zeros_like(row.teacher),
            shift=dots.log_normalizer,
        )
        return Results(dots.loss, dots.log_normalizer, statistics)


def _relative(block: Block, anchor: jax.Array) -> jax.Array:
    return values_of(block) - anchor


def _powers(
    pair: tuple[Block, Block], largest: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    # The same for both, so that equal logits have equal sums.
    return tuple(
        jnp.exp(values_of(one) - top) for one, top in zip(pair, largest, strict=True)
    )


def _differences(
    pair: tuple[Block, Block], pivot: Pivot
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the logits relative to the pivot, and the student's less the teacher's.

    Their difference has the rounding errors of the two taken out again: it is small
    where the distributions are near, whatever the logits are.
    """
    student, error = two_sum(values_of(pair[0]), -pivot.student)
    teacher, other = two_sum(values_of(pair[1]), -pivot.teacher)
    # −inf of both would make a NaN: of a class that the student lacks it stays −inf.
    change = student - jnp.where(student == -jnp.inf, 0, teacher)
    return student, teacher, change + (error - other)


def _terms(
    reverse: bool,
    whole: bool,
    pair: tuple[Block, Block],
    pivot: Pivot,
    largest: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
    """Returns what is summed: the excess and the terms.

    For a part of the classes, also the distance and the exponentials of both.
    """
    student, teacher, change = _differences(pair, pivot)
    change = change + pivot.offset
    q = jnp.exp(teacher - largest[1])
    # With all classes at hand it is at most 1. With a pivot that is far off it might
    # overflow, and one NaN would make all of the sums NaN.
    power = student + (pivot.offset - largest[1])
    p = jnp.exp(power if whole else jnp.minimum(power, _MOST_POWER))
    first, second, ahead = (p, q, -change) if reverse else (q, p, change)
    near = jnp.abs(change) < _NEAR
    small = jnp.where(near, ahead, 0)
    bend = _series(small)
    # 0·inf is never formed: a class that the first distribution lacks adds the other's.
    lost = first * jnp.where(first == 0, 0, ahead)
    far = (second - first) - lost
    terms = jnp.where(near, first * bend, far)
    gain = jnp.where(near, first * (small + bend), second - first)
    excess = -gain if reverse else gain
    if whole:
        return excess, terms
    own = jnp.exp(student - largest[0])
    weight = own if reverse else q
    distance = -weight * jnp.where(weight == 0, 0, ahead)
    return excess, terms, distance, own, q


def _series(x: jax.Array) -> jax.Array:
    """Returns exp(x) − 1 − x for |x| < 1/2."""
    terms = 14 if x.dtype == jnp.float64 else 7
    total = jnp.zeros_like(x)
    for index in range(terms, 0, -1):
        total = (1 + total) * x / (index + 2)
    return jnp.square(x) / 2 * (1 + total)


def _log_rest(x: jax.Array) -> jax.Array:
    """Returns x − log(1 + x), by its series where the two cancel."""
    small = jnp.abs(x) < 0.1
    near = jnp.where(small, x, 0)
    terms = 16 if x.dtype == jnp.float64 else 8
    total = jnp.zeros_like(x)
    for index in range(terms, 1, -1):
        total = 1 / index - near * total
    far = jnp.where(small, 0, x)
    return jnp.where(small, jnp.square(near) * total, far - jnp.log1p(far))
