"""The gradients of all rows of a linear head in one TPU kernel, by tiles of classes.

The logits of a tile and a block of rows are made again in vector memory, and of them
their slopes, which are multiplied by the kernel and by the features. Blocks of rows are
the inner loop: the kernel's gradient of a tile adds up in vector memory and is written
once, in its own dtype. That of the features adds up in main memory, where every tile
reads and writes it, so that a tile has many classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xent_jax._forms.tpu.calls import (
    IN_MAIN_MEMORY,
    Operand,
    References,
    shape_like,
)
from xent_jax._forms.tpu.tile import (
    LogitsOf,
    clear_behind,
    is_label,
    less_uniform,
    logits_of,
    product,
)
from xent_jax._forms.tpu.tiling import LANES, Tiling

# Of 32 bits where Python's would be of 64, with `jax_enable_x64`.
_ZERO, _ONE, _TWO = np.int32(0), np.int32(1), np.int32(2)


class Wanted(NamedTuple):
    """Which gradients are; static."""

    hidden: bool
    kernel: bool
    bias: bool


class Slopes(NamedTuple):
    """What the gradient by the logits of N rows is made of, float32[N, 1].

    It is factor·exp(x_j − pivot) − uniform·w_j for a rival j, `label` for the label.
    """

    pivot: jax.Array
    factor: jax.Array
    label: jax.Array
    uniform: jax.Array | None


class Bars(NamedTuple):
    """The gradients; `None` for one that is not wanted."""

    hidden: Any  # float32[N, D]
    kernel: Any  # [D, V], in the kernel's dtype
    bias: Any  # float32[1, V']


def gradients(tiling: Tiling, wanted: Wanted, head: LogitsOf, slopes: Slopes) -> Bars:
    """Returns the gradients of Σ slope·logit.

    Args:
      tiling: static; its blocks are whole.
      wanted: static; `hidden` or `kernel` is.
      head: of N rows.
      slopes: of the rows.
    """
    inputs = _inputs(tiling, head, slopes)
    outputs, scratch = _outputs(tiling, wanted, head)
    names = [*inputs, *outputs, *scratch]
    grid = _grid(tiling, head)

    def kernel(*refs: Any) -> None:
        named = References(dict(zip(names, refs, strict=True)))
        _kernel(tiling, grid, tiling.sizes(head.kernel)[1], named)

    results = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[operand.spec for operand in inputs.values()],
        out_specs=[operand.spec for operand in outputs.values()],
        out_shape=[shape_like(o.array, head.hidden) for o in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=tiling.memory,
        ),
        cost_estimate=_cost(tiling, wanted, head),
        interpret=tiling.interpret,
        name="xent_rows_backward",
    )(*(operand.array for operand in inputs.values()))
    found = dict(zip(outputs, results, strict=True))
    return Bars(*(found.get(f"{name}_bar") for name in Bars._fields))


def _grid(tiling: Tiling, head: LogitsOf) -> tuple[int, int]:
    """Returns the number of tiles and of blocks of rows."""
    tiles = tiling.tiles(tiling.sizes(head.kernel)[1])
    return tiles, head.hidden.shape[0] // tiling.rows


def _of_rows(tiling: Tiling, array: Any) -> Operand:
    shape = tiling.rows, array.shape[1]
    return Operand(array, pl.BlockSpec(shape, lambda j, i: (i, _ZERO)))


def _of_classes(tiling: Tiling, array: Any) -> Operand:
    shape = array.shape[0], tiling.classes
    return Operand(array, pl.BlockSpec(shape, lambda j, i: (_ZERO, j)))


def _kernel_operand(tiling: Tiling, array: Any) -> Operand:
    if not tiling.by_class:
        return _of_classes(tiling, array)
    shape = tiling.kernel_tile(array.shape[1])
    return Operand(array, pl.BlockSpec(shape, lambda j, i: (j, _ZERO)))


def _inputs(tiling: Tiling, head: LogitsOf, slopes: Slopes) -> dict[str, Operand]:
    # One array: numbers a row take as much memory as a register's lanes.
    numbers = jnp.concatenate([part for part in slopes if part is not None], 1)
    inputs = {
        "hidden": _of_rows(tiling, head.hidden),
        "labels": _of_rows(tiling, head.labels),
        "numbers": _of_rows(tiling, numbers),
        "kernel": _kernel_operand(tiling, head.kernel),
    }
    if head.offset is not None:
        inputs["offset"] = _of_classes(tiling, head.offset)
    if head.weights is not None:
        inputs["weights"] = _of_classes(tiling, head.weights)
    return inputs


def _outputs(
    tiling: Tiling, wanted: Wanted, head: LogitsOf
) -> tuple[dict[str, Operand], dict[str, Any]]:
    """Returns the gradients, and what only the kernel sees."""
    (rows, features), dtype = head.hidden.shape, head.hidden.dtype
    blocks, outputs = rows // tiling.rows, {}
    scratch: dict[str, Any] = {
        "slopes": pltpu.VMEM((tiling.rows, tiling.classes), dtype)
    }
    of_kernel = _kernel_operand(tiling, head.kernel)
    tile = tiling.kernel_tile(features)
    if head.kernel.dtype != dtype:
        scratch["narrow"] = pltpu.VMEM(tile, dtype)
    if wanted.hidden:
        shape = jax.ShapeDtypeStruct((rows, features), jnp.float32)
        outputs["hidden_bar"] = Operand(shape, IN_MAIN_MEMORY)
        shape = min(blocks, 2), tiling.rows, features
        scratch["hidden_sum"] = pltpu.VMEM(shape, jnp.float32)
        scratch["reads"] = pltpu.SemaphoreType.DMA((2,))
        scratch["writes"] = pltpu.SemaphoreType.DMA((2,))
    if wanted.kernel:
        outputs["kernel_bar"] = of_kernel
        if head.kernel.dtype != jnp.float32:
            scratch["kernel_sum"] = pltpu.VMEM(tile, jnp.float32)
    if wanted.bias:
        count = _grid(tiling, head)[0] * tiling.classes
        shape = jax.ShapeDtypeStruct((1, count), jnp.float32)
        outputs["bias_bar"] = _of_classes(tiling, shape)
    return outputs, scratch


def _cost(tiling: Tiling, wanted: Wanted, head: LogitsOf) -> pl.CostEstimate:
    (rows, features), (tiles, blocks) = head.hidden.shape, _grid(tiling, head)
    # Numbers a row take as much as those of all lanes.
    of_rows = rows * ((2 + 8 * wanted.hidden) * features + 2 * 4 * LANES)
    tiles = 1 if blocks == 1 else tiles
    of_kernel = (1 + wanted.kernel) * head.kernel.size * head.kernel.dtype.itemsize
    products = 1 + wanted.hidden + wanted.kernel
    return pl.CostEstimate(
        flops=2 * products * rows * head.kernel.size,
        transcendentals=rows * head.kernel.size // features,
        bytes_accessed=tiles * of_rows + of_kernel,
    )


def _kernel(tiling: Tiling, grid: tuple[int, int], classes: int, refs: Any) -> None:
    """Makes the slopes of a tile and a block of rows, and what they add."""
    tile, block = pl.program_id(0), pl.program_id(1)
    clear_behind(classes, refs.kernel, 1 - tiling.by_class)
    kernel = refs.kernel
    if refs.narrow is not None:
        kernel = refs.narrow

        @pl.when(block == 0)
        def _() -> None:
            kernel[...] = refs.kernel[...].astype(kernel.dtype)

    _make_slopes(tiling, refs, kernel, tile, block)
    sums = None
    if refs.hidden_bar is not None:
        sums = _HiddenSum(tiling, grid, refs, tile, block)
        sums.exchange()
    if refs.kernel_bar is not None:
        total_ref = refs.kernel_bar if refs.kernel_sum is None else refs.kernel_sum
        left, right = refs.hidden[...], refs.slopes[...]
        if tiling.by_class:
            left, right = right, left
        total = product(left, right, (0, 0))
        total_ref[...] = total + jnp.where(block == 0, 0, total_ref[...])
        if refs.kernel_sum is not None:
            refs.kernel_bar[...] = total_ref[...].astype(refs.kernel_bar.dtype)
    if sums is not None:
        sums.add(kernel)


def _make_slopes(
    tiling: Tiling, refs: Any, kernel: Any, tile: jax.Array, block: jax.Array
) -> None:
    bias = 0
    for start in range(0, tiling.rows, tiling.row_chunk):
        rows = pl.ds(start, tiling.row_chunk)
        numbers = refs.numbers[rows, :]
        pivot, factor, label = (numbers[:, k : k + 1] for k in range(3))
        slope = jnp.exp(logits_of(tiling, refs, kernel, rows) - pivot) * factor
        if numbers.shape[1] == len(Slopes._fields):
            slope = less_uniform(refs, numbers[:, 3:4], slope)
        slope = jnp.where(is_label(tiling, refs, rows, tile), label, slope)
        if refs.bias_bar is not None:
            bias = bias + jnp.sum(slope, axis=0, keepdims=True)
        refs.slopes[rows, :] = slope.astype(refs.slopes.dtype)
    if refs.bias_bar is not None:
        before = jnp.where(block == 0, 0, refs.bias_bar[...])
        refs.bias_bar[...] = before + bias


class _HiddenSum:
    """The features' gradient of a block of rows, which every tile adds to.

    With one block it is in vector memory until the last tile. With more, two of them
    are: one that is added to, and one that is written, and read for the next step.
    """

    def __init__(
        self,
        tiling: Tiling,
        grid: tuple[int, int],
        refs: Any,
        tile: jax.Array,
        block: jax.Array,
    ):
        self._tiling, self._refs = tiling, refs
        self._tile, self._block = tile, block
        (tiles, self._blocks), self._step = grid, tile * grid[1] + block
        self._steps = tiles * self._blocks
        self._slot = _ZERO if self._blocks == 1 else jax.lax.rem(self._step, _TWO)

    def _copy(self, block: Any, slot: Any, *, out: bool) -> Any:
        rows = self._tiling.rows
        main = self._refs.hidden_bar.at[pl.ds(block * rows, rows), :]
        here = self._refs.hidden_sum.at[slot]
        if out:
            return pltpu.make_async_copy(here, main, self._refs.writes.at[slot])
        return pltpu.make_async_copy(main, here, self._refs.reads.at[slot])

    def exchange(self) -> None:
        """Ends the writing of the block before, and begins the reading of the next."""
        if self._blocks == 1:
            return
        other, following = _ONE - self._slot, self._step + 1

        @pl.when(self._step > 0)
        def _() -> None:
            self._copy(_ZERO, other, out=True).wait()

        @pl.when((following >= self._blocks) & (following < self._steps))
        def _() -> None:
            block = jax.lax.rem(following, np.int32(self._blocks))
            self._copy(block, other, out=False).start()

    def add(self, kernel: Any) -> None:
        """Adds what a tile adds, and begins to write it."""
        refs, slot = self._refs, self._slot
        if self._blocks > 1:

            @pl.when(self._tile > 0)
            def _() -> None:
                self._copy(_ZERO, slot, out=False).wait()

        for start in range(0, self._tiling.rows, self._tiling.row_chunk):
            rows = pl.ds(start, self._tiling.row_chunk)
            before = jnp.where(self._tile == 0, 0, refs.hidden_sum[slot, rows, :])
            contracted = 1, 1 - self._tiling.by_class
            part = product(refs.slopes[rows, :], kernel[...], contracted)
            refs.hidden_sum[slot, rows, :] = before + part
        last = self._step == self._steps - 1
        copy = self._copy(self._block, slot, out=True)
        pl.when(last | (self._blocks > 1))(copy.start)
        pl.when(last)(copy.wait)
