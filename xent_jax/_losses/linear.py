"""Softmax cross-entropy of a linear layer's logits, which are never held."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
from jax.typing import ArrayLike

from xent_jax._arguments import checks
from xent_jax._forms import head_arguments, meshes
from xent_jax._losses.linear_forms import linear_loss
from xent_jax._reductions.axis import AxisName


@jax.named_scope("linear_softmax_cross_entropy")
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    reduction: Literal["mean", "sum"] | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    row_block: int | None = None,
    class_block: int | None = None,
    label_probs: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    with_statistics: bool = False,
) -> Any:
    """Softmax cross-entropy of a linear layer's logits, which are never held, in nats.

        capped[n, v] = softcap·tanh((hidden[n]·kernel[:, v] + bias[v]) / softcap)
        logits[n, v] = capped[n, v] / temperature[n]
        loss[n]      = weights[n]·softmax_cross_entropy_with_integer_labels(logits)[n]

    What a language model's head and its loss come to, in the memory of a block of
    logits instead of all N·V of them. Without `softcap` and `temperature` the logits
    are plain. With `label_probs` a row has K class ids with probabilities, as the top
    of a teacher's softmax, and the loss is that of
    `softmax_cross_entropy_with_sparse_targets`.

    Two forms, by `reduction`:

    * `"mean"` and `"sum"` go over blocks of rows and make the gradient together with
      the loss: 3 matmuls of N·D·V for value and gradient, as many as with logits, 2
      with a frozen kernel or frozen features, 1 for the value alone. The kernel's
      gradient is added up in float32, which takes 4·D·V bytes.
    * `None` goes over blocks of classes and makes each block again for the gradient:
      4 matmuls, 1 for the value. It reads the kernel once a pass and keeps a few
      numbers a row, so it takes the least memory.

    Memory: a block of the first form holds logits of half the size of the kernel (in
    float32), but not of more than 1024 rows, and at least 64 MiB. A block of the second
    form holds 32 MiB of logits, or 1536 classes where that is more; for the gradient
    of 16-bit features, with one label a row, half as many again. `row_block` and
    `class_block` say otherwise.

    The matmuls run in the dtype of `hidden` and accumulate in float32, forward and
    backward; `jax.default_matmul_precision` applies. A kernel of another dtype is cast:
    as a whole in the first form, whose gradient leaves unrounded, a block at a time in
    the second. Gradients add up in float32. In the second form, what a block adds is
    rounded to the dtype of `hidden` before, except on a CPU, where its backward matmuls
    are of float32.

    On a TPU v5e, v5p, v6e or 7x, value and gradient are made by kernels written in
    Pallas, which keep logits in vector memory. They are for features of bfloat16 whose
    number is a multiple of 128, a kernel of bfloat16 or float32, gradients by both (in
    the second form, by one of them or more), none by `class_weights`, one label a row,
    no `softcap`, no `temperature` and no statistics; in a program for one device, or
    inside a `jax.shard_map` over all axes of the mesh. All else is done by XLA, as it
    is on other chips, under `jax.vmap`, in exported programs and for forward mode and
    higher derivatives. The kernels choose their blocks themselves. In the first form
    they round gradients to the dtypes of `hidden` and `kernel` before these are
    multiplied by the derivative of what is made of the loss; in the second, which adds
    the kernel's gradient up in vector memory, nothing is rounded but the slope of every
    logit, once, and the result. The environment variable
    `XENT_JAX_TPU_KERNELS=0`, set before a program is compiled, turns them off.

    In training loops:

    * Keep batch axes as leading axes of `hidden`. Under `jax.vmap` over examples every
      example would have its own kernel gradient.
    * Take the gradient inside a loop over microbatches, or checkpoint the loop's body;
      otherwise a kernel gradient is kept for every step.
    * A rematerialisation policy that saves dots, such as
      `jax.checkpoint_policies.dots_saveable`, saves the blocks of logits: leave the
      loss out of it.
    * With a scalar reduction, a block of rows that `where` drops altogether does no
      matmul. That pays where dropped rows lie together, as prompts do in fine-tuning;
      under `jax.vmap`, and with `class_axis_name`, nothing is skipped.

    On a mesh, call it inside `jax.shard_map`: rows sharded over `batch_axis_name`,
    classes over `class_axis_name`, or both. Every device goes over its rows and its
    slice of the kernel, and nothing but sums is sent. With N rows a device, value and
    gradient take

    * for `class_axis_name`, an all-reduce of 1 and one of 2 float32 numbers a row (4
      more for smoothing, 1 for class weights), block by block with a scalar reduction,
      and one of the features' gradient, N·D numbers; with `reduction=None` and
      `check_vma=False` one more of a few numbers a row;
    * for `batch_axis_name`, one of what a device holds of the kernel's gradient;
    * and a few single numbers.

    With `check_vma=False` take gradients outside of the
    `shard_map`: inside, JAX would sum them over the mesh once more. Without it,

    * on a mesh of Explicit axes this is what happens by itself: rows are sharded as
      `hidden`, classes as `kernel`;
    * on Auto axes a scalar reduction without `where` is as good with rows, classes or
      both sharded: mask rows by `weights`. With `where`, the rows of a block are
      gathered, and with `reduction=None` and sharded classes the kernel is.

    Args:
      hidden: `float[..., D]`. Features, with any number of batch axes.
      kernel: `float[D, V]`. As Flax has it; `embedding.T` for a tied embedding. Inside
        `shard_map` this and all else of size V is the device's slice.
      labels: `int[...]`, the shape of `hidden` without its last axis. Class ids in
        `[0, V)`; any other id gives NaN in the loss and in that row's gradient, unless
        `where` drops the row. With `label_probs`, `int[..., K]`.
      bias: `float[V]`. Added before the softcap.
      where: `bool[...]`, the shape of `labels`. Rows that count; a dropped row has loss
        and gradient exactly 0, whatever it holds.
      weights: Real numbers of the shape of `labels`. Weight of each row. A row of
        weight 0 adds exactly 0, even if its features are not finite or its label is no
        class id; only `where` saves work.
      class_mask: `bool[V]`. Classes that count, as of a padded vocabulary; a dropped
        class has probability 0 and gradient 0, and a label that names one has loss
        `+inf`. The kernel's columns of dropped classes have to be finite.
      reduction: `None` for a loss a row, `"sum"`, or `"mean"`:
        `Σ weights·loss / Σ weights·class_weights[labels]` over the kept rows, 0 when
        these weights sum to 0.
      label_smoothing: In [0, 1]. Spread over the V (kept) classes.
      class_weights: `float[V]`. Multiplies the targets, smoothing term included.
      z_loss: Non-negative coefficient of `log_normalizer²`, which is added.
      softcap: Positive. Keeps the logits within `±softcap`; applied before masks.
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the classes
        are sharded over; rows are the same along it. Class ids, the V of smoothing and
        the masks then count over all devices. Pad V to a multiple of their number, with
        a `class_mask` that is false there.
      batch_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the rows are
        sharded over, for a scalar reduction: the sum or the mean over all devices, also
        where their weights differ.
      row_block: Rows a block (of a device), with a scalar reduction. Not of the
        kernels for TPUs.
      class_block: Classes a block (of a device), with `reduction=None`.
      label_probs: `[..., K]`, the shape of `labels`. Probability of each id; ids and
        probabilities mean what they do in `softmax_cross_entropy_with_sparse_targets`.
        A mean then divides by the sum of the `weights` of the rows alone.
      temperature: Positive; a number, or one a row in the shape of `labels` without K.
        Divides the logits in float32, after the softcap and before masks. What is not
        known when tracing is used as it is.
      with_statistics: Whether to return `SoftmaxStatistics` too.

    Returns:
      `float32[...]` (float64 for float64 features), one loss per row, or
      `float32[]`. Differentiable by `hidden`, `kernel`, `bias`, `weights`,
      `class_weights`, `label_smoothing`, `z_loss`, `softcap`, `label_probs` and
      `temperature`, in every mode and order; gradients have the dtype of what they are
      taken by.

      With `with_statistics`, the loss and the `SoftmaxStatistics` of every row, as
      `linear_softmax_statistics` returns them, of the logits as the loss has them, from
      the same matmuls: `jax.value_and_grad(..., has_aux=True)` takes the pair. With
      several ids a row their label is the most probable one. With `reduction=None` the
      statistics are differentiable, with a mean or a sum they are constants.

    Raises:
      TypeError: `hidden`, `kernel` or another number has no real dtype, `labels` are
        not integers, a mask is not boolean, a block size is not an integer,
        `with_statistics` is not a Python boolean.
      ValueError: A shape differs from what is said here (nothing is broadcast), there
        are no classes, an option is out of its range, `reduction` is none of the three,
        a block size or `batch_axis_name` is given that does not apply to it, a name is
        of no mesh axis of this `jax.shard_map`, or `hidden` or `kernel` are sharded
        over their features on a mesh of Explicit axes.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from xent_jax import linear_softmax_cross_entropy
      >>> jnp.set_printoptions(precision=4)
      >>> hidden = jnp.array([[1.0, 0.5], [-0.5, 2.0], [0.0, 1.0]])
      >>> kernel = jnp.array([[0.2, -1.0, 0.4], [1.0, 0.3, -0.6]])
      >>> labels = jnp.array([0, 2, -100])
      >>> print(linear_softmax_cross_entropy(
      ...     hidden, kernel, labels, where=labels != -100
      ... ))
      [0.5659 3.6962 0.    ]
      >>> loss, gradients = jax.value_and_grad(
      ...     lambda h, k: linear_softmax_cross_entropy(
      ...         h, k, labels, where=labels != -100, reduction="mean"
      ...     ),
      ...     argnums=(0, 1),
      ... )(hidden, kernel)
      >>> print(f"{loss:.4f}")
      2.1311

    References:
      Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, 2025.
      Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018.
      Gemma Team, *Gemma 2*, 2024, section 2 (softcap).
    """
    function = "linear_softmax_cross_entropy"
    head_arguments.check_reduction(function, reduction)
    checks.check_flag(function, "with_statistics", with_statistics)
    arguments = {
        "hidden": hidden,
        "kernel": kernel,
        "labels": labels,
        "bias": bias,
        "where": where,
        "weights": weights,
        "class_mask": class_mask,
        "label_smoothing": label_smoothing,
        "class_weights": class_weights,
        "z_loss": z_loss,
        "softcap": softcap,
        "label_probs": label_probs,
        "temperature": temperature,
    }
    blocks = row_block, class_block
    loss = functools.partial(
        linear_loss, function, reduction, blocks, with_statistics=with_statistics
    )
    names = {"class_axis_name": class_axis_name, "batch_axis_name": batch_axis_name}
    loss_axes = "n" if reduction is None else ""
    results = (loss_axes, "n") if with_statistics else loss_axes
    return meshes.apply(function, loss, arguments, names, results=results)
