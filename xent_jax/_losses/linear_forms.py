"""The loss of a linear head, from its arguments: what every option comes to."""

from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._arguments import checks
from xent_jax._forms import head_arguments
from xent_jax._forms.class_blocks import ClassBlocks
from xent_jax._forms.head import class_total
from xent_jax._forms.head_arguments import Head
from xent_jax._forms.row_blocks import linear_loss_sum
from xent_jax._forms.row_gradients import RowBlocks
from xent_jax._forms.rows import row_results
from xent_jax._forms.sizes import (
    SHARE_OF_A_TEACHER,
    SHARE_OF_LABELS,
    classes_per_block,
    rows_per_block,
)
from xent_jax._losses.statistics import SoftmaxStatistics
from xent_jax._reductions.axis import AxisName, ClassAxis, psum
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets.class_ids import ClassIds, Coefficients, Results, combined
from xent_jax._targets.rivals import WantedSums


def linear_loss(
    function: str,
    reduction: str | None,
    blocks: tuple[int | None, int | None],
    *,
    with_statistics: bool = False,
    batch_axis_name: AxisName = None,
    **arguments: Any,
) -> Any:
    """Returns the loss of `linear_softmax_cross_entropy`, and the statistics if wanted.

    Args:
      function: what messages call it.
      reduction: `None`, "mean" or "sum".
      blocks: the caller's `row_block` and `class_block`.
      with_statistics: as the caller's.
      batch_axis_name: as the caller's.
      **arguments: of `read_head`.
    """
    check_blocks(
        function, reduction, blocks, batch_axis_name, arguments["class_axis_name"]
    )
    head = head_arguments.read_head(function, **arguments)
    label_weights = _label_weights(head)
    coefficients = _coefficients(head, label_weights)
    wanted = WantedSums(
        uniform=coefficients.uniform is not None,
        entropy=with_statistics,
        prediction=with_statistics,
    )
    kind = ClassIds(head.classes, wanted)
    if reduction is None:
        form = class_blocks_form(function, head, blocks[1], kind)
        results = row_results(form, head.rows, head.layer)
        loss = combined(results, coefficients).reshape(head.batch_shape)
    else:
        skip = arguments["where"] is not None
        form = row_blocks_form(function, head, blocks[0], kind, skip=skip)
        form = form._replace(statistics=with_statistics)
        mass = None
        if reduction == "mean":
            # Of targets that are several ids, the weights of the rows alone.
            mass = label_weights if head.label_probs is None else head.weights
            mass = _ones(head) if mass is None else mass * _ones(head)
        coefficients = rows_of(head, coefficients)
        loss, results = reduced_loss(form, head, coefficients, mass, batch_axis_name)
    return (loss, _statistics(head, results)) if with_statistics else loss


def _ones(head: Head) -> jax.Array:
    """Returns 1 for every row, [N, 1]."""
    hidden = head.rows.hidden
    return jnp.ones((hidden.shape[0], 1), accumulation_dtype(hidden.dtype))


def rows_of(head: Head, coefficients: Coefficients) -> Coefficients:
    """Returns the coefficients as numbers of every row; one of them is the loss's."""
    coefficients = jax.tree.map(lambda factor: factor * _ones(head), coefficients)
    if coefficients.loss is None and coefficients.others is None:
        return coefficients._replace(loss=_ones(head))
    return coefficients


def reduced_loss(
    form: RowBlocks,
    head: Head,
    coefficients: Coefficients,
    mass: jax.Array | None,
    batch_axis_name: AxisName,
) -> tuple[jax.Array, Any]:
    """Returns the sum over the rows, or the mean, and the results of the rows.

    Args:
      form: of the head.
      head: the arguments.
      coefficients: [N, 1].
      mass: [N, 1]; the mean divides by its sum over the kept rows of all devices.
      batch_axis_name: the mesh axes that rows are sharded over.
    """
    divisor = None
    if mass is not None:
        if head.rows.keep is not None:
            mass = jnp.where(head.rows.keep, mass, 0)
        mass = psum(jnp.sum(mass), batch_axis_name)
        divisor = jnp.where(mass == 0, 1, mass)
    # A division of the kernel's gradient would be a pass over it, but the gradients of
    # logits that are divided would underflow in float16.
    early = divisor is not None and head.rows.hidden.dtype != jnp.float16
    if early:
        coefficients = jax.tree.map(lambda factor: factor / divisor, coefficients)
    total, results = linear_loss_sum(form, head.rows, head.layer, coefficients)
    total = psum(total, batch_axis_name)
    if divisor is None:
        return total, results
    return jnp.where(mass == 0, 0, total if early else total / divisor), results


def _statistics(head: Head, results: Results) -> SoftmaxStatistics:
    """Returns the statistics of all rows, in the shape of the batch."""
    statistics = SoftmaxStatistics.of(results)
    return jax.tree.map(lambda array: array.reshape(head.batch_shape), statistics)


def class_blocks_form(
    function: str, head: Head, class_block: int | None, kind: Any
) -> ClassBlocks:
    """Returns the form of a result per row, for the caller's block size."""
    count, classes = head.rows.hidden.shape[0], head.layer.kernel.shape[1]
    itemsize = accumulation_dtype(head.rows.hidden.dtype).itemsize
    # With a teacher or several labels a row, a block has more tiles than one.
    is_pair = head.layer.teacher is not None or head.label_probs is not None
    narrow = head.rows.hidden.dtype.itemsize == 2 and not is_pair
    size, tangent_size = (
        head_arguments.read_block(
            function,
            "class_block",
            class_block,
            classes_per_block(count, classes, itemsize, narrow=of_tangent),
            classes,
        )
        for of_tangent in (False, narrow)
    )
    return ClassBlocks(kind, size, tangent_size)


def row_blocks_form(
    function: str, head: Head, row_block: int | None, kind: Any, *, skip: bool
) -> RowBlocks:
    """Returns the form of a sum over the rows, for the caller's block size."""
    count, features = head.rows.hidden.shape
    itemsize = accumulation_dtype(head.rows.hidden.dtype).itemsize
    share = 1.0
    if head.layer.teacher is not None:
        share = SHARE_OF_A_TEACHER
    elif head.label_probs is not None:
        share = SHARE_OF_LABELS
    classes = head.layer.kernel.shape[1]
    default = rows_per_block(count, features, classes, itemsize, share)
    size = head_arguments.read_block(function, "row_block", row_block, default, count)
    return RowBlocks(kind, size, skip and head.classes.axis_name is None)


def check_blocks(
    function: str,
    reduction: str | None,
    blocks: tuple[int | None, int | None],
    batch_axis_name: AxisName,
    class_axis_name: AxisName,
) -> None:
    """Raises for a block size, or a mesh axis, that does not go with the reduction."""
    if reduction is None:
        expected = "be None with reduction=None, which is blocked by class_block"
        head_arguments.refuse_block(function, "row_block", blocks[0], expected)
    else:
        by = f"reduction={reduction!r}, which is blocked by row_block"
        expected = f"be None with {by}"
        head_arguments.refuse_block(function, "class_block", blocks[1], expected)
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


def _coefficients(head: Head, label_weights: jax.Array | None) -> Coefficients:
    """Returns what the results are multiplied by, which broadcasts to [N, 1]."""
    smoothing, z_loss = head.options["label_smoothing"], head.options["z_loss"]
    own, uniform, others = label_weights, None, None
    if head.label_probs is not None:
        others = _times(label_weights, head.label_probs)
        own = None
    if smoothing is not None:
        if others is not None:
            others = (1 - smoothing) * others
        else:
            own = _times(1 - smoothing, own)
        unweighted = head.layer._replace(class_weights=None)
        count = class_total(unweighted, smoothing.dtype, head.classes)
        uniform = _times(head.weights, smoothing / jnp.maximum(count, 1))
    square = None if z_loss is None else _times(head.weights, z_loss)
    return Coefficients(own, uniform, square, others)


def _label_weights(head: Head) -> jax.Array | None:
    """Returns the weight of each row and of its label's class, [N, 1] or [N, K].

    The weight of a dropped class that is one of several labels is 0: it does not count.
    """
    labels = head.rows.target
    if labels.others is not None:
        return _other_weights(head, jnp.maximum(labels.others.ids, 0))
    weights, ids = head.layer.class_weights, jnp.maximum(labels.own, 0)
    if weights is None:
        return head.weights
    return _times(head.weights, _of_ids(head.classes, weights[0], ids))


def _other_weights(head: Head, ids: jax.Array) -> jax.Array | None:
    mask, weights = head.layer.class_mask, head.layer.class_weights
    if mask is not None:
        weights = jnp.where(mask, 1 if weights is None else weights, 0)
        weights = weights.astype(accumulation_dtype(head.rows.hidden.dtype))
    if weights is None:
        return head.weights
    return _times(head.weights, _of_ids(head.classes, weights[0], ids))


def _of_ids(classes: ClassAxis, numbers: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns numbers of classes by their ids, which count over all shards."""
    if classes.axis_name is None:
        return numbers[ids]
    here = ids - classes.first(numbers.size)
    own = numbers.at[here].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return psum(own, classes.axis_name)


def _times(left: jax.Array | None, right: jax.Array | None) -> jax.Array | None:
    """Returns the product; `None` stands for 1."""
    if left is None or right is None:
        return right if left is None else left
    return left * right
