"""The sum of a linear head's losses and its gradients, from TPU kernels.

Rows go by in blocks. Between the two kernels of a block stand a few numbers a row, in
float32: a tile's sums add up to a block's statistics, the sums of all shards of the
classes to a row's, and these settle the slopes that the second kernel takes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax import _numerics, _spread
from xent_jax._block_statistics import BlockStatistics, over_shards
from xent_jax._blocks import varying
from xent_jax._class_axis import ClassAxis
from xent_jax._label_terms import Coefficients, LabelTerms, combined
from xent_jax._numerics import LabelStatistics
from xent_jax._spread import SpreadSums
from xent_jax._tpu_calls import uninitialized
from xent_jax._tpu_kernels import (
    LOWEST,
    Block,
    KernelSum,
    Slopes,
    Tiles,
    backward,
    forward,
)
from xent_jax._tpu_tiling import Tiling


class Head(NamedTuple):
    """The arguments of the sum; `None` stands for an option that is not used."""

    hidden: jax.Array  # bfloat16[N, D], finite in dropped rows
    kernel: jax.Array  # [D, V]; its gradient has its dtype
    labels: jax.Array  # int32[N, 1], −1 where not a class; ids over all shards
    keep: jax.Array | None  # bool[N, 1]
    scale: jax.Array | None  # float32[N, 1], positive
    bias: jax.Array | None  # float32[1, V]
    class_mask: jax.Array | None  # bool[1, V]
    class_weights: jax.Array | None  # float32[1, V]
    coefficients: Coefficients  # [N, 1]


class _Classes(NamedTuple):
    """Numbers a class, made once for all blocks."""

    offset: jax.Array | None  # as of `Block`
    weights: jax.Array | None  # as of `Block`
    kept: jax.Array | None  # bool[V], whether a class counts
    own: jax.Array  # float32[V], its weight, 0 where it does not count
    others: jax.Array  # float32[V'], the weights of the others of its tile
    tiles: jax.Array  # float32[T], the weights of the tiles
    total: jax.Array  # float32[1, 1], of all classes of all shards


class _Memory(NamedTuple):
    """What every block writes to, in place; `None` for what is not there.

    Where there is room, the kernel's gradient leaves over what is kept of the last
    block, tile by tile, so that both take the memory of one.
    """

    kept: jax.Array
    total: jax.Array | None
    result: jax.Array | None


class _Sums(NamedTuple):
    """What the blocks add up to."""

    loss: jax.Array
    hidden_bar: jax.Array
    bias_bar: jax.Array | None


def value_and_gradients(
    tiling: Tiling, head: Head, classes: ClassAxis
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """Returns the sum of the rows' combined terms, and its gradients.

    Args:
      tiling: static.
      head: of N rows.
      classes: the class axis.

    Returns:
      float32[], and the gradients by the features, by the kernel, in their dtypes, and
      by the bias.
    """
    rows = head.hidden.shape[0]
    blocks = -(-rows // tiling.rows)
    dtype = head.kernel.dtype
    # The loss of a row is the same on all shards of the classes.
    rest = _map_rows(lambda array: varying(array, head, classes.names), head)
    head = jax.tree.map(lambda array: varying(array, head), head)
    head = rest._replace(
        hidden=head.hidden,
        kernel=head.kernel,
        bias=head.bias,
        class_mask=head.class_mask,
        class_weights=head.class_weights,
    )
    numbers = _class_numbers(tiling, head, classes)
    memory = _memory(tiling, head, blocks)
    head = _padded(head, blocks * tiling.rows - rows)

    def step(index: jax.Array, carry: tuple[_Sums, _Memory]) -> tuple[_Sums, _Memory]:
        sums, memory = carry
        start = index * tiling.rows
        one = _map_rows(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, tiling.rows), head
        )
        place = jnp.stack([index == 0, index == blocks - 1]).astype(jnp.int32)
        added, memory = _block(tiling, one, numbers, classes, place, memory)
        hidden_bar = jax.lax.dynamic_update_slice_in_dim(
            sums.hidden_bar, added.hidden_bar.astype(head.hidden.dtype), start, 0
        )
        bias_bar = jax.tree.map(jnp.add, sums.bias_bar, added.bias_bar)
        return _Sums(sums.loss + added.loss, hidden_bar, bias_bar), memory

    bias_bar = None if head.bias is None else jnp.zeros_like(numbers.offset)
    sums = _Sums(
        varying(jnp.zeros((), jnp.float32), head, classes.names),
        varying(jnp.zeros_like(head.hidden), head),
        jax.tree.map(lambda array: varying(array, head), bias_bar),
    )
    carry = sums, memory
    sums, memory = jax.lax.fori_loop(0, blocks, step, carry)
    if bias_bar is not None:
        bias_bar = sums.bias_bar[:, : head.kernel.shape[1]]
    kernel_bar = memory.kept if memory.result is None else memory.result
    if dtype == jnp.float32:
        kernel_bar = memory.total
    return sums.loss, (sums.hidden_bar[:rows], kernel_bar, bias_bar)


def _memory(tiling: Tiling, head: Head, blocks: int) -> _Memory:
    """Returns what has not been written to yet."""
    shape, dtype = head.kernel.shape, head.kernel.dtype
    shared = dtype == head.hidden.dtype and tiling.rows <= shape[0]
    kept = shape if shared else (tiling.rows, shape[1])
    total = result = None
    if blocks > 1 or dtype == jnp.float32:
        total = uninitialized(shape, jnp.float32, head.hidden, tiling)
    if dtype != jnp.float32 and not shared:
        result = uninitialized(shape, dtype, head.hidden, tiling)
    return _Memory(
        uninitialized(kept, head.hidden.dtype, head.hidden, tiling), total, result
    )


def _padded(head: Head, missing: int) -> Head:
    """Returns the rows with those that make the blocks whole, which are dropped."""
    head = head._replace(kernel=head.kernel.astype(head.hidden.dtype))
    if not missing:
        return head
    if head.keep is None:
        head = head._replace(keep=jnp.ones(head.labels.shape, jnp.bool_))
    return _map_rows(lambda array: jnp.pad(array, ((0, missing), (0, 0))), head)


def _map_rows(function: Any, head: Head) -> Head:
    """Returns the arguments, a function applied to all that go by rows."""
    names = "hidden", "labels", "keep", "scale", "coefficients"
    rows = {name: getattr(head, name) for name in names}
    return head._replace(**jax.tree.map(function, rows))


def _block(
    tiling: Tiling,
    head: Head,
    numbers: _Classes,
    classes: ClassAxis,
    place: jax.Array,
    memory: _Memory,
) -> tuple[_Sums, _Memory]:
    """Returns what a block of rows adds to the sums."""
    spread = head.coefficients.spread is not None
    count = head.kernel.shape[1]
    first = classes.first(count)
    here = head.labels - first
    here = jnp.where((here >= 0) & (here < count), here, -1)
    scale = head.scale
    if scale is not None and head.keep is not None:
        scale = jnp.where(head.keep, scale, 1)
    weights = numbers.weights if spread else None
    block = Block(head.hidden, head.kernel, here, scale, numbers.offset, weights)

    def in_kernel(array: jax.Array) -> jax.Array:
        # A kernel takes no arrays of which only some vary over a mesh axis.
        return varying(array, head.hidden)

    block = jax.tree.map(in_kernel, block)
    kept, tiles = forward(tiling, block, memory.kept, spread=spread)
    sums = over_shards(block_sums(tiling, tiles, here, numbers), first, classes)
    statistics = _statistics(head, sums)
    losses = combined(_terms(statistics, sums), head.coefficients)
    slopes = jax.tree.map(in_kernel, _slopes(head, here, numbers, statistics, tiles))
    shared = memory.result is None and memory.kept.shape == head.kernel.shape
    result = kept if shared else memory.result
    hidden_bar, bias_bar, (total, result) = backward(
        tiling,
        block,
        kept,
        slopes,
        KernelSum(memory.total, result),
        in_kernel(place),
        bias=head.bias is not None,
    )
    memory = _Memory(*((result, total, None) if shared else (kept, total, result)))
    return _Sums(jnp.sum(_kept(head, losses)), hidden_bar, bias_bar), memory


def _kept(head: Head, values: jax.Array) -> jax.Array:
    """Returns numbers a row, 0 in dropped rows."""
    return values if head.keep is None else jnp.where(head.keep, values, 0)


def block_sums(
    tiling: Tiling, tiles: Tiles, labels: jax.Array, numbers: _Classes
) -> BlockStatistics:
    """Returns the sums of a block of rows over the classes here.

    Args:
      tiling: static.
      tiles: as `forward` returned them.
      labels: int32[R, 1], −1 where the label is not here.
      numbers: of the classes.
    """
    count = numbers.tiles.size
    pivot, rivals, label_logit, below = (
        None if part is None else part[:, :count] for part in tiles
    )
    lowest = jnp.max(pivot, axis=1, keepdims=True)
    rivals = jnp.sum(rivals * jnp.exp(pivot - lowest), axis=1, keepdims=True)
    label_logit = jnp.sum(label_logit, axis=1, keepdims=True)
    best_rival = jnp.where(lowest == LOWEST, -jnp.inf, lowest)
    spread = None
    if below is not None:
        own_tile = jnp.arange(count)[None] == jnp.where(
            labels < 0, -1, labels // tiling.classes
        )
        weights = jnp.where(own_tile, _of_labels(numbers.others, labels), numbers.tiles)
        # Where a tile has no rival that counts its pivot is no logit.
        rise = jnp.where(weights == 0, 0, lowest - pivot)
        spread = SpreadSums(
            jnp.sum(below + weights * rise, axis=1, keepdims=True),
            jnp.sum(weights, axis=1, keepdims=True),
            _of_labels(numbers.own, labels),
        )
    return BlockStatistics(best_rival, rivals, label_logit, spread, None, None)


def _of_labels(numbers: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the number of each row's class, 0 where it is not here, [R, 1]."""
    found = numbers[jnp.maximum(labels, 0)]
    return jnp.where(labels < 0, jnp.zeros_like(found), found)


def _statistics(head: Head, sums: BlockStatistics) -> LabelStatistics:
    """Returns what the sums of all classes come to, NaN for an undefined row."""
    labels = head.labels
    if head.keep is not None:
        labels = jnp.where(head.keep, labels, 0)
    label_logit = _numerics.defined(sums.label_logit, labels)
    return _numerics.settled(sums.best_rival, sums.rivals, label_logit)


def _terms(statistics: LabelStatistics, sums: BlockStatistics) -> LabelTerms:
    spread = None
    if sums.spread is not None:
        spread = _spread.settled(sums.spread, statistics)
    return LabelTerms(statistics.loss, spread, statistics.log_normalizer)


def _slopes(
    head: Head,
    labels: jax.Array,
    numbers: _Classes,
    statistics: LabelStatistics,
    tiles: Tiles,
) -> Slopes:
    """Returns the slopes of the combined terms.

    With p the probabilities, w the class weights and W their sum, it is
    (c + s·W + 2z·log_normalizer)·p_j − s·w_j for a rival, and for the label
    −c·(1 − p_y) + (s·W + 2z·log_normalizer)·p_y − s·w_y.
    """
    loss, spread, square = head.coefficients
    shared = jnp.zeros_like(statistics.loss)
    own = jnp.zeros_like(shared)
    if spread is not None:
        shared = shared + spread * numbers.total
        own = spread * _of_labels(numbers.own, labels)
    if square is not None:
        shared = shared + 2 * square * statistics.log_normalizer
    scale = 1 if head.scale is None else head.scale
    rival = _kept(head, (loss + shared) * statistics.rival_scale * scale)
    label = shared * statistics.label_mass - loss * statistics.rival_mass - own
    label = _kept(head, label * scale)
    if numbers.kept is not None:
        label = jnp.where(_of_labels(numbers.kept, labels), label, 0)
    power = jnp.exp(tiles.pivot - statistics.pivot)
    if spread is not None:
        spread = _kept(head, spread * scale)
    return Slopes(rival * power, label, spread)


def _class_numbers(tiling: Tiling, head: Head, classes: ClassAxis) -> _Classes:
    """Returns the numbers a class that all blocks share."""
    count = head.kernel.shape[1]
    mask, weights = head.class_mask, head.class_weights
    ragged = count % tiling.classes != 0
    offset = head.bias
    if offset is None and (mask is not None or ragged):
        offset = jnp.zeros((1, count), jnp.float32)
    if mask is not None:
        offset = jnp.where(mask, offset, -jnp.inf)
    own = jnp.ones((1, count), jnp.float32) if weights is None else weights
    if mask is not None:
        own = jnp.where(mask, own, 0)
    total = classes.total(jnp.sum(own, axis=1, keepdims=True))
    of_tiles = tiling.class_row(own, 0).reshape(-1, tiling.classes)
    plain = weights is None and mask is None and not ragged
    return _Classes(
        None if offset is None else tiling.class_row(offset, -jnp.inf),
        None if plain else tiling.class_row(own, 0),
        None if mask is None else mask[0],
        own[0],
        _others(of_tiles).reshape(-1),
        jnp.sum(of_tiles, axis=1),
        total,
    )


def _others(weights: jax.Array) -> jax.Array:
    """Returns Σ_{k≠j} w_k along the last axis, by sums alone: nothing cancels."""
    padded = jnp.pad(weights, ((0, 0), (1, 1)))
    before = jnp.cumsum(padded[:, :-2], axis=1)
    after = jnp.cumsum(padded[:, :1:-1], axis=1)[:, ::-1]
    return before + after
