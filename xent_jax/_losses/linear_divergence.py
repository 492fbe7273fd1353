"""The divergence of two linear layers' softmax, neither of whose logits are held."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
from jax.typing import ArrayLike

from xent_jax._forms import head_arguments, meshes
from xent_jax._forms.head_arguments import Head
from xent_jax._forms.rows import row_results
from xent_jax._losses.divergence import Direction, check_direction
from xent_jax._losses.linear_forms import (
    check_blocks,
    class_blocks_form,
    reduced_loss,
    row_blocks_form,
    rows_of,
)
from xent_jax._reductions.axis import AxisName
from xent_jax._targets.class_ids import Coefficients, combined
from xent_jax._targets.teacher import Teacher

_OF_TEACHER = ("teacher_hidden", "teacher_kernel", "teacher_bias", "teacher_softcap")


@jax.named_scope("linear_softmax_kl_divergence")
def linear_softmax_kl_divergence(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    reduction: Literal["mean", "sum"] | None = None,
    direction: Direction = "forward",
    temperature: ArrayLike | None = None,
    softcap: ArrayLike | None = None,
    teacher_softcap: ArrayLike | None = None,
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    row_block: int | None = None,
    class_block: int | None = None,
) -> jax.Array:
    """KL divergence of two linear layers' softmax, without their logits, in nats.

        logits[n, v]  = (hidden[n]·kernel[:, v] + bias[v]) / temperature[n]
        teacher[n, v] = (teacher_hidden[n]·teacher_kernel[:, v] + teacher_bias[v])
                        / temperature[n]
        loss[n]       = weights[n]·softmax_kl_divergence(logits, teacher)[n]

    Distillation over a whole vocabulary, self-distillation, a draft model, or the
    distance to a reference policy, in the memory of a block of either's logits. With
    `softcap`, logits are capped before the temperature divides them. Hidden sizes and
    dtypes of the two may differ; the vocabulary, its mask and its sharding are shared.
    The teacher is a constant, and so is the temperature. There is no factor
    temperature².

    Two forms, by `reduction`, with the blocks of `linear_softmax_cross_entropy`:

    * `"mean"` and `"sum"` go over blocks of rows and make the gradient together with
      the loss: 4 matmuls of N·D·V for value and gradient, the teacher's and three of
      the student's. All classes of a row are at hand, so that the divergence of near
      distributions keeps its digits without a further sweep.
    * `None` goes over blocks of classes and makes each block again for the gradient:
      6 matmuls, 2 for the value. It takes the least memory. The digits of near
      distributions are kept by a pivot from the first 128 classes.

    Args:
      hidden: `float[..., D]`. The student's features, with any number of batch axes.
      kernel: `float[D, V]`. Inside `shard_map` this and all else of size V is the
        device's slice.
      teacher_hidden: `float[..., E]`, of the batch axes of `hidden`.
      teacher_kernel: `float[E, V]`.
      bias: `float[V]`. Added to the student's logits.
      teacher_bias: `float[V]`. Added to the teacher's logits.
      where: `bool[...]`, the shape of the batch. Rows that count; a dropped row has
        loss and gradient exactly 0, whatever it holds.
      weights: Real numbers of the batch's shape. Weight of each row. A row of weight 0
        adds exactly 0, even if its features are not finite; only `where` saves work.
      class_mask: `bool[V]`. Classes that count in both distributions. The kernels'
        columns of dropped classes have to be finite.
      reduction: `None` for a loss a row, `"sum"`, or `"mean"`:
        `Σ weights·loss / Σ weights` over the kept rows, 0 when these weights sum to 0.
      direction: `"forward"`, KL(teacher ‖ student), or `"reverse"`, KL(student ‖
        teacher).
      temperature: Positive; a number, or one a row in the shape of the batch. Divides
        both logits, in float32.
      softcap: Positive. Keeps the student's logits within `±softcap`.
      teacher_softcap: Positive. Keeps the teacher's logits within it.
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the classes
        are sharded over; rows are the same along it.
      batch_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the rows are
        sharded over, for a scalar reduction: the sum or the mean over all devices.
      row_block: Rows a block (of a device), with a scalar reduction.
      class_block: Classes a block (of a device), with `reduction=None`.

    Returns:
      `float32[...]` (float64 for float64 features), one divergence per row, or
      `float32[]`. Differentiable by `hidden`, `kernel`, `bias`, `weights` and
      `softcap`, in every mode and order.

    Raises:
      TypeError: An argument has no real dtype, a mask is not boolean, a block size is
        not an integer.
      ValueError: A shape differs from what is said here (nothing is broadcast), there
        are no classes, an option is out of its range, `reduction` or `direction` is
        none of those named, a block size or `batch_axis_name` is given that does not
        apply, a name is of no mesh axis of this `jax.shard_map`, or features are
        sharded on a mesh of Explicit axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import linear_softmax_kl_divergence
      >>> jnp.set_printoptions(precision=4)
      >>> kernel = jnp.array([[0.2, -1.0, 0.4], [1.0, 0.3, -0.6]])
      >>> student = jnp.array([[1.0, 0.5], [-0.5, 2.0]])
      >>> teacher = jnp.array([[1.0, 1.0], [-0.5, 2.0]])
      >>> print(linear_softmax_kl_divergence(student, kernel, teacher, kernel))
      [0.0534 0.    ]
    """
    function = "linear_softmax_kl_divergence"
    head_arguments.check_reduction(function, reduction)
    check_direction(function, direction)
    arguments = {
        "hidden": hidden,
        "kernel": kernel,
        "teacher_hidden": teacher_hidden,
        "teacher_kernel": teacher_kernel,
        "bias": bias,
        "teacher_bias": teacher_bias,
        "where": where,
        "weights": weights,
        "class_mask": class_mask,
        "temperature": temperature,
        "softcap": softcap,
        "teacher_softcap": teacher_softcap,
    }
    static = reduction, direction == "reverse", (row_block, class_block)
    compute = functools.partial(_divergence, function, *static)
    names = {"class_axis_name": class_axis_name, "batch_axis_name": batch_axis_name}
    results = "n" if reduction is None else ""
    return meshes.apply(
        function, compute, arguments, names, read=_read, results=results
    )


def _read(function: str, **arguments: Any) -> Head:
    """Returns the checked arguments of both layers."""
    teacher = {name: arguments.pop(name) for name in _OF_TEACHER}
    head = head_arguments.read_head(function, teacher=teacher, **arguments)
    fixed = jax.tree.map(jax.lax.stop_gradient, head.rows.options)
    return head._replace(rows=head.rows._replace(options=fixed))


def _divergence(
    function: str,
    reduction: str | None,
    reverse: bool,
    blocks: tuple[int | None, int | None],
    *,
    batch_axis_name: AxisName = None,
    **arguments: Any,
) -> jax.Array:
    check_blocks(
        function, reduction, blocks, batch_axis_name, arguments["class_axis_name"]
    )
    head = _read(function, **arguments)
    kind = Teacher(head.classes, reverse)
    coefficients = Coefficients(head.weights, None, None)
    if reduction is None:
        form = class_blocks_form(function, head, blocks[1], kind)
        results = row_results(form, head.rows, head.layer)
        return combined(results, coefficients).reshape(head.batch_shape)
    skip = arguments["where"] is not None
    form = row_blocks_form(function, head, blocks[0], kind, skip=skip)
    coefficients = rows_of(head, coefficients)
    mass = coefficients.loss if reduction == "mean" else None
    return reduced_loss(form, head, coefficients, mass, batch_axis_name)[0]
