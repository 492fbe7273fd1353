"""Sums of a block of logits over the rivals of a label, and how blocks' sums add up.

The sums of a block are relative to its own best rival. Two blocks are added after both
are made relative to the better one, so that nothing overflows and no term is negative.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.classes import SPLIT_SUM, SUM, max_classes, reduce_classes
from xent_jax._reductions.lowering import (
    CPU,
    Place,
    by_place,
    is_sharded,
    on_one_device,
)
from xent_jax._reductions.one_pass import sums_relative_to_maximum
from xent_jax._targets.block import Block, block_at, values_of, zero_where_dropped
from xent_jax._targets.label_row import pivot_of

_TPU_7X = "TPU7x"
# Up to so many classes a row are found by a comparison each.
_MOST_MASKS, _MOST_MASKS_OF_ACCELERATORS = 16, 64


class Others(NamedTuple):
    """Labels beside the one that is left out, K a row along the class axis."""

    ids: jax.Array  # int32
    same: jax.Array  # bool, which of them is that label
    known: jax.Array  # bool, which of them is a class


class Labels(NamedTuple):
    """Class ids of rows: int32, which count over all blocks and shards.

    −1 is no class.
    """

    own: jax.Array  # of size 1 along the class axis: the label that is left out
    others: Others | None = None

    @classmethod
    def of(cls, own: jax.Array, others: jax.Array) -> "Labels":
        """Returns a label and others beside it."""
        return cls(own, Others(others, others == own, others >= 0))

    def counted_from(self, lowest: jax.Array | int) -> "Labels":
        """Returns the labels, of which a lower one is not counted in a block."""
        own, others = jnp.where(self.own >= lowest, self.own, -1), self.others
        if others is not None:
            ids = jnp.where(others.ids >= lowest, others.ids, -1)
            others = others._replace(ids=ids)
        return Labels(own, others)


class UniformSums(NamedTuple):
    """What the loss of uniform targets, weighted by class, is made of."""

    distance: jax.Array  # Σ_{j≠y} w_j (pivot − x_j)
    rivals: jax.Array  # Σ_{j≠y} w_j over the kept classes
    label: jax.Array  # w_y, 0 where its class is dropped


class Largest(NamedTuple):
    """The largest logit, the label's included."""

    logit: jax.Array
    class_id: jax.Array  # int32, the lowest of equally large ones


class Sums(NamedTuple):
    """Per row, of size 1 along the class axis; `None` where not wanted."""

    best_rival: jax.Array  # −inf where there is none; the pivot of the other sums
    rivals: jax.Array  # Σ_{j≠y} exp(x_j − pivot)
    label_logit: jax.Array  # 0 where the label is in another block
    other_logits: jax.Array | None  # K a row, likewise
    uniform: UniformSums | None
    label_weight: jax.Array | None  # w_y, also where the label's class is dropped
    distance: jax.Array | None  # Σ_{j≠y} exp(x_j − pivot) (pivot − x_j)
    largest: Largest | None


class WantedSums(NamedTuple):
    """Which sums are wanted beside those of every loss; static."""

    uniform: bool = False
    label_weight: bool = False
    entropy: bool = False
    prediction: bool = False
    reused: bool = False  # whether several fusions use the sums


def sums_of(wanted: WantedSums, axis: int, block: Block, target: Labels) -> Sums:
    """Returns the sums over one block of classes."""
    labels, others = target
    best_rival, rivals, label_logit = _of_rivals(wanted, axis, block, labels)
    pivot = pivot_of(best_rival)
    label_weight = None
    if wanted.label_weight and block.class_weights is not None:
        label_weight = values_at(axis, block, block.class_weights, labels)
    operands = block, labels, pivot
    return Sums(
        best_rival,
        rivals,
        label_logit,
        None if others is None else logits_at(axis, block, others.ids),
        _uniform_sums(axis, block, labels, pivot) if wanted.uniform else None,
        label_weight,
        reduce_classes(SUM, _distance, operands, axis) if wanted.entropy else None,
        _largest(axis, block) if wanted.prediction else None,
    )


def _of_rivals(
    wanted: WantedSums, axis: int, block: Block, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the best rival, the sum relative to it, and the label's logit.

    On a GPU in one pass, unless other sums that are relative to it need a second one.
    """

    def in_two_passes(block: Block, labels: jax.Array) -> tuple[jax.Array, ...]:
        best_rival = max_classes(_rival, (block, labels), axis)
        label_logit = logits_at(axis, block, labels)
        best_rival, label_logit = _together(axis, best_rival, label_logit)
        split_sum = SPLIT_SUM._replace(reused=wanted.reused)
        operands = block, labels, pivot_of(best_rival)
        rivals = reduce_classes(split_sum, _power, operands, axis)
        return best_rival, rivals, label_logit

    def in_one_pass(block: Block, labels: jax.Array) -> tuple[jax.Array, ...]:
        return sums_relative_to_maximum(*_rival_and_label(block, labels), axis)

    def at(place: Place) -> Callable[..., Any] | None:
        alone = not (wanted.uniform or wanted.entropy)
        return in_one_pass if alone and place.chip is None and place.whole else None

    return by_place(in_two_passes, at)(block, labels)


def _together(axis: int, *reductions: jax.Array) -> tuple[jax.Array, ...]:
    """Returns reductions over the classes, which a TPU makes in one pass.

    Else it would make that of the label's logit in the next pass, with exponentials.
    The pass of a maximum has less to compute than the memory leaves time for, except on
    a 7x, where both passes have more.
    """

    def together(*reductions: jax.Array) -> tuple[jax.Array, ...]:
        # Without the class axis, with which numbers a row are laid out badly.
        rows = [jnp.squeeze(numbers, axis) for numbers in reductions]
        rows = jax.lax.optimization_barrier(rows)
        return tuple(jnp.expand_dims(numbers, axis) for numbers in rows)

    def at(place: Place) -> Callable[..., Any] | None:
        return None if place.chip in (None, CPU, _TPU_7X) else together

    return by_place(lambda *reductions: reductions, at)(*reductions)


def merged(left: Sums, right: Sums) -> Sums:
    """Returns the sums of two blocks together, `left` having the lower ids."""
    best_rival = jnp.maximum(left.best_rival, right.best_rival)
    both = relative_to(best_rival, left), relative_to(best_rival, right)
    added = jax.tree.map(jnp.add, *both)
    largest = None
    if left.largest is not None and right.largest is not None:
        higher = right.largest.logit > left.largest.logit
        largest = Largest(
            jnp.maximum(left.largest.logit, right.largest.logit),
            jnp.where(higher, right.largest.class_id, left.largest.class_id),
        )
    return added._replace(best_rival=best_rival, largest=largest)


def _rival(block: Block, labels: jax.Array) -> jax.Array:
    return jnp.where(block.class_ids == labels, -jnp.inf, values_of(block))


def _rival_and_label(block: Block, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the logits of the rivals, −inf elsewhere, and the label's, 0 elsewhere.

    Not by masked `values_of`, which XLA:GPU would write to memory for the gradient.
    """
    values, hit = values_of(block._replace(keep_class=None)), block.class_ids == labels
    rival, own = jnp.where(hit, -jnp.inf, values), jnp.where(hit, values, 0)
    if block.keep_class is None:
        return rival, own
    keep = block.keep_class
    if block.keep_row is not None:
        keep = keep | ~block.keep_row
    dropped_label = jnp.where(hit, -jnp.inf, jnp.zeros_like(values))
    return jnp.where(keep, rival, -jnp.inf), jnp.where(keep, own, dropped_label)


def _power(block: Block, labels: jax.Array, pivot: jax.Array) -> jax.Array:
    power = jnp.exp(values_of(block) - pivot)
    return jnp.where(block.class_ids == labels, 0, power)


def _distance(block: Block, labels: jax.Array, pivot: jax.Array) -> jax.Array:
    below = pivot - values_of(block)
    share = jnp.exp(-below)
    share = share * jnp.where(share == 0, 0, below)  # 0·inf is never formed
    return jnp.where(block.class_ids == labels, 0, share)


def logits_at(axis: int, block: Block, ids: jax.Array) -> jax.Array:
    """Returns the logits of some classes a row, 0 for one of another block.

    Sums over masks, which share a pass over the logits with the other reductions,
    except on a CPU, where a gather saves that pass.
    """

    def by_mask(block: Block, ids: jax.Array) -> jax.Array:
        return picked(axis, block.class_ids, values_of(block), ids)

    def by_gather(block: Block, ids: jax.Array) -> jax.Array:
        here, places = _places(block.class_ids, ids)
        found = block_at(axis, block, places)
        return jnp.where(places == here, values_of(found), 0)

    return on_one_device(by_mask, by_gather)(block, ids)


def picked(
    axis: int, class_ids: jax.Array, values: jax.Array, ids: jax.Array
) -> jax.Array:
    """Returns the values of some classes a row, 0 for one of another block.

    Linear in the values. What the masks transpose to spreads numbers over a block, in
    one fusion with what they are added to; that of a gather is a scatter, which writes
    the block once more.
    """
    count = ids.shape[axis]
    if count > _MOST_MASKS and not is_sharded(values):
        return _gathered(axis, class_ids, values, ids)
    sums = [
        jnp.sum(jnp.where(class_ids == one, values, 0), axis=axis, keepdims=True)
        for one in _each(axis, ids)
    ]
    return sums[0] if count == 1 else jnp.concatenate(sums, axis)


def less_at(
    axis: int,
    class_ids: jax.Array,
    values: jax.Array,
    ids: jax.Array,
    numbers: jax.Array,
) -> jax.Array:
    """Returns the values of a block, less a number at each of some classes a row.

    By masks, in one fusion with what the values are made of; for many classes by a
    scatter, which on a TPU is slow, so that it takes more of them there.
    """

    def by_mask(
        values: jax.Array, ids: jax.Array, numbers: jax.Array, class_ids: jax.Array
    ) -> jax.Array:
        for one, number in zip(_each(axis, ids), _each(axis, numbers), strict=True):
            values = values - jnp.where(class_ids == one, number, 0)
        return values

    def by_scatter(
        values: jax.Array, ids: jax.Array, numbers: jax.Array, class_ids: jax.Array
    ) -> jax.Array:
        gather = functools.partial(_gathered, axis, class_ids, ids=ids)
        found, spread = jax.vjp(lambda values: gather(values=values), values)
        # They vary over a mesh as the values do.
        return values - spread(jnp.where(found == found, numbers, numbers))[0]

    count = ids.shape[axis]
    if count <= _MOST_MASKS:
        return by_mask(values, ids, numbers, class_ids)
    if count > _MOST_MASKS_OF_ACCELERATORS:
        return by_scatter(values, ids, numbers, class_ids)
    return on_one_device(by_mask, by_scatter)(values, ids, numbers, class_ids)


def _each(axis: int, array: jax.Array) -> list[jax.Array]:
    """Returns the K parts of an array, of size 1 along the axis."""
    count = array.shape[axis]
    return [array] if count == 1 else jnp.split(array, count, axis)


def _gathered(
    axis: int, class_ids: jax.Array, values: jax.Array, ids: jax.Array
) -> jax.Array:
    here, places = _places(class_ids, ids)
    found = jnp.take_along_axis(values, places, axis)
    return jnp.where(places == here, found, 0)


def values_at(axis: int, block: Block, values: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns numbers of some classes a row, 0 for one of another block.

    Args:
      axis: of the classes.
      block: which classes they are.
      values: a number a class, of every row or of all rows.
      ids: of classes.
    """

    def by_mask(values: jax.Array, class_ids: jax.Array, ids: jax.Array) -> jax.Array:
        return picked(axis, class_ids, values, ids)

    def by_gather(values: jax.Array, class_ids: jax.Array, ids: jax.Array) -> jax.Array:
        if values.size != values.shape[axis]:
            return _gathered(axis, class_ids, values, ids)
        here, places = _places(class_ids, ids)
        return jnp.where(places == here, values.reshape(-1)[places], 0)

    return on_one_device(by_mask, by_gather)(values, block.class_ids, ids)


def _places(class_ids: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where labels are among consecutive ids, and the same kept inside them."""
    here = labels - class_ids.reshape(-1)[0]
    return here, jnp.clip(here, 0, class_ids.size - 1)


def _uniform_sums(
    axis: int, block: Block, labels: jax.Array, pivot: jax.Array
) -> UniformSums:
    def terms(block: Block, labels: jax.Array, pivot: jax.Array) -> UniformSums:
        below, weights = pivot - values_of(block), block.class_weights
        if weights is not None:
            # A weight of 0 drops an infinite difference.
            below = weights * jnp.where(weights == 0, 0, below)
        else:
            weights = jnp.ones_like(below)
        hit = block.class_ids == labels
        rivals = jnp.where(hit, 0, weights)
        label = jnp.where(hit, weights, 0)
        below = zero_where_dropped(jnp.where(hit, 0, below), block)
        if block.keep_class is not None:
            rivals, label = (
                jnp.where(block.keep_class, part, 0) for part in (rivals, label)
            )
        return UniformSums(below, rivals, label)

    return reduce_classes(SUM, terms, (block, labels, pivot), axis)


def _largest(axis: int, block: Block) -> Largest:
    values = values_of(block)
    first = jnp.argmax(values, axis=axis, keepdims=True).astype(jnp.int32)
    first = first + jax.lax.index_in_dim(block.class_ids, 0, axis)
    return Largest(jnp.max(values, axis=axis, keepdims=True), first)


def relative_to(best_rival: jax.Array, sums: Sums) -> Sums:
    """Returns the sums relative to a better rival."""
    own = sums.best_rival
    factor = jnp.exp(own - pivot_of(best_rival))
    rise = jnp.where(own == -jnp.inf, 0, best_rival - own)
    uniform, distance = sums.uniform, sums.distance
    if uniform is not None:
        uniform = uniform._replace(distance=uniform.distance + uniform.rivals * rise)
    if distance is not None:
        distance = factor * (distance + sums.rivals * rise)
    return sums._replace(
        best_rival=best_rival,
        rivals=factor * sums.rivals,
        uniform=uniform,
        distance=distance,
    )
