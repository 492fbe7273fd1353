"""From the caller's arguments to the rows and the layer of a linear head.

All batch axes are flattened to one axis of N rows, and whatever is one number a row or
a class has the shape [N, 1] or [1, V]. A dropped row has label 0 and a dropped class
bias 0, whatever they hold.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import arrays, checks
from xent_jax._arguments.arrays import Keep, Layout
from xent_jax._arguments.checks import Shape
from xent_jax._arguments.options import (
    OPTIONS,
    LogitOptions,
    merged,
    read_option,
    read_options,
)
from xent_jax._forms.head import Layer, Rows, TeacherRows
from xent_jax._reductions.axis import AxisName, ClassAxis
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets.rivals import Labels


class Head(NamedTuple):
    """The arguments of one call; options by name, `None` for one that is not used."""

    batch_shape: Shape
    rows: Rows
    layer: Layer
    classes: ClassAxis
    options: dict[str, Any]  # [N, 1], [1, V] or [], in the accumulation dtype
    label_probs: jax.Array | None = None  # [N, K], likewise

    @property
    def weights(self) -> jax.Array | None:
        """The weight of each row, [N, 1]."""
        return self.options.get("weights")


def read_head(
    function: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    where: ArrayLike | None,
    class_axis_name: AxisName = None,
    label_probs: ArrayLike | None = None,
    teacher: dict[str, Any] | None = None,
    **options: ArrayLike | None,
) -> Head:
    """Returns the checked arguments, of which a teacher's stand in for labels."""
    checks.check_axis_name(function, "class_axis_name", class_axis_name)
    features, matrix = _read_linear(function, "hidden", hidden, "kernel", kernel)
    classes, dtype = matrix.shape[1], accumulation_dtype(features.dtype)
    # The layout of the logits, had there been any.
    shape = (*features.shape[:-1], classes)
    layout = Layout(function, "hidden", shape, (features.ndim - 1,), class_axis_name)
    read = _read_options(layout, dtype, options)
    mask = read.get("class_mask")
    keep = _read_keep(layout, where, mask)
    count = math.prod(layout.batch_shape)
    rows = Rows(features.reshape(count, features.shape[-1]), None, keep)
    probs = of_teacher = None
    if teacher is None:
        target, probs = _read_labels(layout, labels, label_probs, keep, dtype)
    else:
        target, of_teacher = _read_teacher(layout, mask, dtype, **teacher)
    rows = rows._replace(target=target)
    if read.get("weights") is not None:
        rows, read["weights"] = _weighted(rows, read["weights"])
        if probs is not None and rows.keep is not None:
            probs = jnp.where(rows.keep, probs, 0)
    of_rows = LogitOptions.of(read, "n").where(rows.keep, "n")
    layer = Layer(
        matrix, _of_layer(read, mask), mask, read.get("class_weights"), of_teacher
    )
    rows = rows._replace(options=of_rows)
    return Head(layout.batch_shape, rows, layer, layout.class_axis, read, probs)


def _read_options(
    layout: Layout, dtype: jnp.dtype, options: dict[str, ArrayLike | None]
) -> dict[str, Any]:
    """Returns options by name: [N, 1], [1, V], or a number where they have no axes."""
    count = math.prod(layout.batch_shape)

    def flat(name: str, value: jax.Array | None) -> jax.Array | None:
        axes = OPTIONS[name].axes
        if value is None or not axes:
            return value
        if axes == "v":
            return value.reshape(1, layout.num_classes)
        return value.reshape(count, 1) if value.ndim else jnp.full((count, 1), value)

    read = read_options(layout, dtype, options)
    return {name: flat(name, read[name]) for name in read}


def _of_layer(options: dict[str, Any], mask: jax.Array | None) -> LogitOptions:
    """Returns what changes the logits and is one number a class, or one for all."""
    numbers = LogitOptions.of(options, "")
    return merged(numbers, LogitOptions.of(options, "v").where(mask, "v"))


def _read_linear(
    function: str, name: str, hidden: ArrayLike, of_kernel: str, kernel: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns the features and the kernel of a layer."""
    features = checks.as_array(function, name, hidden)
    checks.check_floating(function, name, features)
    if features.ndim == 0:
        checks.fail(ValueError, function, name, "have a last axis", ())
    matrix = checks.as_array(function, of_kernel, kernel)
    checks.check_floating(function, of_kernel, matrix)
    if matrix.ndim != 2 or matrix.shape[0] != features.shape[-1]:
        size = features.shape[-1]
        expected = f"have shape ({size}, V) (features of {name}, classes)"
        transposed = matrix.ndim == 2 and matrix.shape[1] == size
        hint = f"give {of_kernel}.T" if transposed else ""
        checks.fail(ValueError, function, of_kernel, expected, matrix.shape, hint)
    if matrix.shape[1] == 0:
        expected = "have at least one class"
        checks.fail(ValueError, function, of_kernel, expected, matrix.shape)
    return features, matrix


def _read_teacher(
    layout: Layout,
    mask: jax.Array | None,
    dtype: jnp.dtype,
    *,
    teacher_hidden: ArrayLike,
    teacher_kernel: ArrayLike,
    teacher_bias: ArrayLike | None,
    teacher_softcap: ArrayLike | None,
) -> tuple[TeacherRows, Layer]:
    """Returns the rows and the layer of a teacher, which are constants."""
    function, classes = layout.function, layout.num_classes
    names = "teacher_hidden", "teacher_kernel"
    features, matrix = _read_linear(
        function, names[0], teacher_hidden, names[1], teacher_kernel
    )
    size = features.shape[-1]
    shape, meaning = (*layout.batch_shape, size), "rows of hidden, features"
    checks.check_shape(function, names[0], features, shape, meaning)
    meaning = "features of teacher_hidden, classes of kernel"
    checks.check_shape(function, names[1], matrix, (size, classes), meaning)
    read = {
        name: read_option(layout, dtype, name, value, f"teacher_{name}")
        for name, value in (("bias", teacher_bias), ("softcap", teacher_softcap))
    }
    if read["bias"] is not None:
        read["bias"] = read["bias"].reshape(1, classes)
    layer = Layer(matrix, _of_layer(read, mask), None, None)
    count = math.prod(layout.batch_shape)
    fixed = TeacherRows(features.reshape(count, size)), layer
    return jax.tree.map(jax.lax.stop_gradient, fixed)


def _read_keep(
    layout: Layout, where: ArrayLike | None, mask: jax.Array | None
) -> jax.Array | None:
    """Returns the rows that count, [N, 1].

    As in the other losses, a row without a single kept class does not.
    """
    shape = layout.batch_shape
    keep = arrays.read_mask(layout.function, where, shape, layout.batch_meaning)
    if mask is not None:
        kept = layout.class_axis.largest(jnp.any(mask).astype(jnp.int32)) > 0
        keep = jnp.full(shape, kept) if keep is None else keep & kept
    return None if keep is None else keep.reshape(-1, 1)


def _weighted(rows: Rows, weights: jax.Array) -> tuple[Rows, jax.Array]:
    """Returns the rows but for those of weight 0 that are undefined, and weights."""
    if rows.keep is not None:
        weights = jnp.where(rows.keep, weights, 0)
    counted = weights != 0
    if isinstance(rows.target, Labels):
        defined = _are_moderate(rows.hidden) & (rows.target.own >= 0)
    else:
        defined = _are_moderate(rows.hidden) & _are_moderate(rows.target.hidden)
    counted = counted | defined
    target = jax.tree.map(
        lambda one: jnp.where(counted, one, jnp.zeros_like(one)), rows.target
    )
    keep = counted if rows.keep is None else rows.keep & counted
    return rows._replace(target=target, keep=keep), weights


def _are_moderate(features: jax.Array) -> jax.Array:
    """Whether rows have no features that could make logits that are not finite."""
    dtype = accumulation_dtype(features.dtype)
    largest = float(jnp.finfo(features.dtype).max)
    largest = min(largest, float(jnp.finfo(dtype).max) ** 0.5)
    return jnp.all(jnp.abs(features) <= largest, axis=-1, keepdims=True)


def _read_labels(
    layout: Layout,
    labels: Any,
    label_probs: ArrayLike | None,
    rows: jax.Array | None,
    dtype: jnp.dtype,
) -> tuple[Labels, jax.Array | None]:
    """Returns class ids and, where there are several a row, their probabilities."""
    shape = layout.batch_shape
    keep = Keep(None, None if rows is None else layout.rows(rows.reshape(shape)))
    if label_probs is None:
        ids = arrays.read_class_ids(layout, labels, keep)
        return Labels(ids.reshape(-1, 1)), None
    names = "labels", "label_probs"
    own, ids, probs = arrays.read_sparse_targets(
        layout, names, labels, label_probs, keep, dtype
    )
    count = ids.shape[-1]
    target = Labels.of(own.reshape(-1, 1), ids.reshape(-1, count))
    return target, probs.reshape(-1, count)


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
