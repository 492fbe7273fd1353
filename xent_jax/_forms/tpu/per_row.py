"""The results of a linear head's rows and their gradients, by TPU kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xent_jax._arguments.options import LogitOptions
from xent_jax._forms.head import Layer, Rows, kept_hidden
from xent_jax._forms.loops import loop, varying
from xent_jax._forms.tpu import all_rows
from xent_jax._forms.tpu.all_rows import Slopes, Wanted
from xent_jax._forms.tpu.block import slopes_of, sums_of_tiles
from xent_jax._forms.tpu.classes import Classes, classes_of
from xent_jax._forms.tpu.kernels import tile_sums
from xent_jax._forms.tpu.tile import LogitsOf
from xent_jax._forms.tpu.tiling import Tiling
from xent_jax._targets.class_ids import ClassIds, Dots, Results

_LARGEST = float(np.finfo(np.float32).max)


def results(tiling: Tiling, kind: ClassIds, rows: Rows, layer: Layer) -> Results:
    """Returns the results of every row, [N, 1].

    Args:
      tiling: static.
      kind: static; no entropy and no prediction is wanted.
      rows: N of them, of bfloat16 features.
      layer: with a kernel of bfloat16 or float32.
    """
    count, arguments = rows.hidden.shape[0], (rows, layer)
    alike_rows, layer = jax.tree.map(
        lambda array: varying(array, arguments), (rows, layer)
    )
    classes = classes_of(tiling, kind, layer)
    kernel = layer.kernel.T if tiling.by_class else layer.kernel
    here = classes.places(alike_rows.target.own)
    blocks = -(-count // tiling.rows)

    def in_blocks(array: jax.Array, fill: int = 0) -> jax.Array:
        array = _padded(array, blocks * tiling.rows, fill)
        return array.reshape(blocks, tiling.rows, -1)

    def step(carry: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        hidden, here = block
        logits = LogitsOf(hidden, kernel, here, classes.offset, classes.weights)
        logits = jax.tree.map(lambda array: varying(array, hidden), logits)
        tiles = tile_sums(tiling, logits, uniform=kind.wanted.uniform)
        return carry, sums_of_tiles(tiling, classes, here, tiles)

    hidden = in_blocks(kept_hidden(alike_rows))
    _, sums = loop(step, None, (hidden, in_blocks(here, -1)))
    sums = jax.tree.map(lambda array: array.reshape(-1, 1)[:count], sums)
    if rows.keep is not None:
        # As of logits that are finite, whatever the bias is.
        sums = jax.tree.map(lambda array: jnp.where(rows.keep, array, 0), sums)
    return kind.results(kind.over_shards(sums), rows.target, rows.keep)


def gradients(
    tiling: Tiling,
    kind: ClassIds,
    wanted: Wanted,
    constants: tuple[Rows, Layer, Results],
    bars: Dots,
) -> tuple[tuple[Any, LogitOptions], Layer]:
    """Returns the gradients by the features, in float32, and by the layer.

    Args:
      tiling: static.
      kind: static.
      wanted: static.
      constants: N rows, their features 0 where dropped; the layer; the rows' results.
      bars: what the results' derivatives are multiplied by, [N, 1].
    """
    rows, layer, _ = constants
    count = rows.hidden.shape[0]
    classes = classes_of(tiling, kind, layer)
    whole = -(-count // tiling.rows) * tiling.rows
    head = LogitsOf(
        _padded(rows.hidden, whole, 0),
        layer.kernel.T if tiling.by_class else layer.kernel,
        _padded(classes.places(rows.target.own), whole, -1),
        classes.offset,
        classes.weights,
    )
    slopes = _slopes(kind, classes, constants, bars, whole)
    head, slopes = jax.tree.map(
        lambda array: varying(array, (head, slopes)), (head, slopes)
    )
    hidden, kernel, bias = all_rows.gradients(tiling, wanted, head, slopes)
    if kernel is not None and tiling.by_class:
        kernel = kernel.T
    if hidden is not None:
        hidden = hidden[:count]
    if bias is not None:
        bias = bias[:, : layer.kernel.shape[1]]
    layer = layer._replace(
        kernel=kernel,
        options=LogitOptions(bias=bias),
        class_mask=None,
        class_weights=None,
    )
    return (hidden, LogitOptions()), layer


def _slopes(
    kind: ClassIds,
    classes: Classes,
    constants: tuple[Rows, Layer, Results],
    bars: Dots,
    count: int,
) -> Slopes:
    """Returns the slopes of rows, and of others up to a count, which have none."""
    rows, _, results = constants
    factors = results._replace(
        loss=bars.loss, log_normalizer=bars.log_normalizer, uniform=bars.uniform
    )
    pivot = results.statistics.pivot
    slopes = slopes_of(kind, classes, rows, results, factors, pivot)
    if rows.keep is not None:
        # So that no exponential of a bias overflows.
        pivot = jnp.where(rows.keep, pivot, _LARGEST)
    slopes = jax.tree.map(lambda array: _padded(array, count, 0), slopes)
    return Slopes(_padded(pivot, count, _LARGEST), *slopes)


def _padded(array: jax.Array, count: int, fill: float) -> jax.Array:
    missing = count - array.shape[0]
    if not missing:
        return array
    return jnp.pad(array, ((0, missing), (0, 0)), constant_values=fill)
