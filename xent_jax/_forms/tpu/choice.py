"""Which heads the TPU kernels are for."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._forms.head import Layer, Rows
from xent_jax._forms.row_gradients import Gradients, RowBlocks
from xent_jax._forms.tpu.tiling import LANES, tiling_of
from xent_jax._reductions.lowering import Place

# The environment variable that turns the kernels off, set to 0.
SWITCH = "XENT_JAX_TPU_KERNELS"


def are_for(form: RowBlocks, wanted: Gradients, rows: Rows, layer: Layer) -> bool:
    """Returns whether the kernels make the gradients that are wanted of such a head."""
    sizes = (*rows.hidden.shape, layer.kernel.shape[1])
    return (
        wanted.hidden
        and wanted.kernel
        and not wanted.small.class_weights
        and not form.statistics
        and layer.teacher is None
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
    if not place.whole or place.chip is None or os.environ.get(SWITCH) == "0":
        return None
    (count, features), kernel = rows.hidden.shape, layer.kernel
    tiling = tiling_of(
        count, features, kernel.shape[1], place.chip, kernel.dtype.itemsize
    )
    if tiling is None:
        return None
    # Pallas takes long to import, and only here is it known to be of use.
    from xent_jax._forms.tpu.total import value_and_gradients

    return functools.partial(value_and_gradients, tiling, form, wanted)
