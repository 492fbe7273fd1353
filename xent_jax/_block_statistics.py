"""Statistics of rows whose classes come in blocks: a block's own, and how they add up.

The sums of a block are relative to its own best rival. Two blocks are added after both
are made relative to the better one, so that nothing overflows and no term is negative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xent_jax import _numerics, _spread
from xent_jax._class_axis import ClassAxis
from xent_jax._class_reductions import SUM, sum_classes
from xent_jax._numerics import LabelStatistics, Masked
from xent_jax._spread import SpreadSums

_BLOCK = ClassAxis(-1)


class Top(NamedTuple):
    """The largest logit, the label's included."""

    logit: jax.Array
    class_id: jax.Array  # int32, the lowest of equally large ones


class BlockStatistics(NamedTuple):
    """Per row, [N, 1]; `None` where not wanted. The pivot is the best rival."""

    best_rival: jax.Array  # −inf where there is none
    rivals: jax.Array  # Σ_{j≠y} exp(x_j − pivot)
    label_logit: jax.Array  # 0 where the label is in another block
    spread: SpreadSums | None
    fall: jax.Array | None  # Σ_{j≠y} exp(x_j − pivot) (pivot − x_j)
    top: Top | None


def block_statistics(
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    *,
    spread: bool,
    entropy: bool,
    prediction: bool,
) -> BlockStatistics:
    """Returns the statistics of one block of classes.

    Args:
      inputs: the block's logits and their masks.
      labels: int32[N, 1], relative to the block's first class.
      class_weights: [1, C].
      spread: whether the sums for evenly spread targets are wanted.
      entropy: whether the sum for the entropy is wanted.
      prediction: whether the class of the largest logit is wanted.
    """
    classes = inputs.logits.shape[-1]
    best_rival = _numerics.best_rival(inputs, labels, _BLOCK)
    pivot = _numerics.pivot_of(best_rival)
    rivals = _numerics.sum_of_rivals(SUM, inputs, labels, pivot, _BLOCK)
    inside = (labels >= 0) & (labels < classes)
    label_logit = _numerics.label_logits(_BLOCK, inputs, jnp.where(inside, labels, 0))
    label_logit = jnp.where(inside, label_logit, 0)
    sums = fall = top = None
    if spread:
        # Weights are numbers a row only where the rows differ.
        zero = jnp.zeros_like(best_rival)
        sums = _spread.spread_sums(_BLOCK, inputs, labels, class_weights, pivot)
        sums = jax.tree.map(lambda total: total + zero, sums)
    if entropy:

        def term(inputs, index, labels, pivot):
            drop = pivot - _numerics.masked(inputs)
            power = jnp.exp(-drop)
            share = power * jnp.where(power == 0, 0, drop)  # 0·inf is never formed
            return jnp.where(index == labels, 0, share)

        index = _numerics.class_index(inputs.logits, _BLOCK)
        fall = sum_classes(term, (inputs, index, labels, pivot), -1)
    if prediction:
        values = _numerics.masked(inputs)
        first = jnp.argmax(values, axis=-1, keepdims=True).astype(jnp.int32)
        top = Top(jnp.max(values, axis=-1, keepdims=True), first)
    return BlockStatistics(best_rival, rivals, label_logit, sums, fall, top)


def relative_to(statistics: BlockStatistics, best_rival: jax.Array) -> BlockStatistics:
    """Returns the statistics with their sums relative to a better rival."""
    own = statistics.best_rival
    factor = jnp.exp(own - _numerics.pivot_of(best_rival))
    rise = jnp.where(own == -jnp.inf, 0, best_rival - own)
    spread, fall = statistics.spread, statistics.fall
    if spread is not None:
        spread = spread._replace(below=spread.below + spread.rivals * rise)
    if fall is not None:
        fall = factor * (fall + statistics.rivals * rise)
    return statistics._replace(
        best_rival=best_rival,
        rivals=factor * statistics.rivals,
        spread=spread,
        fall=fall,
    )


def merged(left: BlockStatistics, right: BlockStatistics) -> BlockStatistics:
    """Returns the statistics of two blocks together, `left` having the lower ids."""
    best_rival = jnp.maximum(left.best_rival, right.best_rival)
    both = relative_to(left, best_rival), relative_to(right, best_rival)
    added = jax.tree.map(jnp.add, *both)
    top = None
    if left.top is not None and right.top is not None:
        higher = right.top.logit > left.top.logit
        top = Top(
            jnp.maximum(left.top.logit, right.top.logit),
            jnp.where(higher, right.top.class_id, left.top.class_id),
        )
    return added._replace(best_rival=best_rival, top=top)


def over_shards(
    statistics: BlockStatistics, first: jax.Array | int, classes: ClassAxis
) -> BlockStatistics:
    """Returns the statistics of all shards' classes from those of each.

    Args:
      statistics: of this shard, in which class ids count from its first class.
      first: the id of that class.
      classes: the class axis.
    """
    if classes.axis_name is None:
        return statistics
    best_rival = classes.largest(statistics.best_rival)
    own = relative_to(statistics, best_rival)
    sums = own.rivals, own.label_logit, own.spread, own.fall
    total = BlockStatistics(best_rival, *classes.total(sums), top=None)
    if statistics.top is None:
        return total
    # No NaN, of which a maximum over devices makes what it likes: neither is finite.
    logit, class_id = statistics.top
    logit = jnp.where(jnp.isnan(logit), jnp.inf, logit)
    largest = classes.largest(logit)
    none = jnp.iinfo(jnp.int32).max
    lowest = -classes.largest(-jnp.where(logit == largest, first + class_id, none))
    return total._replace(top=Top(largest, lowest))


def settled_entropy(
    statistics: LabelStatistics, total: BlockStatistics
) -> jax.Array | None:
    """Returns Σ_j p_j (log-normaliser − x_j), from non-negative terms alone."""
    if total.fall is None:
        return None
    rise = (statistics.largest - statistics.pivot) + statistics.log_mass
    rivals = statistics.rival_scale * total.fall
    rivals = rivals + _numerics.scaled(statistics.rival_mass, rise)
    return rivals + _numerics.scaled(statistics.label_mass, statistics.loss)
