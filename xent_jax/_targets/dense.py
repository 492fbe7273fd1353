"""Dense targets: one occurrence of the largest logit is left out of the normalizer.

With m the largest logit, r = Σ_{x<m} exp(x − m) + (number of maxima − 1) needs no arg
max, and the loss is Σ t_j (m − x_j) + T·log1p(r), T the sum of the targets: a sum of
non-negative terms for non-negative targets, of any sum.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.classes import (
    max_classes,
    sum_classes,
    unfused_on_cpu,
)
from xent_jax._reductions.precision import log1p, nan_where
from xent_jax._targets.block import (
    Block,
    values_of,
    zero_in_dropped_rows,
    zero_where_dropped,
)


class Sums(NamedTuple):
    """Per row, of size 1 along the class axis."""

    largest: jax.Array  # the largest logit; the pivot of the other sums
    distance: jax.Array  # Σ t_j (pivot − x_j)
    total: jax.Array  # Σ t_j
    below: jax.Array  # Σ_{x_j<pivot} exp(x_j − pivot)
    ties: jax.Array  # how many classes have the largest logit
    rest: jax.Array | None = None  # Σ t_j without the targets of the largest logits


class TargetStatistics(NamedTuple):
    """What derivatives are made of."""

    largest: jax.Array
    ties: jax.Array
    excess: jax.Array  # r: Σ exp(x_j − largest) − 1
    total: jax.Array  # T
    rest: jax.Array  # T without the targets of the largest logits


class Results(NamedTuple):
    """Per row, of size 1 along the class axis; the first two are 0 in a dropped row."""

    loss: jax.Array  # Σ t_j (log-normalizer − x_j)
    log_normalizer: jax.Array
    statistics: TargetStatistics


class Dots(NamedTuple):
    """What a block adds to the tangents of a row."""

    loss: jax.Array
    log_normalizer: jax.Array
    largest: jax.Array  # of the largest logits, summed
    below: jax.Array  # Σ_{x_j<largest} exp(x_j − largest) ẋ_j
    rest: jax.Array
    total: jax.Array


class DenseTargets(NamedTuple):
    """The kind of target that is a number a class, of the logits' shape.

    Targets are of the accumulation dtype; those of dropped classes do not count.
    """

    classes: ClassAxis
    differentiated: bool = False

    def sums(self, block: Block, targets: jax.Array) -> Sums:
        """Returns the sums over one block of classes."""
        axis = self.classes.axis
        targets = zero_where_dropped(targets, block)
        largest = max_classes(values_of, (block,), axis)

        # Classes that are all impossible are far below, and none of them is a largest.
        pivot = jnp.where(largest == -jnp.inf, 0, largest)
        names = _OF_VALUE
        if self.differentiated:
            classes = block.logits.shape[axis]
            few = isinstance(classes, int) and classes <= _FEW
            names = _WITH_GRADIENT_OF_FEW if few else _WITH_GRADIENT
        terms = functools.partial(_terms, names)
        sums = sum_classes(terms, (block, targets, pivot), axis)
        return Sums(largest, **dict(zip(names, sums, strict=True)))

    def over_shards(self, sums: Sums) -> Sums:
        """Returns the sums over all shards' classes from those of each."""
        if self.classes.axis_name is None:
            return sums
        largest = self.classes.largest(sums.largest)
        return Sums(largest, *self.classes.total(_relative_to(largest, sums)[1:]))

    def results(
        self, sums: Sums, targets: jax.Array, keep_row: jax.Array | None
    ) -> Results:
        """Returns what the sums over all classes come to."""
        # Without a finite logit, or with an infinite one, the row is undefined.
        ties = nan_where(~jnp.isfinite(sums.largest), sums.ties)
        excess = sums.below + (ties - 1)
        log_mass = log1p(excess)
        loss = sums.distance + sums.total * log_mass
        if not self.differentiated:
            # XLA's library routine for the mean would make the logarithms, one by one.
            # With the gradient, XLA would make the sums of few classes once more.
            loss = unfused_on_cpu(loss)
        # What is not differentiated has no use for it, but has the same results.
        rest = jnp.zeros_like(sums.total) if sums.rest is None else sums.rest
        loss, log_normalizer = (
            zero_in_dropped_rows(numbers, keep_row)
            for numbers in (
                loss,
                sums.largest + log_mass,
            )
        )
        return Results(
            loss,
            log_normalizer,
            TargetStatistics(sums.largest, ties, excess, sums.total, rest),
        )

    def slope(self, block: Block, targets: jax.Array, results: Results) -> jax.Array:
        """Returns T·softmax(x) − t, "mean parameter minus target", over a block.

        At the largest logit k it is (Σ_{j≠k} t_j − t_k·r) / (1 + r), which keeps the
        digits that T·p_k − t_k loses when the target sits on a class that wins. For a
        small r it is taken as Σ_{j≠k} t_j − T·r / (1 + r), which is rounded once where
        1 + r is 1.
        """
        values, row = values_of(block), results.statistics
        targets = zero_where_dropped(targets, block)
        scale = 1 / (1 + row.excess)
        plain = row.total * (jnp.exp(values - row.largest) * scale) - targets
        wins = row.excess < 0.125
        base = row.rest - row.total * (row.excess * scale)
        base = jnp.where(wins, base, row.rest)
        factor = jnp.where(wins, 0, row.excess)
        at_top = (base - targets * factor) * jnp.where(wins, 1, scale)
        top = jnp.where(row.ties == 1, row.largest, jnp.inf)
        return zero_where_dropped(jnp.where(values >= top, at_top, plain), block)

    def tangents(
        self,
        block: Block,
        targets: jax.Array,
        results: Results,
        logits_dot: jax.Array | None,
        targets_dot: jax.Array | None,
    ) -> Dots:
        """Returns what a block adds to the tangents, linear in the two directions."""
        values, row = values_of(block), results.statistics

        def inner(coefficients: jax.Array, direction: jax.Array) -> jax.Array:
            coefficients = zero_where_dropped(coefficients, block)
            direction = zero_where_dropped(direction, block)
            product = coefficients * direction
            return jnp.sum(product, axis=self.classes.axis, keepdims=True)

        zero = zero_in_dropped_rows(jnp.zeros_like(results.loss), block.keep_row)
        loss, normalizer, largest, below, rest, total = (zero,) * 6
        if logits_dot is not None:
            direction = logits_dot.astype(values.dtype)
            loss = inner(self.slope(block, targets, results), direction)
            power = jnp.exp(values - row.largest)
            normalizer = inner(power * (1 / (1 + row.excess)), direction)
            below = inner(jnp.where(values >= row.largest, 0, power), direction)
            largest = inner((values >= row.largest).astype(values.dtype), direction)
        if targets_dot is not None:
            surprise = log1p(row.excess) + (row.largest - values)
            loss = loss + inner(surprise, targets_dot)
            rest = inner((values < row.largest).astype(values.dtype), targets_dot)
            total = inner(jnp.ones_like(values), targets_dot)
        return Dots(loss, normalizer, largest, below, rest, total)

    def completed(self, results: Results, dots: Dots) -> Results:
        """Returns the tangents of all results, from those that are sums over blocks."""
        row = results.statistics
        largest_dot = dots.largest / row.ties
        # One of the largest logits is left out of the excess, so it has their tangent,
        # and what falls is the rest relative to it.
        below = row.excess - (row.ties - 1)
        return Results(
            dots.loss,
            dots.log_normalizer,
            TargetStatistics(
                largest=largest_dot,
                ties=jnp.zeros_like(row.ties),
                excess=dots.below - below * largest_dot,
                total=dots.total,
                rest=dots.rest,
            ),
        )


# What is summed, in pairs, which a CPU makes in one pass: those that read the same. The
# gradient takes a sum more: the targets alone are the cheapest to read for one, 2.9 in
# place of 4.0 ms for value and gradient of 1000 classes. Few classes are not summed in
# passes, and take a tenth longer in that order. The distance comes first, as a sum that
# the gradient does without: it then has read the logits before the gradient takes their
# memory.
_OF_VALUE = "distance", "total", "below", "ties"
_WITH_GRADIENT = "distance", "rest", "below", "ties", "total"
_WITH_GRADIENT_OF_FEW, _FEW = (*_OF_VALUE, "rest"), 32


# Logits are compared, not their distances from the largest, which XLA may round in
# other ways for other sums. Two comparisons, not one and its complement, because
# XLA:GPU would write the mask that two sums share to memory.
def _terms(
    names: tuple[str, ...], block: Block, targets: jax.Array, pivot: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns what is summed for some fields of `Sums`."""
    values = values_of(block)
    terms = {
        # 0·inf is never formed: a class without a target adds nothing.
        "distance": targets * jnp.where(targets == 0, 0, pivot - values),
        "total": targets,
        "below": jnp.where(values >= pivot, 0, jnp.exp(values - pivot)),
        "ties": jnp.where(values < pivot, 0, jnp.ones_like(values)),
        "rest": jnp.where(values >= pivot, 0, targets),
    }
    return tuple(terms[name] for name in names)


def _relative_to(largest: jax.Array, sums: Sums) -> Sums:
    """Returns the sums relative to a larger logit."""
    own, rest = sums.largest, sums.rest
    lower = own < largest
    pivot = jnp.where(own == -jnp.inf, 0, own)
    rise = jnp.where(lower, largest - pivot, 0)
    factor = jnp.where(lower, jnp.exp(own - largest), 1)
    return Sums(
        largest=largest,
        distance=sums.distance + sums.total * rise,
        rest=None if rest is None else jnp.where(lower, sums.total, rest),
        below=factor * (sums.below + jnp.where(lower, sums.ties, 0)),
        ties=jnp.where(lower, 0, sums.ties),
        total=sums.total,
    )
