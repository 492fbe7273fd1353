"""A block of rows of the linear head in two TPU kernels, without its logits in memory.

`forward` makes the logits of a tile of classes in vector memory and keeps
exp(x − pivot) of them, in the features' dtype, and a few sums a row; `backward` makes
the gradient of a tile once and multiplies it by the kernel and by the features. With
the numbers a row between them that is the loss and its gradient in three matmuls, in
which nothing of the size of the logits is read or written in float32.

A tile has its own pivot a row, the best of its rivals, which are its classes without
the row's label. The label is in no maximum and in no sum, and its gradient is a number
that the caller has: nothing here subtracts two numbers that are nearly equal.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xent_jax._forms.loops import varying
from xent_jax._forms.tpu.calls import (
    IN_MAIN_MEMORY,
    Operand,
    call,
    column_at,
    tile_at,
    whole,
)
from xent_jax._forms.tpu.tiling import LANES, Tiling

# The pivot of a tile without a rival: finite, so that −inf minus it is −inf.
LOWEST = float(np.finfo(np.float32).min)


class LogitsOf(NamedTuple):
    """What makes the logits of R rows; `None` where not used.

        x[n, j] = hidden[n]·kernel[:, j] + offset[j]

    Where V is no whole number of tiles, `offset` is asked for, and −inf behind V; and
    for uniform targets `weights`, which are 0 there.
    """

    hidden: jax.Array  # bfloat16[R, D]
    kernel: jax.Array  # bfloat16[D, V]
    labels: jax.Array  # int32[R, 1], −1 where the label is no class here
    offset: jax.Array | None = None  # float32[1, V'], −inf for a dropped class
    weights: jax.Array | None = None  # float32[1, V'], 0 for a dropped class


class Tiles(NamedTuple):
    """Numbers a row and tile, float32[R, T'], of which the first T columns are set."""

    pivot: jax.Array  # the best rival, at least `LOWEST`
    rivals: jax.Array  # Σ_{j≠y} exp(x_j − pivot)
    label_logit: jax.Array  # 0 in the tiles without the label
    distance: jax.Array | None  # Σ_{j≠y} w_j (pivot − x_j)


class RowSlopes(NamedTuple):
    """What the gradient by the logits of a row is made of.

    It is factor·kept − uniform·w_j for a rival j, and `label` for the label.
    """

    factor: jax.Array  # float32[R, T']
    label: jax.Array  # float32[R, 1]
    uniform: jax.Array | None  # float32[R, 1]


class KernelSum(NamedTuple):
    """Where the kernel's gradient is added up, and where it leaves; both in place."""

    total: jax.Array | None  # float32[D, V]; `None` for a sum over one block
    result: jax.Array | None  # [≥ D, V], in its dtype; `None` where float32 leaves


def forward(
    tiling: Tiling, block: LogitsOf, kept: jax.Array, *, uniform: bool
) -> tuple[jax.Array, Tiles]:
    """Returns exp(x − pivot) of the tiles' pivots, and the tiles' sums.

    Args:
      tiling: static.
      block: of R rows.
      kept: bfloat16[≥ R, V], of which the first R rows are written over, in place.
      uniform: whether the sums for uniform targets are wanted.
    """
    inputs = _block_operands(tiling, block)
    inputs["kept_before"] = Operand(kept, IN_MAIN_MEMORY)
    tiles = tiling.tiles(block.kernel.shape[1])
    shape = tiling.rows, -(-tiles // LANES) * LANES
    numbers = Operand(jax.ShapeDtypeStruct(shape, jnp.float32), column_at(tiling))
    outputs = {
        "kept": Operand(kept, tile_at((tiling.rows, tiling.classes))),
        "pivot": numbers,
        "rivals": numbers,
        "label_logit": numbers,
    }
    if uniform:
        outputs["distance"] = numbers
    results = call(
        functools.partial(_forward_kernel, tiling, block.kernel.shape[1]),
        tiling,
        varying(jnp.zeros(2, jnp.int32), block.hidden),
        (inputs, outputs, {}),
        {"kept_before": "kept"},
        _cost(tiling, block, matmuls=1, of_kernel=2),
        "xent_forward",
    )
    tiles = Tiles(
        results["pivot"],
        results["rivals"],
        results["label_logit"],
        results.get("distance"),
    )
    return results["kept"], tiles


def backward(
    tiling: Tiling,
    block: LogitsOf,
    kept: jax.Array,
    slopes: RowSlopes,
    kernel_sum: KernelSum,
    place: jax.Array,
    *,
    bias: bool,
) -> tuple[jax.Array, jax.Array | None, KernelSum]:
    """Returns a block's gradients by its features and its bias, and adds the kernel's.

    Args:
      tiling: static.
      block: as of `forward`.
      kept: as `forward` returned it.
      slopes: of the rows.
      kernel_sum: the sum over the blocks before. Its `result` may be `kept` itself.
      place: int32[2]: whether this is the first block, when nothing is read of `total`;
        whether it is the last, when `result` is set, and `total` is not.
      bias: whether the gradient by the bias is wanted.

    Returns:
      float32[R, D]; float32[1, V'] or `None`; and the sum with this block.
    """
    features, classes = block.kernel.shape
    tile = features, tiling.classes
    inputs = _block_operands(tiling, block)
    inputs["kept"] = Operand(kept, tile_at((tiling.rows, tiling.classes)))
    inputs["factor"] = Operand(slopes.factor, column_at(tiling))
    inputs["label"] = whole(slopes.label)
    if slopes.uniform is not None:
        inputs["uniform"] = whole(slopes.uniform)
    shape = jax.ShapeDtypeStruct((tiling.rows, features), jnp.float32)
    outputs, aliases = {"hidden_bar": whole(shape)}, {}
    if bias:
        count = tiling.tiles(classes) * tiling.classes
        shape = jax.ShapeDtypeStruct((1, count), jnp.float32)
        outputs["bias_bar"] = Operand(shape, tile_at((1, tiling.classes)))
    total, result = kernel_sum
    if total is not None:
        inputs["total_before"] = Operand(total, tile_at(tile, "not first"))
        when = "always" if result is None else "not last"
        outputs["total"] = Operand(total, tile_at(tile, when))
        aliases["total_before"] = "total"
    if result is not None:
        when = "always" if total is None else "last"
        outputs["result"] = Operand(result, tile_at(tile, when))
        if result is not kept:
            inputs["result_before"] = Operand(result, IN_MAIN_MEMORY)
        aliases["kept" if result is kept else "result_before"] = "result"
    scratch = {"gradient": pltpu.VMEM((tiling.rows, tiling.classes), kept.dtype)}
    results = call(
        functools.partial(_backward_kernel, tiling, classes),
        tiling,
        place,
        (inputs, outputs, scratch),
        aliases,
        _cost(tiling, block, matmuls=2, of_kernel=10),
        "xent_backward",
    )
    kernel_sum = KernelSum(results.get("total"), results.get("result"))
    return results["hidden_bar"], results.get("bias_bar"), kernel_sum


def _cost(
    tiling: Tiling, block: LogitsOf, matmuls: int, of_kernel: int
) -> pl.CostEstimate:
    """Returns the cost of so many matmuls that move so many bytes a number of them."""
    features, classes = block.kernel.shape
    moved = (of_kernel * features + 2 * tiling.rows) * classes
    return pl.CostEstimate(
        flops=2 * matmuls * tiling.rows * features * classes,
        transcendentals=tiling.rows * classes if matmuls == 1 else 0,
        bytes_accessed=moved,
    )


def _forward_kernel(tiling: Tiling, classes: int, refs: Any) -> None:
    """Makes the logits of a tile, and all that is kept of them."""
    tile = pl.program_id(0)
    _clear_behind(classes, refs.kernel)
    for start in range(0, tiling.rows, tiling.row_chunk):
        rows = pl.ds(start, tiling.row_chunk)
        logits = _product(refs.hidden[rows, :], refs.kernel[...], (1, 0))
        if refs.offset is not None:
            logits = logits + refs.offset[...]
        hit = _hit(tiling, refs, rows, tile)
        rivals = jnp.where(hit, -jnp.inf, logits)
        pivot = jnp.maximum(jnp.max(rivals, axis=1, keepdims=True), LOWEST)
        power = jnp.exp(rivals - pivot)
        refs.kept[rows, :] = power.astype(refs.kept.dtype)
        numbers = {
            "pivot": pivot,
            "rivals": _row_sum(power),
            "label_logit": _row_sum(jnp.where(hit, logits, 0)),
        }
        if refs.distance is not None:
            distance, absent = pivot - rivals, hit
            if refs.weights is not None:
                # A weight of 0 drops an infinite difference.
                absent = hit | (refs.weights[...] == 0)
            distance = jnp.where(absent, 0, distance)
            if refs.weights is not None:
                distance = distance * refs.weights[...]
            numbers["distance"] = _row_sum(distance)
        _put(refs, numbers, rows, tile)


def _backward_kernel(tiling: Tiling, classes: int, refs: Any) -> None:
    """Makes the gradient of a tile of logits, and what it adds to all others."""
    tile = pl.program_id(0)
    _clear_behind(classes, refs.kernel)
    _clear_behind(classes, refs.kept)
    here = _lanes((tiling.row_chunk, LANES)) == tile % LANES
    bias = 0
    for start in range(0, tiling.rows, tiling.row_chunk):
        rows = pl.ds(start, tiling.row_chunk)
        factor = _row_sum(jnp.where(here, refs.factor[rows, :], 0))
        slope = refs.kept[rows, :].astype(jnp.float32) * factor
        if refs.uniform is not None and refs.weights is not None:
            slope = slope - refs.uniform[rows, :] * refs.weights[...]
        elif refs.uniform is not None:
            slope = slope - refs.uniform[rows, :]
        slope = jnp.where(_hit(tiling, refs, rows, tile), refs.label[rows, :], slope)
        if refs.bias_bar is not None:
            bias = bias + jnp.sum(slope, axis=0, keepdims=True)
        slope = slope.astype(refs.gradient.dtype)
        refs.gradient[rows, :] = slope
        before = jnp.where(tile == 0, 0, refs.hidden_bar[rows, :])
        refs.hidden_bar[rows, :] = before + _product(slope, refs.kernel[...], (1, 1))
    if refs.bias_bar is not None:
        refs.bias_bar[...] = bias
    total = _product(refs.hidden[...], refs.gradient[...], (0, 0))
    if refs.total_before is not None:
        total = total + jnp.where(refs.place[0] == 1, 0, refs.total_before[...])
        refs.total[...] = total
    if refs.result is not None:
        refs.result[...] = total.astype(refs.result.dtype)


def _product(
    left: jax.Array, right: jax.Array, contracted: tuple[int, int]
) -> jax.Array:
    """Returns a product of half-precision matrices in float32."""
    return jax.lax.dot_general(
        left,
        right,
        ((contracted[:1], contracted[1:]), ((), ())),
        # Products of half-precision numbers are exact, whatever the caller's default.
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _row_sum(terms: jax.Array) -> jax.Array:
    return jnp.sum(terms, axis=1, keepdims=True)


def _lanes(shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _hit(tiling: Tiling, refs: Any, rows: Any, tile: jax.Array) -> jax.Array:
    """Returns which class of a tile is the label of its row."""
    labels = refs.labels[rows, :] - tile * tiling.classes
    return _lanes((tiling.row_chunk, tiling.classes)) == labels


def _put(refs: Any, numbers: dict[str, jax.Array], rows: Any, tile: jax.Array) -> None:
    """Sets a tile's numbers a row, which are one lane of what is in vector memory."""
    for name, number in numbers.items():
        ref = getattr(refs, name)
        here = _lanes((number.shape[0], LANES)) == tile % LANES
        ref[rows, :] = jnp.where(here, number, ref[rows, :])


def _clear_behind(classes: int, ref: Any) -> None:
    """Sets what lies behind the last class to 0, in the last tile.

    It is not read from main memory, so that anything may stand there, and a product
    adds it up, if only with factors of 0.
    """
    count = ref.shape[1]
    inside = classes % count
    if inside == 0:
        return

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _() -> None:
        whole = inside // LANES * LANES
        if inside > whole:
            # In float32, because not every chip selects half-precision numbers.
            last = ref[:, whole : whole + LANES].astype(jnp.float32)
            last = jnp.where(_lanes(last.shape) < inside - whole, last, 0)
            ref[:, whole : whole + LANES] = last.astype(ref.dtype)
            whole += LANES
        if whole < count:
            shape = ref.shape[0], count - whole
            ref[:, whole:] = jnp.zeros(shape, ref.dtype)


def _block_operands(tiling: Tiling, block: LogitsOf) -> dict[str, Operand]:
    """Returns the operands of both kernels."""
    tile = 1, tiling.classes
    operands = {
        "hidden": whole(block.hidden),
        "kernel": Operand(block.kernel, tile_at((block.hidden.shape[1], tile[1]))),
        "labels": whole(block.labels),
    }
    if block.offset is not None:
        operands["offset"] = Operand(block.offset, tile_at(tile))
    if block.weights is not None:
        operands["weights"] = Operand(block.weights, tile_at(tile))
    return operands
