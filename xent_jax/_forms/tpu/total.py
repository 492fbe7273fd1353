"""The sum of a linear head's losses and its gradients, by TPU kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._arguments.options import LogitOptions
from xent_jax._forms.head import Layer, Rows, kept_hidden
from xent_jax._forms.loops import zeros
from xent_jax._forms.row_gradients import (
    Gradients,
    RowBlocks,
    Small,
    alike,
    no_rows,
    only,
)
from xent_jax._forms.splitting import RowBlock
from xent_jax._forms.tpu.block import Added, Memory, Plan, block_gradients
from xent_jax._forms.tpu.calls import uninitialized
from xent_jax._forms.tpu.classes import Classes, classes_of
from xent_jax._forms.tpu.tiling import Tiling
from xent_jax._targets.class_ids import Coefficients


def value_and_gradients(
    tiling: Tiling,
    form: RowBlocks,
    wanted: Gradients,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, None, Gradients]:
    """Returns the sum of the rows' losses, no statistics, and the gradients.

    Those by features and kernel have been rounded to the dtypes of these.

    Args:
      tiling: static; its blocks stand for those of `form`.
      form: static.
      wanted: static; features and kernel are, class weights are not.
      rows: N of them, of bfloat16 features.
      layer: with a kernel of bfloat16 or float32.
      coefficients: [N, 1].
    """
    rows, layer, coefficients = alike(form, rows, layer, coefficients)
    hidden, kernel = rows.hidden, layer.kernel
    count, blocks = hidden.shape[0], -(-hidden.shape[0] // tiling.rows)
    narrow = kernel.dtype == hidden.dtype
    plan = Plan(tiling, form.kind, wanted.small.options.bias is True, narrow)
    layer = layer._replace(kernel=kernel.astype(hidden.dtype))
    classes = classes_of(tiling, form.kind, layer)
    memory = _memory(plan, hidden, kernel.shape, blocks)
    rows, coefficients = _in_whole_blocks(rows, coefficients, blocks * tiling.rows)
    order, times = _order(form, rows, blocks)

    def step(index: jax.Array, carry: tuple[Added, Memory]) -> tuple[Added, Memory]:
        sums, memory = carry
        start = order[index] * tiling.rows
        part = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, tiling.rows),
            RowBlock(rows, coefficients, None),
        )
        place = jnp.stack([index == 0, index == times - 1]).astype(jnp.int32)
        added, memory = block_gradients(plan, classes, part, place, memory)
        added = added._replace(
            coefficients=only(wanted.coefficients, added.coefficients)
        )
        return _sum(sums, added, start), memory

    carry = _nothing(plan, wanted, classes, rows, coefficients), memory
    sums, memory = jax.lax.fori_loop(0, times, step, carry)
    kernel_bar = memory.kept if memory.result is None else memory.result
    gradients = Gradients(
        sums.hidden[:count].astype(jnp.float32),
        LogitOptions(),
        kernel_bar.astype(jnp.float32) if narrow else memory.total,
        Small(LogitOptions(bias=sums.bias), None),
        jax.tree.map(lambda array: array[:count], sums.coefficients),
    )
    return sums.loss, None, gradients


def _memory(
    plan: Plan, hidden: jax.Array, shape: tuple[int, ...], blocks: int
) -> Memory:
    """Returns what has not been written to yet, for a kernel of that shape."""

    def room(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return uninitialized(shape, dtype, hidden, plan.tiling)

    shared = plan.narrow and plan.tiling.rows <= shape[0]
    return Memory(
        room(shape if shared else (plan.tiling.rows, shape[1]), hidden.dtype),
        room(shape, jnp.float32) if blocks > 1 or not plan.narrow else None,
        room(shape, hidden.dtype) if plan.narrow and not shared else None,
    )


def _in_whole_blocks(
    rows: Rows, coefficients: Coefficients, count: int
) -> tuple[Rows, Coefficients]:
    """Returns as many rows; those that are added are dropped."""
    rows = rows._replace(hidden=kept_hidden(rows))
    missing = count - rows.hidden.shape[0]
    if not missing:
        return rows, coefficients
    if rows.keep is None:
        rows = rows._replace(keep=rows.target.own == rows.target.own)
    return jax.tree.map(
        lambda array: jnp.pad(array, ((0, missing), (0, 0))), (rows, coefficients)
    )


def _order(
    form: RowBlocks, rows: Rows, blocks: int
) -> tuple[jax.Array, jax.Array | int]:
    """Returns the blocks in the order in which they are taken, and how many are.

    Those without a kept row are left out, but for one where there are no others, which
    writes zeros.
    """
    if not form.skip or rows.keep is None:
        return jnp.arange(blocks), blocks
    kept = jnp.any(rows.keep.reshape(blocks, -1), axis=1)
    return jnp.argsort(~kept, stable=True), jnp.maximum(jnp.sum(kept), 1)


def _nothing(
    plan: Plan,
    wanted: Gradients,
    classes: Classes,
    rows: Rows,
    coefficients: Coefficients,
) -> Added:
    """Returns the sum over no blocks, and its gradients by all rows."""
    loss = no_rows(rows, coefficients)
    bias = None
    if plan.bias:
        bias = zeros((1, classes.kernel.shape[1]), jnp.float32, rows.hidden)
    return Added(
        loss,
        zeros(rows.hidden.shape, rows.hidden.dtype, rows.hidden),
        bias,
        jax.tree.map(
            lambda array: zeros(array.shape, array.dtype, loss),
            only(wanted.coefficients, coefficients),
        ),
    )


def _sum(sums: Added, block: Added, start: jax.Array) -> Added:
    """Returns the sums with those of the block of rows that starts at `start`."""

    def put(rows: jax.Array, part: jax.Array) -> jax.Array:
        part = part.astype(rows.dtype)
        return jax.lax.dynamic_update_slice_in_dim(rows, part, start, 0)

    return Added(
        sums.loss + block.loss,
        put(sums.hidden, block.hidden),
        jax.tree.map(
            lambda all_, one: all_ + one[:, : all_.shape[1]], sums.bias, block.bias
        ),
        jax.tree.map(put, sums.coefficients, block.coefficients),
    )
