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
from xent_jax._forms.tpu.tile import (
    LogitsOf,
    clear_behind,
    is_label,
    lanes,
    less_uniform,
    logits_of,
    product,
    row_sum,
)
from xent_jax._forms.tpu.tiling import LANES, Tiling

# The pivot of a tile without a rival: finite, so that −inf minus it is −inf.
LOWEST = float(np.finfo(np.float32).min)


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
    results = _forward(tiling, block, kept, uniform)
    return results["kept"], _tiles_of(results)


def tile_sums(tiling: Tiling, block: LogitsOf, *, uniform: bool) -> Tiles:
    """Returns the sums alone, as of `forward`."""
    return _tiles_of(_forward(tiling, block, None, uniform))


def _tiles_of(results: dict[str, jax.Array]) -> Tiles:
    return Tiles(
        results["pivot"],
        results["rivals"],
        results["label_logit"],
        results.get("distance"),
    )


def _forward(
    tiling: Tiling, block: LogitsOf, kept: jax.Array | None, uniform: bool
) -> dict[str, jax.Array]:
    """Returns the outputs by name, as of `forward`; `kept` only where one is given."""
    inputs, scratch = _block_operands(tiling, block), {}
    classes = tiling.sizes(block.kernel)[1]
    shape = tiling.rows, -(-tiling.tiles(classes) // LANES) * LANES
    numbers = Operand(jax.ShapeDtypeStruct(shape, jnp.float32), column_at(tiling))
    outputs = {"pivot": numbers, "rivals": numbers, "label_logit": numbers}
    aliases, of_kernel = {}, block.kernel.dtype.itemsize
    if uniform:
        outputs["distance"] = numbers
    if kept is not None:
        inputs["kept_before"] = Operand(kept, IN_MAIN_MEMORY)
        outputs["kept"] = Operand(kept, tile_at((tiling.rows, tiling.classes)))
        aliases["kept_before"] = "kept"
    if block.kernel.dtype != block.hidden.dtype:
        shape = tiling.kernel_tile(block.hidden.shape[1])
        scratch["narrow"] = pltpu.VMEM(shape, block.hidden.dtype)
    return call(
        functools.partial(_forward_kernel, tiling, classes),
        tiling,
        varying(jnp.zeros(2, jnp.int32), block.hidden),
        (inputs, outputs, scratch),
        aliases,
        _cost(tiling, block, matmuls=1, of_kernel=of_kernel, of_kept=kept is not None),
        "xent_forward",
    )


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
    tiling: Tiling,
    block: LogitsOf,
    matmuls: int,
    of_kernel: int,
    *,
    of_kept: bool = True,
) -> pl.CostEstimate:
    """Returns the cost of so many matmuls that move so many bytes a number of them."""
    features, classes = tiling.sizes(block.kernel)
    moved = (of_kernel * features + 2 * of_kept * tiling.rows) * classes
    return pl.CostEstimate(
        flops=2 * matmuls * tiling.rows * features * classes,
        transcendentals=tiling.rows * classes if matmuls == 1 else 0,
        bytes_accessed=moved,
    )


def _forward_kernel(tiling: Tiling, classes: int, refs: Any) -> None:
    """Makes the logits of a tile, and all that is kept of them."""
    tile = pl.program_id(0)
    clear_behind(classes, refs.kernel, 1 - tiling.by_class)
    kernel = refs.kernel
    if refs.narrow is not None:
        kernel = refs.narrow
        kernel[...] = refs.kernel[...].astype(kernel.dtype)
    for start in range(0, tiling.rows, tiling.row_chunk):
        rows = pl.ds(start, tiling.row_chunk)
        logits = logits_of(tiling, refs, kernel, rows)
        hit = is_label(tiling, refs, rows, tile)
        rivals = jnp.where(hit, -jnp.inf, logits)
        pivot = jnp.maximum(jnp.max(rivals, axis=1, keepdims=True), LOWEST)
        power = jnp.exp(rivals - pivot)
        if refs.kept is not None:
            refs.kept[rows, :] = power.astype(refs.kept.dtype)
        numbers = {
            "pivot": pivot,
            "rivals": row_sum(power),
            "label_logit": row_sum(jnp.where(hit, logits, 0)),
        }
        if refs.distance is not None:
            distance, absent = pivot - rivals, hit
            if refs.weights is not None:
                # A weight of 0 drops an infinite difference.
                absent = hit | (refs.weights[...] == 0)
            distance = jnp.where(absent, 0, distance)
            if refs.weights is not None:
                distance = distance * refs.weights[...]
            numbers["distance"] = row_sum(distance)
        _put(refs, numbers, rows, tile)


def _backward_kernel(tiling: Tiling, classes: int, refs: Any) -> None:
    """Makes the gradient of a tile of logits, and what it adds to all others."""
    tile = pl.program_id(0)
    clear_behind(classes, refs.kernel)
    clear_behind(classes, refs.kept)
    here = lanes((tiling.row_chunk, LANES)) == tile % LANES
    bias = 0
    for start in range(0, tiling.rows, tiling.row_chunk):
        rows = pl.ds(start, tiling.row_chunk)
        factor = row_sum(jnp.where(here, refs.factor[rows, :], 0))
        slope = refs.kept[rows, :].astype(jnp.float32) * factor
        if refs.uniform is not None:
            slope = less_uniform(refs, refs.uniform[rows, :], slope)
        slope = jnp.where(
            is_label(tiling, refs, rows, tile), refs.label[rows, :], slope
        )
        if refs.bias_bar is not None:
            bias = bias + jnp.sum(slope, axis=0, keepdims=True)
        slope = slope.astype(refs.gradient.dtype)
        refs.gradient[rows, :] = slope
        before = jnp.where(tile == 0, 0, refs.hidden_bar[rows, :])
        refs.hidden_bar[rows, :] = before + product(slope, refs.kernel[...], (1, 1))
    if refs.bias_bar is not None:
        refs.bias_bar[...] = bias
    total = product(refs.hidden[...], refs.gradient[...], (0, 0))
    if refs.total_before is not None:
        total = total + jnp.where(refs.place[0] == 1, 0, refs.total_before[...])
        refs.total[...] = total
    if refs.result is not None:
        refs.result[...] = total.astype(refs.result.dtype)


def _put(refs: Any, numbers: dict[str, jax.Array], rows: Any, tile: jax.Array) -> None:
    """Sets a tile's numbers a row, which are one lane of what is in vector memory."""
    for name, number in numbers.items():
        ref = getattr(refs, name)
        here = lanes((number.shape[0], LANES)) == tile % LANES
        ref[rows, :] = jnp.where(here, number, ref[rows, :])


def _block_operands(tiling: Tiling, block: LogitsOf) -> dict[str, Operand]:
    """Returns the operands of both kernels."""
    tile = 1, tiling.classes
    shape = tiling.kernel_tile(block.hidden.shape[1])
    of_kernel = tile_at(shape, axis=1 - tiling.by_class)
    operands = {
        "hidden": whole(block.hidden),
        "kernel": Operand(block.kernel, of_kernel),
        "labels": whole(block.labels),
    }
    if block.offset is not None:
        operands["offset"] = Operand(block.offset, tile_at(tile))
    if block.weights is not None:
        operands["weights"] = Operand(block.weights, tile_at(tile))
    return operands
