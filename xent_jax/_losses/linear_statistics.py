"""Statistics of the softmax of a linear layer's logits, which are never held."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.typing import ArrayLike

from xent_jax._forms import head_arguments, meshes
from xent_jax._forms.rows import row_results
from xent_jax._losses.linear_forms import class_blocks_form
from xent_jax._losses.statistics import SoftmaxStatistics
from xent_jax._reductions.axis import AxisName
from xent_jax._targets.class_ids import ClassIds
from xent_jax._targets.rivals import WantedSums


@jax.named_scope("linear_softmax_statistics")
def linear_softmax_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    softcap: ArrayLike | None = None,
    class_axis_name: AxisName = None,
    class_block: int | None = None,
    temperature: ArrayLike | None = None,
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
    N·D·V, 4 with the gradient. So is what is sent with `class_axis_name`, but for 3
    numbers a row more: the sum for the entropy and, to agree on a prediction, two.

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
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the classes
        are sharded over: `kernel`, `bias` and `class_mask` are the device's slice,
        class ids count over all devices, and rows are the same along it.
      class_block: Classes a block (of a device).
      temperature: Positive; a number, or one a row in the shape of `labels`. Divides
        the logits in float32, after the softcap and before masks. What is not known
        when tracing is used as it is.

    Returns:
      `SoftmaxStatistics` of arrays of the shape of `labels`: three of float32 (float64
      for float64 features), in nats, differentiable by `hidden`, `kernel`, `bias`,
      `softcap` and `temperature` in every mode and order, and the int32 class ids
      `prediction`: the lowest of equally large ones, −1 where the largest logit is not
      finite.

    Raises:
      TypeError: `hidden` or `kernel` are not floating, `labels` not integers, a mask is
        not boolean, `class_block` is not an integer.
      ValueError: A shape differs from what is said here (nothing is broadcast), there
        are no classes, `softcap`, `temperature` or `class_block` is not positive,
        `class_axis_name` is of no mesh axis of this `jax.shard_map`, or `hidden` or
        `kernel` are sharded over their features on a mesh of Explicit axes.

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
    arguments = {
        "hidden": hidden,
        "kernel": kernel,
        "labels": labels,
        "bias": bias,
        "where": where,
        "class_mask": class_mask,
        "softcap": softcap,
        "temperature": temperature,
    }
    statistics = functools.partial(_statistics, function, class_block)
    names = {"class_axis_name": class_axis_name}
    return meshes.apply(function, statistics, arguments, names)


def _statistics(
    function: str, class_block: int | None, **arguments: Any
) -> SoftmaxStatistics:
    head = head_arguments.read_head(function, **arguments)
    kind = ClassIds(head.classes, WantedSums(entropy=True, prediction=True))
    form = class_blocks_form(function, head, class_block, kind)
    results = row_results(form, head.rows, head.layer)
    statistics = SoftmaxStatistics.of(results)
    return jax.tree.map(lambda array: array.reshape(head.batch_shape), statistics)
