"""Class ids as targets: the label is left out of the normalizer.

Written the plain way, `logsumexp(x) − x[y]`, the difference of two rounded numbers
loses every digit once the label wins by more than the precision of the dtype: the loss
and its gradient become exactly 0. With the best rival m = max_{j≠y} x_j as the pivot,
R = Σ_{j≠y} exp(x_j − m) and w = R·exp(m − x_y), the loss is log1p(w) and the label's
gradient −w / (1 + w): sums and products of non-negative terms, so errors add up and
never amplify.

A row may have other labels beside: their losses are log1p(w) + (x_y − x_k), so that a
target of K ids is a sum of losses, in which the label y is best the most probable one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.precision import nan_where, scaled
from xent_jax._targets import label_row
from xent_jax._targets.block import (
    Block,
    values_of,
    zero_in_dropped_rows,
    zero_where_dropped,
)
from xent_jax._targets.label_row import RowStatistics
from xent_jax._targets.rivals import (
    Labels,
    Largest,
    Sums,
    UniformSums,
    WantedSums,
    less_at,
    merged,
    picked,
    relative_to,
    sums_of,
)


class Results(NamedTuple):
    """Per row, of size 1 along the class axis; `None` where not wanted.

    What a loss is composed of is 0 in a dropped row.
    """

    loss: jax.Array  # log-normalizer − x_y
    log_normalizer: jax.Array
    others: jax.Array | None  # log-normalizer − x_k of K other labels, 0 for no class
    uniform: jax.Array | None  # Σ_j w_j (log-normalizer − x_j) over the kept classes
    label_weight: jax.Array | None  # w_y
    entropy: jax.Array | None  # Σ_j p_j (log-normalizer − x_j)
    prediction: jax.Array | None  # int32, −1 where there is no largest logit
    statistics: RowStatistics  # what derivatives are made of
    total_weight: jax.Array | None  # Σ_j w_j over the kept classes, for `uniform`


class Slopes(NamedTuple):
    """The derivatives of the results by the logits of a block, elementwise."""

    loss: jax.Array
    log_normalizer: jax.Array
    uniform: jax.Array | None
    entropy: jax.Array | None


class Dots(NamedTuple):
    """The tangents of the results that are sums over the classes."""

    loss: jax.Array
    log_normalizer: jax.Array
    others: jax.Array | None
    uniform: jax.Array | None
    label_weight: jax.Array | None
    entropy: jax.Array | None
    total_weight: jax.Array | None


class ClassIds(NamedTuple):
    """The kind of target that is class ids, and what is wanted of a row."""

    classes: ClassAxis
    wanted: WantedSums = WantedSums()
    differentiated: bool = False

    def sums(self, block: Block, labels: Labels) -> Sums:
        """Returns the sums over one block of classes."""
        wanted = self.wanted._replace(reused=self.differentiated)
        return sums_of(wanted, self.classes.axis, block, labels)

    def merged(self, left: Sums, right: Sums) -> Sums:
        """Returns the sums of two blocks together, `left` having the lower ids."""
        return merged(left, right)

    def nothing(self, sums: Sums) -> Sums:
        """Returns the sums of no classes from zeros of the shapes of `sums`."""
        nothing = sums._replace(best_rival=sums.best_rival - jnp.inf)
        if nothing.largest is None:
            return nothing
        lowest = nothing.largest.logit - jnp.inf
        return nothing._replace(largest=nothing.largest._replace(logit=lowest))

    def over_shards(self, sums: Sums) -> Sums:
        """Returns the sums over all shards' classes from those of each."""
        classes = self.classes
        if classes.axis_name is None:
            return sums
        best_rival = classes.largest(sums.best_rival)
        own = relative_to(best_rival, sums)
        total = Sums(best_rival, *classes.total(own[1:-1]), largest=None)
        if sums.largest is None:
            return total
        # No NaN, of which a maximum over devices makes what it likes.
        logit, class_id = sums.largest
        logit = jnp.where(jnp.isnan(logit), jnp.inf, logit)
        largest = classes.largest(logit)
        none = jnp.iinfo(jnp.int32).max
        lowest = -classes.largest(-jnp.where(logit == largest, class_id, none))
        return total._replace(largest=Largest(largest, lowest))

    def results(
        self, sums: Sums, labels: Labels, keep_row: jax.Array | None
    ) -> Results:
        """Returns what the sums over all classes come to."""
        # +inf − +inf would hide in exp(−inf) = 0.
        undefined = (labels.own < 0) | (sums.label_logit == jnp.inf)
        label_logit = nan_where(undefined, sums.label_logit)
        row = label_row.statistics(sums.best_rival, sums.rivals, label_logit)
        others = uniform = total = entropy = prediction = None
        if labels.others is not None and sums.other_logits is not None:
            others = _other_losses(sums.other_logits, label_logit, row)
            others = jnp.where(labels.others.same, row.loss, others)
            others = jnp.where(labels.others.known, others, 0)
        if sums.uniform is not None:
            uniform = _uniform_loss(sums.uniform, row)
            total = sums.uniform.rivals + sums.uniform.label
        if sums.distance is not None:
            entropy = _entropy(sums.distance, row)
        if sums.largest is not None:
            found = jnp.isfinite(sums.largest.logit)
            if keep_row is not None:
                found &= keep_row
            prediction = jnp.where(found, sums.largest.class_id, -1)
        numbers = jax.tree.map(
            lambda numbers: zero_in_dropped_rows(numbers, keep_row),
            {
                "loss": row.loss,
                "log_normalizer": row.log_normalizer,
                "others": others,
                "uniform": uniform,
                "label_weight": sums.label_weight,
                "entropy": entropy,
            },
        )
        return Results(
            **numbers,
            prediction=prediction,
            statistics=row.statistics,
            total_weight=total,
        )

    def slope(
        self, block: Block, labels: Labels, results: Results, factors: Results
    ) -> jax.Array:
        """Returns the slope of the results, each times its factor, over a block."""
        slopes = self.slopes(block, labels, results)
        loss, log_normalizer, others = factors[:3]
        if others is not None and labels.others is not None:
            # Where the label is among the others, its loss has the digits.
            _, same, known = labels.others
            others = jnp.where(known, others, 0)
            loss = loss + self._total(jnp.where(same, others, 0))
            others = jnp.where(same, 0, others)
            rest = self._total(others)
            log_normalizer = rest if log_normalizer is None else log_normalizer + rest
        parts = [loss * slopes.loss]
        if log_normalizer is not None:
            parts.append(log_normalizer * slopes.log_normalizer)
        if slopes.uniform is not None and factors.uniform is not None:
            parts.append(factors.uniform * slopes.uniform)
        slope = functools.reduce(jnp.add, parts)
        if others is None or labels.others is None:
            return slope
        axis, ids = self.classes.axis, labels.others.ids
        slope = less_at(axis, block.class_ids, slope, ids, others)
        return zero_where_dropped(slope, block)

    def slopes(self, block: Block, labels: Labels, results: Results) -> Slopes:
        """Returns "mean parameter minus target" of the results, over a block."""
        row, values = results.statistics, values_of(block)
        hit = block.class_ids == labels.own
        # The label's own exponential may overflow: its slope is made of numbers a row.
        rival = jnp.exp(jnp.where(hit, 0, values - row.pivot))
        rival = rival * row.rival_scale
        softmax = jnp.where(hit, row.label_mass, rival)
        uniform = entropy = None
        if results.total_weight is not None:
            weights = 1 if block.class_weights is None else block.class_weights
            uniform = results.total_weight * softmax - weights
        if results.entropy is not None:
            below = row.largest - values
            power = jnp.exp(-below - row.log_mass)
            surprise = jnp.where(power == 0, 0, below) + row.log_mass
            entropy = power * (surprise - results.entropy)
        slopes = Slopes(
            jnp.where(hit, -row.rival_mass, rival), softmax, uniform, entropy
        )
        return jax.tree.map(lambda slope: zero_where_dropped(slope, block), slopes)

    def tangents(
        self,
        block: Block,
        labels: Labels,
        results: Results,
        logits_dot: jax.Array | None,
        weights_dot: jax.Array | None,
    ) -> Dots:
        """Returns what a block adds to the tangents.

        Linear in the tangents of the block's logits and class weights.
        """
        zero = zero_in_dropped_rows(jnp.zeros_like(results.loss), block.keep_row)
        dots = self.no_tangents(results, zero)
        if logits_dot is not None:
            direction = zero_where_dropped(logits_dot.astype(zero.dtype), block)
            changes = jax.tree.map(
                lambda slope: self._total(slope * direction),
                self.slopes(block, labels, results),
            )
            dots = dots._replace(**changes._asdict())
            if labels.others is not None:
                ids, same, known = labels.others
                other = picked(self.classes.axis, block.class_ids, direction, ids)
                other = jnp.where(same, dots.loss, dots.log_normalizer - other)
                dots = dots._replace(others=jnp.where(known, other, 0))
        if weights_dot is None:
            return dots
        if dots.uniform is not None:
            change = jnp.broadcast_to(weights_dot, block.logits.shape)
            change = zero_where_dropped(change, block)
            surprise = results.log_normalizer - values_of(block)
            surprise = zero_where_dropped(surprise, block)
            dots = dots._replace(
                uniform=dots.uniform + self._total(surprise * change),
                total_weight=self._total(change),
            )
        if dots.label_weight is not None:
            own = jnp.where(block.class_ids == labels.own, weights_dot, 0)
            own = zero_in_dropped_rows(self._total(own), block.keep_row)
            dots = dots._replace(label_weight=own)
        return dots

    def no_tangents(self, results: Results, zero: jax.Array) -> Dots:
        """Returns the tangents of no classes, `zero` a row of the wanted results."""
        wanted = (getattr(results, name) for name in Dots._fields)
        dots = Dots(*jax.tree.map(lambda _: zero, tuple(wanted)))
        if results.others is None:
            return dots
        return dots._replace(others=zero + jnp.zeros_like(results.others))

    def completed(self, results: Results, dots: Dots) -> Results:
        """Returns the tangents of all results, from those that are sums over blocks."""
        zero = jax.custom_derivatives.zero_from_primal
        return Results(
            **dots._asdict(),
            prediction=jax.tree.map(zero, results.prediction),
            statistics=label_row.tangents(
                results.statistics, dots.loss, dots.log_normalizer
            ),
        )

    def _total(self, numbers: jax.Array) -> jax.Array:
        return jnp.sum(numbers, axis=self.classes.axis, keepdims=True)


def _other_losses(
    logits: jax.Array, label_logit: jax.Array, row: label_row.Row
) -> jax.Array:
    """Returns the loss of every other label, from the label's and its distance."""
    logits = nan_where(logits == jnp.inf, logits)
    ahead = jnp.where(logits == label_logit, 0, label_logit - logits)
    finite = jnp.isfinite(row.loss)
    return jnp.where(finite, row.loss + ahead, row.log_normalizer - logits)


def _uniform_loss(sums: UniformSums, row: label_row.Row) -> jax.Array:
    """Returns Σ_j w_j (log-normalizer − x_j), from non-negative terms alone."""
    statistics = row.statistics
    # Where every rival is impossible the pivot is a stand-in, and so is the rise.
    rise = jnp.where(sums.rivals == 0, 0, statistics.largest - statistics.pivot)
    gap = jnp.where(sums.label == 0, 0, row.loss - statistics.log_mass)
    fixed = (sums.rivals + sums.label) * statistics.log_mass
    return sums.distance + sums.rivals * rise + sums.label * gap + fixed


def _entropy(distance: jax.Array, row: label_row.Row) -> jax.Array:
    """Returns Σ_j p_j (log-normalizer − x_j), from non-negative terms alone."""
    statistics = row.statistics
    rise = (statistics.largest - statistics.pivot) + statistics.log_mass
    rivals = statistics.rival_scale * distance
    rivals = rivals + scaled(statistics.rival_mass, rise)
    return rivals + scaled(statistics.label_mass, row.loss)


class Coefficients(NamedTuple):
    """What a row's results are multiplied by; `None` stands for 1, then 0s."""

    loss: jax.Array | None
    uniform: jax.Array | None
    square: jax.Array | None  # of the log-normalizer
    others: jax.Array | None = None  # K of them; the label's loss then has none


def combined(results: Results, coefficients: Coefficients, axis: int = -1) -> jax.Array:
    """Returns the loss of every row: all options are in the coefficients."""
    loss = results.loss
    if results.others is not None and coefficients.others is not None:
        loss = scaled(coefficients.others, results.others)
        loss = jnp.sum(loss, axis=axis, keepdims=True)
    elif coefficients.loss is not None:
        loss = scaled(coefficients.loss, loss)
    if results.uniform is not None and coefficients.uniform is not None:
        loss = loss + scaled(coefficients.uniform, results.uniform)
    if coefficients.square is not None:
        loss = loss + coefficients.square * jnp.square(results.log_normalizer)
    return loss
