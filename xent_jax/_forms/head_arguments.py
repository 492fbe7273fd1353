"""From the caller's arguments to the rows and the layer of a linear head.

All batch axes are flattened to one axis of N rows, and whatever is one number a row or
a class has the shape [N, 1] or [1, V]. A dropped row has label 0 and a dropped class
bias 0, whatever they hold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import arrays, checks
from xent_jax._arguments.arrays import Keep, Layout
from xent_jax._arguments.checks import Shape
from xent_jax._forms.head import Layer, Rows
from xent_jax._reductions.axis import AxisName, ClassAxis
from xent_jax._reductions.precision import accumulation_dtype


class Head(NamedTuple):
    """The arguments of one call."""

    batch_shape: Shape
    rows: Rows
    layer: Layer
    classes: ClassAxis
    weights: jax.Array | None  # [N, 1], in the accumulation dtype


def read_head(
    function: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    class_mask: ArrayLike | None,
    softcap: ArrayLike | None,
    class_axis_name: AxisName = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
) -> Head:
    """Returns the checked arguments."""
    checks.check_axis_name(function, "class_axis_name", class_axis_name)
    features = checks.as_array(function, "hidden", hidden)
    checks.check_floating(function, "hidden", features)
    if features.ndim == 0:
        checks.fail(ValueError, function, "hidden", "have a last axis", ())
    matrix = checks.as_array(function, "kernel", kernel)
    checks.check_floating(function, "kernel", matrix)
    if matrix.ndim != 2 or matrix.shape[0] != features.shape[-1]:
        expected = f"have shape ({features.shape[-1]}, V) (features of hidden, classes)"
        checks.fail(ValueError, function, "kernel", expected, matrix.shape)
    classes = matrix.shape[1]
    if classes == 0:
        expected = "have at least one class"
        checks.fail(ValueError, function, "kernel", expected, matrix.shape)
    dtype = accumulation_dtype(features.dtype)
    # The layout of the logits, had there been any.
    shape = (*features.shape[:-1], classes)
    layout = Layout(function, "hidden", shape, (features.ndim - 1,), class_axis_name)
    mask = _read_classes(function, "class_mask", class_mask, classes)
    keep = arrays.read_mask(function, where, layout.batch_shape, layout.batch_meaning)
    if weights is not None:
        weights = checks.as_real(function, "weights", weights)
        checks.check_shape(
            function, "weights", weights, layout.batch_shape, layout.batch_meaning
        )
        weights = weights.astype(dtype).reshape(-1, 1)
    if mask is not None:
        # As in the other losses, a row without a single kept class does not count.
        kept = layout.class_axis.largest(jnp.any(mask).astype(jnp.int32)) > 0
        keep = jnp.full(layout.batch_shape, kept) if keep is None else keep & kept
    rows = None if keep is None else layout.rows(keep)
    ids = arrays.read_class_ids(layout, labels, Keep(None, rows)).reshape(-1, 1)
    features = features.reshape(ids.shape[0], features.shape[-1])
    rows = None if rows is None else rows.reshape(-1, 1)
    if weights is not None:
        if rows is not None:
            weights = jnp.where(rows, weights, 0)
        # Larger features could make logits that are not finite.
        largest = jnp.finfo(features.dtype).max
        largest = min(float(largest), float(jnp.finfo(dtype).max) ** 0.5)
        moderate = jnp.abs(features) <= largest
        finite = jnp.all(moderate, axis=-1, keepdims=True) & (ids >= 0)
        counted = (weights != 0) | finite
        rows = counted if rows is None else rows & counted
        ids = jnp.where(counted, ids, 0)
    offsets = _read_classes(function, "bias", bias, classes, dtype)
    if offsets is not None and mask is not None:
        offsets = jnp.where(mask, offsets, 0)
    layer = Layer(
        matrix,
        offsets,
        _read_softcap(function, softcap, dtype),
        mask,
        _read_classes(function, "class_weights", class_weights, classes, dtype),
    )
    return Head(
        layout.batch_shape,
        Rows(features, ids, rows),
        layer,
        layout.class_axis,
        weights,
    )


def _read_classes(
    function: str,
    argument: str,
    value: ArrayLike | None,
    classes: int,
    dtype: jnp.dtype | None = None,
) -> jax.Array | None:
    """Returns [1, V] of the given dtype; a mask where there is none."""
    if value is None:
        return None
    if dtype is None:
        array = checks.as_array(function, argument, value)
        checks.check_boolean(function, argument, array)
    else:
        array = checks.as_real(function, argument, value).astype(dtype)
    meaning = "one value a class, as the kernel's columns"
    checks.check_shape(function, argument, array, (classes,), meaning)
    return array[None]


def _read_softcap(
    function: str, softcap: ArrayLike | None, dtype: jnp.dtype
) -> jax.Array | None:
    if softcap is None:
        return None
    number = checks.read_number(function, "softcap", softcap, dtype, inside=True)
    # Below it capped logits would not be normal numbers.
    lowest = float(jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps)
    if not isinstance(number, jax.Array) and number < lowest:
        expected = f"be at least {lowest:.2g} for {dtype}"
        checks.fail(ValueError, function, "softcap", expected, repr(softcap))
    return jnp.asarray(number)


def check_reduction(function: str, reduction: str | None) -> None:
    """Raises unless the reduction is one of the three."""
    if reduction not in (None, "mean", "sum"):
        expected = "be None, 'mean' or 'sum'"
        checks.fail(ValueError, function, "reduction", expected, repr(reduction))


def read_block(
    function: str, argument: str, size: int | None, default: int, most: int
) -> int:
    """Returns a block size: the caller's, or the default; `most` of it at most."""
    if size is None:
        return default
    size = checks.read_count(function, argument, size)
    return max(1, min(size, most)) if isinstance(most, int) else size


def refuse_block(function: str, argument: str, size: int | None, instead: str) -> None:
    """Raises if a block size is given that does not apply."""
    if size is not None:
        checks.fail(ValueError, function, argument, instead, repr(size))
