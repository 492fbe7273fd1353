"""From the caller's arguments to the one block that given logits are."""

from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

from xent_jax._arguments import arrays
from xent_jax._arguments.arrays import Axis, Keep, Layout
from xent_jax._arguments.options import LogitOptions, changed, read_options
from xent_jax._reductions.axis import AxisName
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets.block import Block, block_of


class GivenLogits(NamedTuple):
    """The arguments of one call; options by name, `None` for one that is not used."""

    layout: Layout
    keep: Keep
    block: Block
    options: dict[str, Any]

    def uniform(self) -> jax.Array | None:
        """Returns the share of the smoothing that a kept class has."""
        smoothing = self.options["label_smoothing"]
        if smoothing is None:
            return None
        return smoothing / arrays.count_classes(
            self.layout, self.keep, self.block.logits.dtype
        )


def read_given(
    function: str,
    logits: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    class_axis_name: AxisName,
    **options: ArrayLike | None,
) -> GivenLogits:
    """Returns the checked arguments, the logits as the options change them."""
    array, layout = arrays.read_logits(
        function, "logits", logits, axis, class_axis_name
    )
    keep = arrays.read_where(layout, where)
    read = read_options(layout, array.dtype, options)
    block = block_of(
        changed_logits(array, read), layout.class_axis, keep.classes, keep.rows
    )
    return GivenLogits(layout, keep, block, read)


def changed_logits(logits: jax.Array, options: dict[str, Any]) -> jax.Array:
    """Returns the logits as the options that are used change them."""
    parts = [LogitOptions.of(options, axes) for axes in ("", "v", "n")]
    if not jax.tree.leaves(parts):
        return logits
    return changed(logits.astype(accumulation_dtype(logits.dtype)), *parts)
