"""A block of rows: two TPU kernels, and the numbers a row between them.

The sums of a tile are those of a block of classes, and add up as such. The kind of
target makes a row's results of them, and two slopes: that of its label, and that of a
rival as good as the best of a tile, from which those of the tile's other rivals follow
by the exponentials that the first kernel kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._forms.head import Rows
from xent_jax._forms.loops import varying
from xent_jax._forms.row_gradients import total_and_factors
from xent_jax._forms.splitting import RowBlock
from xent_jax._forms.tpu.classes import Classes, numbers_at
from xent_jax._forms.tpu.kernels import (
    LOWEST,
    KernelSum,
    RowSlopes,
    Tiles,
    backward,
    forward,
)
from xent_jax._forms.tpu.tile import LogitsOf
from xent_jax._forms.tpu.tiling import Tiling
from xent_jax._targets.block import Block, zero_in_dropped_rows
from xent_jax._targets.class_ids import ClassIds, Coefficients, Results
from xent_jax._targets.rivals import Sums, UniformSums, relative_to


class Plan(NamedTuple):
    """What is the same for all blocks; static."""

    tiling: Tiling
    kind: ClassIds
    bias: bool  # whether the gradient by the bias is wanted
    narrow: bool  # whether the kernel's gradient leaves in 16 bits


class Memory(NamedTuple):
    """What every block writes to, in place.

    Where there is room, a narrow gradient of the kernel leaves over what is kept of the
    last block, tile by tile, so that both take the memory of one.
    """

    kept: jax.Array  # bfloat16[≥ R, V]
    total: jax.Array | None  # float32[D, V], `None` for one block with a narrow result
    result: jax.Array | None  # bfloat16[D, V], `None` where there is room in `kept`


class Added(NamedTuple):
    """What a block adds to the sum and to its gradients."""

    loss: jax.Array  # float32[]
    hidden: jax.Array  # float32[R, D]
    bias: jax.Array | None  # float32[1, V']
    coefficients: Coefficients  # float32[R, 1]


def block_gradients(
    plan: Plan,
    classes: Classes,
    part: RowBlock,
    place: jax.Array,
    memory: Memory,
) -> tuple[Added, Memory]:
    """Returns what a block of rows adds.

    Args:
      plan: static.
      classes: of the layer.
      part: R rows, their features 0 in a dropped row.
      place: as of `backward`.
      memory: as the block before left it.
    """
    rows = part.rows
    here = classes.places(rows.target.own)

    def in_kernel(array: jax.Array) -> jax.Array:
        # A kernel takes no arrays of which only some vary over a mesh axis.
        return varying(array, rows.hidden)

    logits = LogitsOf(
        rows.hidden, classes.kernel, here, classes.offset, classes.weights
    )
    logits = jax.tree.map(in_kernel, logits)
    uniform = plan.kind.wanted.uniform
    kept, tiles = forward(plan.tiling, logits, memory.kept, uniform=uniform)
    loss, slopes, coefficients_bar = _between(plan, classes, part, here, tiles)
    shared = plan.narrow and memory.result is None
    hidden_bar, bias_bar, (total, result) = backward(
        plan.tiling,
        logits,
        kept,
        jax.tree.map(in_kernel, slopes),
        KernelSum(memory.total, kept if shared else memory.result),
        in_kernel(place),
        bias=plan.bias,
    )
    if shared and result is not None:
        kept, result = result, None
    if rows.keep is not None:
        hidden_bar = jnp.where(rows.keep, hidden_bar, 0)
    added = Added(loss, hidden_bar, bias_bar, coefficients_bar)
    return added, Memory(kept, total, result)


def _between(
    plan: Plan, classes: Classes, part: RowBlock, here: jax.Array, tiles: Tiles
) -> tuple[jax.Array, RowSlopes, Coefficients]:
    """Returns the loss, its slopes, and its gradients by the coefficients.

    Args:
      plan: static.
      classes: of the layer.
      part: R rows.
      here: int32[R, 1], the place of the label among the classes here, or −1.
      tiles: as `forward` returned them.
    """
    kind, (rows, coefficients, _) = plan.kind, part
    sums = sums_of_tiles(plan.tiling, classes, here, tiles)
    results = kind.results(kind.over_shards(sums), rows.target, rows.keep)
    loss, factors, coefficients_bar = total_and_factors(results, coefficients)
    slopes = slopes_of(kind, classes, rows, results, factors, tiles.pivot)
    return loss, slopes, coefficients_bar


def slopes_of(
    kind: ClassIds,
    classes: Classes,
    rows: Rows,
    results: Results,
    factors: Results,
    pivot: jax.Array,
) -> RowSlopes:
    """Returns the slopes of rows, those of rivals for exponentials relative to a pivot.

    Args:
      kind: static.
      classes: of the layer.
      rows: R of them.
      results: of the rows.
      factors: of the results' slopes, `None` for 0.
      pivot: [R, any]; the slope of a rival as large is what exponentials are times.
    """

    def slope(
        logits: jax.Array, ids: jax.Array, kept: jax.Array | None, weight: Any
    ) -> jax.Array:
        block = Block(logits, ids, kept, rows.keep, weight)
        return kind.slope(block, rows.target, results, factors)

    here = classes.places(rows.target.own)
    kept = rival_weight = weight = uniform = None
    if classes.kept is not None:
        kept = numbers_at(classes.kept, here)
    if classes.uniform is not None and factors.uniform is not None:
        # The kernel subtracts the weights of rivals, which it knows.
        rival_weight = jnp.zeros((1, 1), jnp.float32)
        weight = numbers_at(classes.uniform.classes, here)
        uniform = zero_in_dropped_rows(factors.uniform, rows.keep)
    rival = slope(pivot, jnp.full((1, 1), -2, jnp.int32), None, rival_weight)
    label = slope(results.loss, rows.target.own, kept, weight)
    return RowSlopes(rival, label, uniform)


def sums_of_tiles(
    tiling: Tiling, classes: Classes, here: jax.Array, tiles: Tiles
) -> Sums:
    """Returns the sums of a block of rows over the classes here.

    Args:
      tiling: static.
      classes: of the layer.
      here: as of `_between`.
      tiles: as `forward` returned them.
    """
    count, uniform = tiling.tiles(classes.kernel.shape[1]), classes.uniform
    tiles = jax.tree.map(lambda array: array[:, :count], tiles)
    weights = None
    if tiles.distance is not None and uniform is not None:
        number = jnp.arange(uniform.tiles.size, dtype=jnp.int32)[None]
        own_tile = number == jnp.where(here < 0, -1, here // tiling.classes)
        others = jnp.where(
            own_tile, numbers_at(uniform.others, here), uniform.tiles[None]
        )
        weights = UniformSums(tiles.distance, others, numbers_at(uniform.classes, here))
    best_rival = jnp.where(tiles.pivot == LOWEST, -jnp.inf, tiles.pivot)
    largest = jnp.max(best_rival, axis=1, keepdims=True)
    sums = Sums(
        best_rival, tiles.rivals, tiles.label_logit, None, weights, None, None, None
    )
    sums = jax.tree.map(
        lambda numbers: jnp.sum(numbers, axis=1, keepdims=True),
        relative_to(largest, sums),
    )
    return sums._replace(best_rival=largest)
