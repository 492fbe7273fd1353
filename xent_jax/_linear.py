"""Softmax cross-entropy of a linear layer's logits, which are never held."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax import _arguments, _blocks, _linear_arguments
from xent_jax._label_terms import Coefficients, LabelConfig, combined
from xent_jax._layer import class_total
from xent_jax._linear_arguments import Head
from xent_jax._linear_sum import SumConfig, linear_loss_sum
from xent_jax._linear_terms import TermsConfig, linear_terms
from xent_jax._numerics import accumulation_dtype


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
    row_block: int | None = None,
    class_block: int | None = None,
) -> jax.Array:
    """Softmax cross-entropy of a linear layer's logits, which are never held, in nats.

        logits[n, v] = softcap·tanh((hidden[n]·kernel[:, v] + bias[v]) / softcap)
        loss[n]      = weights[n]·softmax_cross_entropy_with_integer_labels(logits)[n]

    What a language model's head and its loss come to, in the memory of a block of
    logits instead of all N·V of them. Without `softcap` the logits are plain.

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
    form holds 32 MiB of logits, or 1536 classes where that is more. `row_block` and
    `class_block` say otherwise.

    The matmuls run in the dtype of `hidden` and accumulate in float32, forward and
    backward; `jax.default_matmul_precision` applies. A kernel of another dtype is cast:
    as a whole in the first form, whose gradient leaves unrounded, a block at a time in
    the second. The second form rounds what each block adds to a gradient to the dtype
    of `hidden`, and adds it up in float32.

    In training loops:

    * Keep batch axes as leading axes of `hidden`. Under `jax.vmap` over examples every
      example would have its own kernel gradient.
    * Take the gradient inside a loop over microbatches, or checkpoint the loop's body;
      otherwise a kernel gradient is kept for every step.
    * A rematerialisation policy that saves dots, such as
      `jax.checkpoint_policies.dots_saveable`, saves the blocks of logits: leave the
      loss out of it.
    * With rows sharded over a mesh, use `jax.shard_map` or `reduction=None`: a scalar
      reduction under plain `jax.jit` gathers the rows of a block. Meshes of Explicit
      axes need `jax.shard_map`.
    * With a scalar reduction, a block of rows that `where` drops altogether does no
      matmul. That pays where dropped rows lie together, as prompts do in fine-tuning;
      under `jax.vmap` nothing is skipped.

    Args:
      hidden: `float[..., D]`. Features, with any number of batch axes.
      kernel: `float[D, V]`. As Flax has it; `embedding.T` for a tied embedding.
      labels: `int[...]`, the shape of `hidden` without its last axis. Class ids in
        `[0, V)`; any other id gives NaN in the loss and in that row's gradient, unless
        `where` drops the row.
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
      row_block: Rows a block, with a scalar reduction.
      class_block: Classes a block, with `reduction=None`.

    Returns:
      `float32[...]` (float64 for float64 features), one loss per row, or
      `float32[]`. Differentiable by `hidden`, `kernel`, `bias`, `weights`,
      `class_weights`, `label_smoothing`, `z_loss` and `softcap`, in every mode and
      order; gradients have the dtype of what they are taken by.

    Raises:
      TypeError: `hidden`, `kernel` or another number has no real dtype, `labels` are
        not integers, a mask is not boolean, a block size is not an integer.
      ValueError: A shape differs from what is said here (nothing is broadcast), there
        are no classes, an option is out of its range, `reduction` is none of the three,
        a block size is given that does not apply to it.

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
    _linear_arguments.check_reduction(function, reduction)
    head = _linear_arguments.read_head(
        function,
        hidden,
        kernel,
        labels,
        bias=bias,
        where=where,
        class_mask=class_mask,
        softcap=softcap,
        weights=weights,
        class_weights=class_weights,
    )
    rows, layer = head.rows, head.layer
    dtype = rows.hidden.dtype
    smoothing = _arguments.read_scalar(
        function, "label_smoothing", label_smoothing, dtype, highest=1
    )
    z_coefficient = _arguments.read_scalar(function, "z_loss", z_loss, dtype)
    label_weights = _label_weights(head)
    own, spread = label_weights, None
    if smoothing is not None:
        own = _times(1 - smoothing, own)
        count = class_total(layer._replace(class_weights=None), smoothing.dtype)
        spread = _times(head.weights, smoothing / jnp.maximum(count, 1))
    square = None if z_coefficient is None else _times(head.weights, z_coefficient)
    coefficients = Coefficients(own, spread, square)
    if reduction is None:
        expected = "be None with reduction=None, which is blocked by class_block"
        _linear_arguments.refuse_block(function, "row_block", row_block, expected)
        config = _terms_config(function, head, class_block, spread=spread is not None)
        terms = linear_terms(config, rows, layer).label
        return combined(terms, coefficients).reshape(head.batch_shape)
    expected = f"be None with reduction={reduction!r}, which is blocked by row_block"
    _linear_arguments.refuse_block(function, "class_block", class_block, expected)
    count, features = rows.hidden.shape
    itemsize = accumulation_dtype(dtype).itemsize
    default = _blocks.rows_per_block(count, features, layer.kernel.shape[1], itemsize)
    config = SumConfig(
        _linear_arguments.read_block(function, "row_block", row_block, default, count),
        LabelConfig(-1, spread is not None, square is not None),
        skip=where is not None,
    )
    ones = jnp.ones((count, 1), accumulation_dtype(dtype))
    coefficients = Coefficients(
        *(None if factor is None else factor * ones for factor in coefficients)
    )
    if coefficients.loss is None:
        coefficients = coefficients._replace(loss=ones)
    total = linear_loss_sum(config, rows, layer, coefficients)
    if reduction == "sum":
        return total
    mass = ones if label_weights is None else label_weights * ones
    if rows.keep is not None:
        mass = jnp.where(rows.keep, mass, 0)
    mass = jnp.sum(mass)
    return jnp.where(mass == 0, 0, total / jnp.where(mass == 0, 1, mass))


class SoftmaxStatistics(NamedTuple):
    """What `linear_softmax_statistics` returns, each of the shape of the labels.

    Attributes:
      log_prob: log-probability of the label, in nats.
      log_normalizer: log Σ_v exp(logits[v]).
      entropy: −Σ_v p_v log p_v, in nats.
      prediction: int32, the class of the largest logit.
    """

    log_prob: jax.Array
    log_normalizer: jax.Array
    entropy: jax.Array
    prediction: jax.Array


def linear_softmax_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    softcap: ArrayLike | None = None,
    class_block: int | None = None,
) -> SoftmaxStatistics:
    """Log-probability, log-normalizer, entropy and arg max of a linear layer's softmax.

        log_prob[n]       = logits[n, labels[n]] − log_normalizer[n]
        log_normalizer[n] = log Σ_v exp(logits[n, v])
        entropy[n]        = −Σ_v p[n, v]·log p[n, v],  p = softmax(logits)
        prediction[n]     = arg max_v logits[n, v]

    with the logits of `linear_softmax_cross_entropy`, in one pass that never holds
    them. Perplexity is `exp(−mean(log_prob))`, accuracy `mean(prediction == labels)`,
    a policy's ratio the exponential of a difference of `log_prob`.

    Cost: that of `linear_softmax_cross_entropy` with `reduction=None`: 1 matmul of
    N·D·V, 4 with the gradient.

    Args:
      hidden: `float[..., D]`. Features, with any number of batch axes.
      kernel: `float[D, V]`. As Flax has it; `embedding.T` for a tied embedding.
      labels: `int[...]`, the shape of `hidden` without its last axis. Class ids in
        `[0, V)`; any other id makes all numbers of its row NaN but the prediction.
      bias: `float[V]`. Added before the softcap.
      where: `bool[...]`, the shape of `labels`. Rows that count; a dropped row has 0
        for its numbers, gradient 0, and prediction −1.
      class_mask: `bool[V]`. Classes that count; a dropped one has probability 0 and is
        never predicted. The kernel's columns of dropped classes have to be finite.
      softcap: Positive. Keeps the logits within `±softcap`; applied before masks.
      class_block: Classes a block.

    Returns:
      `SoftmaxStatistics` of arrays of the shape of `labels`: three of float32 (float64
      for float64 features), in nats, differentiable by `hidden`, `kernel`, `bias` and
      `softcap` in every mode and order, and the int32 class ids `prediction`: the
      lowest of equally large ones, −1 where the largest logit is not finite.

    Raises:
      TypeError: `hidden` or `kernel` are not floating, `labels` not integers, a mask is
        not boolean, `class_block` is not an integer.
      ValueError: A shape differs from what is said here (nothing is broadcast), there
        are no classes, `softcap` or `class_block` is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import linear_softmax_statistics
      >>> jnp.set_printoptions(precision=4)
      >>> hidden = jnp.array([[1.0, 0.5], [-0.5, 2.0]])
      >>> kernel = jnp.array([[0.2, -1.0, 0.4], [1.0, 0.3, -0.6]])
      >>> statistics = linear_softmax_statistics(hidden, kernel, jnp.array([0, 2]))
      >>> print(statistics.log_prob)
      [-0.5659 -3.6962]
      >>> print(statistics.entropy)
      [0.9397 0.72  ]
      >>> print(statistics.prediction)
      [0 0]
    """
    function = "linear_softmax_statistics"
    head = _linear_arguments.read_head(
        function,
        hidden,
        kernel,
        labels,
        bias=bias,
        where=where,
        class_mask=class_mask,
        softcap=softcap,
    )
    config = _terms_config(
        function, head, class_block, spread=False, entropy=True, prediction=True
    )
    terms = linear_terms(config, head.rows, head.layer)
    statistics = SoftmaxStatistics(
        log_prob=0 - terms.label.loss,  # not −0
        log_normalizer=terms.label.log_normalizer,
        entropy=terms.entropy,
        prediction=terms.prediction,
    )
    return jax.tree.map(lambda array: array.reshape(head.batch_shape), statistics)


def _terms_config(
    function: str,
    head: Head,
    class_block: int | None,
    *,
    spread: bool,
    entropy: bool = False,
    prediction: bool = False,
) -> TermsConfig:
    count, classes = head.rows.hidden.shape[0], head.layer.kernel.shape[1]
    itemsize = accumulation_dtype(head.rows.hidden.dtype).itemsize
    default = _blocks.classes_per_block(count, classes, itemsize)
    size = _linear_arguments.read_block(
        function, "class_block", class_block, default, classes
    )
    return TermsConfig(size, spread, entropy, prediction)


def _label_weights(head: Head) -> jax.Array | None:
    """Returns the weight of each row and of its label's class, [N, 1]."""
    if head.layer.class_weights is None:
        return head.weights
    ids = jnp.maximum(head.rows.labels, 0)
    return _times(head.weights, head.layer.class_weights[0][ids])


def _times(left: jax.Array | None, right: jax.Array | None) -> jax.Array | None:
    """Returns the product; `None` stands for 1."""
    if left is None or right is None:
        return right if left is None else left
    return left * right
