"""From the caller's arguments to arrays of one layout, checked on the way.

Inside the package the classes are on one axis, everything that is one number a row has
size 1 there, and class ids are int32 with −1 for an id that is no class.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from xent_jax._arguments import checks, placement
from xent_jax._arguments.checks import Shape
from xent_jax._reductions.axis import AxisName, ClassAxis
from xent_jax._reductions.precision import accumulation_dtype

Axis = int | Sequence[int] | None


class Layout(NamedTuple):
    """Where the classes of one call are.

    Several class axes are moved to the end and flattened, so a class id then is the
    row-major index over the axes in the order named.
    """

    function: str
    name: str  # of the argument that has the classes
    shape: Shape  # as given
    axes: tuple[int, ...]  # as given, non-negative
    axis_name: AxisName = None  # of the mesh, where the class axis is sharded
    logits: jax.Array | None = None  # as given: what else is given goes to where it is

    @property
    def axis(self) -> int:
        """The class axis inside the package, negative."""
        return -1 if len(self.axes) > 1 else self.axes[0] - len(self.shape)

    @property
    def class_axis(self) -> ClassAxis:
        """Where the classes are inside the package."""
        return ClassAxis(self.axis, self.axis_name)

    @property
    def num_classes(self) -> int:
        """The number of classes here, over all class axes."""
        count = 1
        for axis in self.axes:
            count *= self.shape[axis]
        return count

    @property
    def batch_shape(self) -> Shape:
        """The shape without the class axes: that of the loss."""
        return tuple(
            size for axis, size in enumerate(self.shape) if axis not in self.axes
        )

    @property
    def kept_shape(self) -> Shape:
        """The shape with class axes of size 1."""
        return tuple(
            1 if axis in self.axes else size for axis, size in enumerate(self.shape)
        )

    @property
    def batch_meaning(self) -> str:
        """How a message explains `batch_shape`."""
        plural = "axis" if len(self.axes) == 1 else "axes"
        names = ", ".join(str(axis) for axis in self.axes)
        return f"{self.name} without {plural} {names}"

    @property
    def class_meaning(self) -> str:
        """How a message explains the shape of one value a class."""
        if self.name == "hidden":
            return "one value a class, as the kernel's columns"
        here = " of this shard" if self.axis_name is not None else ""
        return f"one number a class{here}"

    def classes(self, array: jax.Array) -> jax.Array:
        """Brings an array of the given shape into the layout."""
        if len(self.axes) == 1:
            return array
        batch = tuple(axis for axis in range(array.ndim) if axis not in self.axes)
        return array.transpose(batch + self.axes).reshape(
            *self.batch_shape, self.num_classes
        )

    def rows_beside(self, array: jax.Array) -> jax.Array:
        """Brings an array of the batch shape, or longer, to where the logits are."""
        if self.logits is None:
            return array
        batch = [axis for axis in range(self.logits.ndim) if axis not in self.axes]
        several = [None] * (array.ndim - len(batch))
        return placement.beside(array, self.logits, [*batch, *several])

    def all_beside(self, array: jax.Array) -> jax.Array:
        """Brings an array of the given shape to the sharding of the logits."""
        return array if self.logits is None else placement.beside(array, self.logits)

    def one_a_class(self, array: jax.Array) -> jax.Array:
        """Brings one number a class into the layout, to the sharding of the logits."""
        logits, ndim = self.logits, len(self.batch_shape) + 1
        if logits is not None and placement.on_explicit_mesh(logits, array) is not None:
            array = placement.beside(array, self.classes(logits), [self.axis])
        other = tuple(axis for axis in range(ndim) if axis != self.axis % ndim)
        return jnp.expand_dims(array, other)

    def rows(self, array: jax.Array) -> jax.Array:
        """Brings an array of the batch shape into the layout."""
        return jnp.expand_dims(array, self.axis)

    def squeeze(self, array: jax.Array) -> jax.Array:
        """Takes the class axis of size 1 off a result."""
        return jnp.squeeze(array, self.axis)


class Keep(NamedTuple):
    """The two masks that one `where` turns into."""

    classes: jax.Array | None
    rows: jax.Array | None
    count: jax.Array | None = None  # int32: kept classes a row, if they are masked


def read_logits(
    function: str,
    name: str,
    logits: ArrayLike,
    axis: Axis,
    class_axis_name: AxisName = None,
) -> tuple[jax.Array, Layout]:
    """Returns the logits (or log-probabilities, or probabilities) and their layout."""
    array = checks.as_array(function, name, logits)
    checks.check_floating(function, name, array)
    if array.ndim == 0:
        checks.fail(ValueError, function, name, "have a class axis", array.shape)
    axes = checks.canonical_axes(function, axis, array.ndim)
    checks.check_axis_name(function, "class_axis_name", class_axis_name)
    if class_axis_name is not None and len(axes) != 1:
        expected = "be one axis where class_axis_name shards it"
        checks.fail(ValueError, function, "axis", expected, repr(axis))
    layout = Layout(function, name, array.shape, axes, class_axis_name, array)
    if layout.num_classes == 0:
        checks.fail(ValueError, function, name, "have at least one class", array.shape)
    return layout.classes(array), layout


def read_where(layout: Layout, where: ArrayLike | None) -> Keep:
    """Returns the masks of the classes and of the rows that count.

    A row without a single kept class, on any shard, does not count.
    """
    if where is None:
        return Keep(None, None)
    mask = checks.as_array(layout.function, "where", where)
    checks.check_boolean(layout.function, "where", mask)
    if mask.shape == layout.shape:
        classes = layout.classes(layout.all_beside(mask))
        local = jnp.sum(classes, axis=layout.axis, keepdims=True, dtype=jnp.int32)
        count = layout.class_axis.total(local)
        return Keep(classes, count > 0, count)
    if mask.shape != layout.batch_shape:
        expected = (
            f"have shape {layout.batch_shape} ({layout.batch_meaning}) or "
            f"{layout.shape} (that of {layout.name})"
        )
        hint = _hint_for_mask(layout, mask)
        checks.fail(ValueError, layout.function, "where", expected, mask.shape, hint)
    return Keep(None, layout.rows(layout.rows_beside(mask)))


def count_classes(layout: Layout, keep: Keep, dtype: jnp.dtype) -> jax.Array:
    """Returns the number of kept classes, of all shards, at least 1."""
    dtype = accumulation_dtype(dtype)
    if keep.count is not None:
        return jnp.maximum(keep.count, 1).astype(dtype)
    return jnp.asarray(layout.class_axis.count(layout.num_classes), dtype)


def read_mask(
    function: str,
    where: ArrayLike | None,
    shape: Shape,
    meaning: str,
    logits: jax.Array | None = None,
) -> jax.Array | None:
    """Returns a mask of the shape of the logits, or of their leading axes."""
    if where is None:
        return None
    mask = checks.as_array(function, "where", where)
    checks.check_boolean(function, "where", mask)
    checks.check_shape(function, "where", mask, shape, meaning)
    return mask if logits is None else placement.beside(mask, logits)


def unwrapped_ids(labels: Any) -> Any:
    """Returns class ids that JAX does not wrap: what is beyond 32 bits is moved there.

    Without 64-bit types JAX would keep the low 32 bits of NumPy's ids, and of all that
    turns into NumPy arrays. The last number of 32 bits is no more of a class than they.
    """
    labels = checks.resolved(labels)
    if isinstance(labels, jax.Array):
        return labels
    if isinstance(labels, list | tuple):
        return [unwrapped_ids(one) for one in labels]
    last = np.iinfo(np.int32).max
    if isinstance(labels, int):
        return labels if -1 <= labels <= last else min(max(labels, -1), last)
    ids = labels
    if not isinstance(ids, np.ndarray | np.generic):
        # What NumPy cannot read is JAX's affair: it may be on a device.
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            ids = np.asarray(labels)
    if not isinstance(ids, np.ndarray | np.generic) or ids.dtype.kind not in "iu":
        return labels
    if ids.dtype.itemsize < 8:
        return ids
    return np.clip(ids, None if ids.dtype.kind == "u" else -1, last)


def read_class_ids(layout: Layout, labels: ArrayLike, keep: Keep) -> jax.Array:
    """Returns int32 ids: −1 for one outside the classes, 0 in a dropped row.

    Ids count over all shards.
    """
    num_classes = layout.class_axis.count(layout.num_classes)
    ids = checks.as_array(layout.function, "labels", unwrapped_ids(labels))
    hint = _hint_for_ids(layout, ids)
    checks.check_class_ids(layout.function, "labels", ids, hint)
    checks.check_shape(
        layout.function, "labels", ids, layout.batch_shape, layout.batch_meaning, hint
    )
    ids, inside = _inside(layout.rows_beside(ids), num_classes)
    ids = jnp.where(layout.rows(inside), layout.rows(ids), -1)
    return ids if keep.rows is None else jnp.where(keep.rows, ids, 0)


class SparseTargets(NamedTuple):
    """K class ids a row along the class axis, and their probabilities."""

    own: jax.Array  # int32, of size 1: the most probable id, −1 in an undefined row
    ids: jax.Array  # int32, −1 for padding
    probs: jax.Array  # in the accumulation dtype, 0 for padding


def read_sparse_targets(
    layout: Layout,
    names: tuple[str, str],
    indices: ArrayLike,
    probs: ArrayLike,
    keep: Keep,
    dtype: jnp.dtype,
) -> SparseTargets:
    """Returns K class ids a row; an id outside the classes has probability 0.

    Args:
      layout: of the logits.
      names: of the two arguments.
      indices: of the batch's shape and K.
      probs: likewise.
      keep: which rows count.
      dtype: of the logits.
    """
    ids = checks.as_array(layout.function, names[0], unwrapped_ids(indices))
    checks.check_class_ids(layout.function, names[0], ids)
    count = ids.shape[-1] if ids.ndim else 0
    if ids.shape != (*layout.batch_shape, count) or count == 0:
        sizes = "".join(f"{size}, " for size in layout.batch_shape)
        expected = f"have shape ({sizes}K) ({layout.batch_meaning}, ids a row)"
        checks.fail(ValueError, layout.function, names[0], expected, ids.shape)
    numbers = checks.as_real(layout.function, names[1], probs)
    meaning = f"that of {names[0]}"
    checks.check_shape(layout.function, names[1], numbers, ids.shape, meaning)
    ids, numbers = layout.rows_beside(ids), layout.rows_beside(numbers)
    ids, inside = _inside(ids, layout.class_axis.count(layout.num_classes))
    ids, inside, numbers = (
        jnp.moveaxis(array, -1, layout.axis)
        for array in (ids, inside, numbers.astype(accumulation_dtype(dtype)))
    )
    if keep.rows is not None:
        ids, numbers = jnp.where(keep.rows, ids, 0), jnp.where(keep.rows, numbers, 0)
        inside |= ~keep.rows
    undefined = jnp.any(~inside & (numbers != 0), axis=layout.axis, keepdims=True)
    numbers = jnp.where(inside, numbers, 0)
    lowest = jnp.finfo(numbers.dtype).min
    constant = jnp.where(inside, jax.lax.stop_gradient(numbers), lowest)
    most = constant == jnp.max(constant, axis=layout.axis, keepdims=True)
    own = jnp.max(jnp.where(most, ids, 0), axis=layout.axis, keepdims=True)
    own = jnp.where(undefined, -1, own)
    return SparseTargets(own, jnp.where(inside, ids, -1), numbers)


def _inside(ids: jax.Array, num_classes: Any) -> tuple[jax.Array, jax.Array]:
    """Returns int32 ids, 0 for one outside the classes, and which are inside.

    The range is checked in the caller's dtype: a narrower or wider integer never wraps
    into the classes.
    """
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(jnp.int32)
    inside = (ids >= 0) & (ids < num_classes)
    return jnp.where(inside, ids, 0).astype(jnp.int32), inside


def _hint_for_ids(layout: Layout, labels: jax.Array) -> str:
    """Returns what a message says about labels that are no class ids of the batch."""
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if integers and labels.shape == layout.kept_shape:
        axes = layout.axes[0] if len(layout.axes) == 1 else layout.axes
        return f"take the axis of size 1 off with jnp.squeeze(labels, {axes})"
    if labels.shape == layout.shape:
        return "softmax_cross_entropy takes a target for every class"
    if integers and layout.name == "hidden" and labels.ndim > len(layout.batch_shape):
        return "several ids a row need label_probs"
    for axis in range(len(layout.shape) if integers and labels.ndim > 1 else 0):
        others = layout.shape[:axis] + layout.shape[axis + 1 :]
        if labels.shape == others and axis not in layout.axes:
            return f"for classes on axis {axis} give axis={axis}"
    return "" if integers else "convert class ids with labels.astype(int32)"


def _hint_for_mask(layout: Layout, mask: jax.Array) -> str:
    """Returns what a message says about a mask that would broadcast to the logits."""
    try:
        fits = np.broadcast_shapes(mask.shape, layout.shape) == layout.shape
    except ValueError:
        fits = False
    return f"give jnp.broadcast_to(where, {layout.name}.shape)" if fits else ""


def _hint_for_targets(layout: Layout, labels: jax.Array) -> str:
    """Returns what a message says about class ids where targets are expected."""
    if labels.shape not in (layout.batch_shape, layout.kept_shape):
        return ""
    if layout.function == "categorical_cross_entropy":
        return "nll_loss of jnp.log(probs) takes class ids"
    return "softmax_cross_entropy_with_integer_labels takes class ids"


def read_targets(layout: Layout, labels: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """Returns dense targets in the accumulation dtype."""
    array = checks.as_real(layout.function, "labels", labels)
    meaning, hint = f"that of {layout.name}", _hint_for_targets(layout, array)
    checks.check_shape(layout.function, "labels", array, layout.shape, meaning, hint)
    array = layout.all_beside(array)
    return layout.classes(array.astype(accumulation_dtype(dtype)))
