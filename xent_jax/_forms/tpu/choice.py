"""Which heads the TPU kernels are for."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._forms.head import Layer, Rows
from xent_jax._forms.row_gradients import Gradients, RowBlocks
from xent_jax._forms.tpu.tiling import (
    LANES,
    Tiling,
    tiling_of_gradients,
    tiling_of_results,
    tiling_of_sum,
)
from xent_jax._reductions.lowering import Place
from xent_jax._targets.class_ids import ClassIds

# The environment variable that turns the kernels off, set to 0.
SWITCH = "XENT_JAX_TPU_KERNELS"


def are_for(form: RowBlocks, wanted: Gradients, rows: Rows, layer: Layer) -> bool:
    """Returns whether the kernels make the gradients that are wanted of such a head."""
    return (
        wanted.hidden
        and wanted.kernel
        and not wanted.small.class_weights
        and not form.statistics
        and _know(rows, layer)
    )


def are_for_rows(kind: Any, rows: Rows, layer: Layer) -> bool:
    """Returns whether the kernels make the results of such a head's rows."""
    return (
        isinstance(kind, ClassIds)
        and not (kind.wanted.entropy or kind.wanted.prediction)
        and _know(rows, layer)
    )


def are_for_tangents(kind: Any, constants: Any, dots: Any) -> bool:
    """Returns whether they make the transpose of the tangents of such results.

    Args:
      kind: static.
      constants: rows, layer and results.
      dots: tangents of the features and options of the rows, and of the layer.
    """
    rows, layer, _ = constants
    (hidden, _), layer_dot = dots
    moves = hidden is not None or layer_dot.kernel is not None
    return moves and layer_dot.class_weights is None and are_for_rows(kind, rows, layer)


def _know(rows: Rows, layer: Layer) -> bool:
    """Returns whether the kernels make the logits of such a head."""
    sizes = (*rows.hidden.shape, layer.kernel.shape[1])
    return (
        layer.teacher is None
        and rows.target.others is None
        and not jax.tree.leaves((layer.options._replace(bias=None), rows.options))
        and rows.hidden.dtype == jnp.bfloat16
        and layer.kernel.dtype in (jnp.bfloat16, jnp.float32)
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and rows.hidden.shape[1] % LANES == 0
    )


def kernels_at(
    place: Place, form: RowBlocks, wanted: Gradients, rows: Rows, layer: Layer
) -> Callable[..., Any] | None:
    """Returns the function of rows, layer and coefficients that is the kernels.

    `None` where they are turned off, where arrays are not whole, and where it is not
    known that the chip holds their blocks.
    """
    tiling = _tiling_at(tiling_of_sum, place, rows, layer)
    if tiling is None:
        return None
    # Pallas takes long to import, and only here is it known to be of use.
    from xent_jax._forms.tpu.total import value_and_gradients

    return functools.partial(value_and_gradients, tiling, form, wanted)


def results_at(
    place: Place, kind: ClassIds, rows: Rows, layer: Layer
) -> Callable[..., Any] | None:
    """Returns the function of rows and layer to the rows' results, as `kernels_at`."""
    tiling = _tiling_at(tiling_of_results, place, rows, layer)
    if tiling is None:
        return None
    from xent_jax._forms.tpu.per_row import results

    return functools.partial(results, tiling, kind)


def transpose_at(
    place: Place, kind: ClassIds, constants: Any, dots: Any
) -> Callable[..., Any] | None:
    """Returns the transpose of the results' tangents, as `kernels_at`.

    Args:
      place: where the program is lowered.
      kind: static.
      constants: as of `are_for_tangents`, or their shapes.
      dots: likewise.
    """
    tiling = _tiling_at(tiling_of_gradients, place, *constants[:2])
    if tiling is None:
        return None
    from xent_jax._forms.tpu.all_rows import Wanted
    from xent_jax._forms.tpu.per_row import gradients

    (hidden, _), layer = dots
    moving = hidden, layer.kernel, layer.options.bias
    wanted = Wanted(*(dot is not None for dot in moving))
    return functools.partial(gradients, tiling, kind, wanted)


def _tiling_at(
    sizes: Callable[..., Tiling | None], place: Place, rows: Rows, layer: Layer
) -> Tiling | None:
    """Returns the sizes of blocks and tiles, `None` where there are no kernels."""
    if not place.whole or place.chip is None or os.environ.get(SWITCH) == "0":
        return None
    (count, features), kernel = rows.hidden.shape, layer.kernel
    return sizes(count, features, kernel.shape[1], place.chip, kernel.dtype.itemsize)
