"""The loss of a linear head, from its arguments: what every option comes to."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import arrays, checks
from xent_jax._forms import head_arguments
from xent_jax._forms.class_blocks import ClassBlocks
from xent_jax._forms.head import class_total
from xent_jax._forms.head_arguments import Head
from xent_jax._forms.row_blocks import RowBlocks, linear_loss_sum
from xent_jax._forms.rows import row_results
from xent_jax._forms.sizes import classes_per_block, rows_per_block
from xent_jax._reductions.axis import AxisName, ClassAxis, psum
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets.class_ids import ClassIds, Coefficients, combined


def linear_loss(
    function: str,
    reduction: str | None,
    blocks: tuple[int | None, int | None],
    *,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
    batch_axis_name: AxisName = None,
    **arguments: Any,
) -> jax.Array:
    """Returns the loss of `linear_softmax_cross_entropy`.

    Args:
      function: what messages call it.
      reduction: `None`, "mean" or "sum".
      blocks: the caller's `row_block` and `class_block`.
      label_smoothing: as the caller's.
      z_loss: as the caller's.
      batch_axis_name: as the caller's.
      **arguments: of `read_head`.
    """
    _check_batch_axis(
        function, reduction, batch_axis_name, arguments["class_axis_name"]
    )
    head = head_arguments.read_head(function, **arguments)
    label_weights = _label_weights(head)
    coefficients = _coefficients(function, head, label_weights, label_smoothing, z_loss)
    uniform = coefficients.uniform is not None
    row_block, class_block = blocks
    if reduction is None:
        expected = "be None with reduction=None, which is blocked by class_block"
        head_arguments.refuse_block(function, "row_block", row_block, expected)
        kind = ClassIds(head.classes, uniform)
        form = class_blocks_form(function, head, class_block, kind)
        results = row_results(form, head.rows, head.layer)
        return combined(results, coefficients).reshape(head.batch_shape)
    expected = f"be None with reduction={reduction!r}, which is blocked by row_block"
    head_arguments.refuse_block(function, "class_block", class_block, expected)
    count, features = head.rows.hidden.shape
    dtype = accumulation_dtype(head.rows.hidden.dtype)
    classes = head.layer.kernel.shape[1]
    default = rows_per_block(count, features, classes, dtype.itemsize)
    form = RowBlocks(
        ClassIds(head.classes, uniform),
        head_arguments.read_block(function, "row_block", row_block, default, count),
        skip=arguments["where"] is not None and head.classes.axis_name is None,
    )
    ones = jnp.ones((count, 1), dtype)
    if coefficients.loss is None:
        coefficients = coefficients._replace(loss=ones)
    if reduction == "sum":
        return psum(_sum(form, head, coefficients, ones), batch_axis_name)
    mass = ones if label_weights is None else label_weights * ones
    return _mean(form, head, coefficients, mass, batch_axis_name)


def _mean(
    form: RowBlocks,
    head: Head,
    coefficients: Coefficients,
    mass: jax.Array,
    batch_axis_name: AxisName,
) -> jax.Array:
    """Returns the sum of the losses over the sum of their masses, [N, 1]; 0 for 0."""
    if head.rows.keep is not None:
        mass = jnp.where(head.rows.keep, mass, 0)
    ones, mass = jnp.ones_like(mass), psum(jnp.sum(mass), batch_axis_name)
    divisor = jnp.where(mass == 0, 1, mass)
    if head.rows.hidden.dtype == jnp.float16:
        # Gradients of logits that are that small would underflow.
        total = psum(_sum(form, head, coefficients, ones), batch_axis_name)
        return jnp.where(mass == 0, 0, total / divisor)
    # A division after it would be a pass over the kernel's gradient.
    total = _sum(form, head, coefficients, ones / divisor)
    return jnp.where(mass == 0, 0, psum(total, batch_axis_name))


def _sum(
    form: RowBlocks, head: Head, coefficients: Coefficients, factor: jax.Array
) -> jax.Array:
    """Returns the sum over the rows of `factor` times their losses.

    Args:
      form: static.
      head: of N rows.
      coefficients: of shapes that broadcast to [N, 1].
      factor: [N, 1].
    """
    coefficients = jax.tree.map(lambda numbers: numbers * factor, coefficients)
    return linear_loss_sum(form, head.rows, head.layer, coefficients)


def class_blocks_form(
    function: str, head: Head, class_block: int | None, kind: ClassIds
) -> ClassBlocks:
    """Returns the form of a result per row, for the caller's block size."""
    count, classes = head.rows.hidden.shape[0], head.layer.kernel.shape[1]
    itemsize = accumulation_dtype(head.rows.hidden.dtype).itemsize
    default = classes_per_block(count, classes, itemsize)
    size = head_arguments.read_block(
        function, "class_block", class_block, default, classes
    )
    return ClassBlocks(kind, size)


def _check_batch_axis(
    function: str,
    reduction: str | None,
    batch_axis_name: AxisName,
    class_axis_name: AxisName,
) -> None:
    checks.check_axis_name(function, "batch_axis_name", batch_axis_name)
    if batch_axis_name is None:
        return
    if reduction is None:
        expected = "be None with reduction=None, which sums over no rows"
        got = repr(batch_axis_name)
        checks.fail(ValueError, function, "batch_axis_name", expected, got)
    names = ClassAxis(-1, batch_axis_name).names
    if set(names) & set(ClassAxis(-1, class_axis_name).names):
        expected = f"name other mesh axes than class_axis_name={class_axis_name!r}"
        got = repr(batch_axis_name)
        checks.fail(ValueError, function, "batch_axis_name", expected, got)


def _coefficients(
    function: str,
    head: Head,
    label_weights: jax.Array | None,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
) -> Coefficients:
    """Returns what the terms are multiplied by, of shapes that broadcast to [N, 1]."""
    dtype = head.rows.hidden.dtype
    smoothing = arrays.read_scalar(
        function, "label_smoothing", label_smoothing, dtype, highest=1
    )
    z_coefficient = arrays.read_scalar(function, "z_loss", z_loss, dtype)
    own, uniform = label_weights, None
    if smoothing is not None:
        own = _times(1 - smoothing, own)
        unweighted = head.layer._replace(class_weights=None)
        count = class_total(unweighted, smoothing.dtype, head.classes)
        uniform = _times(head.weights, smoothing / jnp.maximum(count, 1))
    square = None if z_coefficient is None else _times(head.weights, z_coefficient)
    return Coefficients(own, uniform, square)


def _label_weights(head: Head) -> jax.Array | None:
    """Returns the weight of each row and of its label's class, [N, 1]."""
    if head.layer.class_weights is None:
        return head.weights
    weights, ids = head.layer.class_weights[0], jnp.maximum(head.rows.labels, 0)
    if head.classes.axis_name is None:
        return _times(head.weights, weights[ids])
    here = ids - head.classes.first(weights.size)
    own = weights.at[here].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return _times(head.weights, head.classes.total(own))


def _times(left: jax.Array | None, right: jax.Array | None) -> jax.Array | None:
    """Returns the product; `None` stands for 1."""
    if left is None or right is None:
        return right if left is None else left
    return left * right
