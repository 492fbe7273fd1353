"""Class ids as targets: the label is left out of the normaliser.

Written the plain way, `logsumexp(x) − x[y]`, the difference of two rounded numbers
loses every digit once the label wins by more than the precision of the dtype: the loss
and its gradient become exactly 0. With the best rival m = max_{j≠y} x_j as the pivot,
R = Σ_{j≠y} exp(x_j − m) and w = R·exp(m − x_y), the loss is log1p(w) and the label's
gradient −w / (1 + w): sums and products of non-negative terms, so errors add up and
never amplify.
"""

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
    Largest,
    Sums,
    UniformSums,
    Wanted,
    merged,
    relative_to,
    sums_of,
)


class Results(NamedTuple):
    """Per row, of size 1 along the class axis; `None` where not wanted.

    What a loss is composed of is 0 in a dropped row.
    """

    loss: jax.Array  # log-normaliser − x_y
    log_normalizer: jax.Array
    uniform: jax.Array | None  # Σ_j w_j (log-normaliser − x_j) over the kept classes
    label_weight: jax.Array | None  # w_y
    entropy: jax.Array | None  # Σ_j p_j (log-normaliser − x_j)
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
    uniform: jax.Array | None
    label_weight: jax.Array | None
    entropy: jax.Array | None
    total_weight: jax.Array | None


class ClassIds(NamedTuple):
    """The kind of target that is one class id a row, and what is wanted of a row.

    A target is int32 labels of size 1 along the class axis, which count over all blocks
    and shards; −1 is no class.
    """

    classes: ClassAxis
    uniform: bool = False
    label_weight: bool = False
    entropy: bool = False
    prediction: bool = False
    differentiated: bool = False

    def sums(self, block: Block, labels: jax.Array) -> Sums:
        """Returns the sums over one block of classes."""
        wanted = Wanted(
            self.uniform,
            self.label_weight,
            self.entropy,
            self.prediction,
            reused=self.differentiated,
        )
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
        self, sums: Sums, labels: jax.Array, keep_row: jax.Array | None
    ) -> Results:
        """Returns what the sums over all classes come to."""
        # +inf − +inf would hide in exp(−inf) = 0.
        undefined = (labels < 0) | (sums.label_logit == jnp.inf)
        label_logit = nan_where(undefined, sums.label_logit)
        row = label_row.statistics(sums.best_rival, sums.rivals, label_logit)
        uniform = total = entropy = prediction = None
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
        loss, log_normalizer, uniform, label_weight, entropy = jax.tree.map(
            lambda numbers: zero_in_dropped_rows(numbers, keep_row),
            (row.loss, row.log_normalizer, uniform, sums.label_weight, entropy),
        )
        return Results(
            loss,
            log_normalizer,
            uniform,
            label_weight,
            entropy,
            prediction,
            row.statistics,
            total,
        )

    def slopes(self, block: Block, labels: jax.Array, results: Results) -> Slopes:
        """Returns "mean parameter minus target" of the results, over a block."""
        row, values = results.statistics, values_of(block)
        hit = block.class_ids == labels
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
        labels: jax.Array,
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
            own = jnp.where(block.class_ids == labels, weights_dot, 0)
            own = zero_in_dropped_rows(self._total(own), block.keep_row)
            dots = dots._replace(label_weight=own)
        return dots

    def no_tangents(self, results: Results, zero: jax.Array) -> Dots:
        """Returns the tangents of no classes, `zero` a row of the wanted results."""
        wanted = (getattr(results, name) for name in Dots._fields)
        return Dots(*jax.tree.map(lambda _: zero, tuple(wanted)))

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


def _uniform_loss(sums: UniformSums, row: label_row.Row) -> jax.Array:
    """Returns Σ_j w_j (log-normaliser − x_j), from non-negative terms alone."""
    statistics = row.statistics
    # Where every rival is impossible the pivot is a stand-in, and so is the rise.
    rise = jnp.where(sums.rivals == 0, 0, statistics.largest - statistics.pivot)
    gap = jnp.where(sums.label == 0, 0, row.loss - statistics.log_mass)
    fixed = (sums.rivals + sums.label) * statistics.log_mass
    return sums.distance + sums.rivals * rise + sums.label * gap + fixed


def _entropy(distance: jax.Array, row: label_row.Row) -> jax.Array:
    """Returns Σ_j p_j (log-normaliser − x_j), from non-negative terms alone."""
    statistics = row.statistics
    rise = (statistics.largest - statistics.pivot) + statistics.log_mass
    rivals = statistics.rival_scale * distance
    rivals = rivals + scaled(statistics.rival_mass, rise)
    return rivals + scaled(statistics.label_mass, row.loss)


class Coefficients(NamedTuple):
    """What a row's results are multiplied by; `None` stands for 1, then 0, then 0."""

    loss: jax.Array | None
    uniform: jax.Array | None
    square: jax.Array | None  # of the log-normaliser


def combined(results: Results, coefficients: Coefficients) -> jax.Array:
    """Returns the loss of every row: all options are in the coefficients."""
    loss = results.loss
    if coefficients.loss is not None:
        loss = scaled(coefficients.loss, loss)
    if results.uniform is not None and coefficients.uniform is not None:
        loss = loss + scaled(coefficients.uniform, results.uniform)
    if coefficients.square is not None:
        loss = loss + coefficients.square * jnp.square(results.log_normalizer)
    return loss


def summed(results: Results, coefficients: Coefficients) -> jax.Array:
    """Returns the sum over the rows of their losses."""
    return jnp.sum(combined(results, coefficients))


class Factors(NamedTuple):
    """The gradients of a sum of losses by the results: factors of their slopes."""

    loss: jax.Array
    log_normalizer: jax.Array
    uniform: jax.Array | None


def summed_with_gradients(
    results: Results, coefficients: Coefficients
) -> tuple[jax.Array, Factors, Coefficients]:
    """Returns the sum over the rows of their losses, and its gradients by both.

    Those by the results are by numbers, and not by the statistics behind them.
    """

    def of_numbers(numbers: Factors, coefficients: Coefficients) -> jax.Array:
        return summed(results._replace(**numbers._asdict()), coefficients)

    numbers = Factors(results.loss, results.log_normalizer, results.uniform)
    total, pull = jax.vjp(of_numbers, numbers, coefficients)
    return total, *pull(jnp.ones_like(total))


def slope_of_sum(
    factors: Factors, coefficients: Coefficients, slopes: Slopes
) -> jax.Array:
    """Returns the derivative of the sum by the logits of a block, elementwise.

    Args:
      factors: of the slopes.
      coefficients: of the sum.
      slopes: of the results.
    """
    slope = factors.loss * slopes.loss
    if coefficients.square is not None:
        slope = slope + factors.log_normalizer * slopes.log_normalizer
    if factors.uniform is not None and slopes.uniform is not None:
        slope = slope + factors.uniform * slopes.uniform
    return slope
