"""Statistics of the softmax of given logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import arrays
from xent_jax._arguments.arrays import Axis
from xent_jax._forms.logits_arguments import read_given
from xent_jax._forms.rows import Given, row_results
from xent_jax._reductions.axis import AxisName
from xent_jax._targets.class_ids import ClassIds, Results
from xent_jax._targets.rivals import Labels, WantedSums


class SoftmaxStatistics(NamedTuple):
    """Statistics of rows of logits, each of the shape of the labels.

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

    @classmethod
    def of(cls, results: Results) -> SoftmaxStatistics:
        """Returns the statistics that the results of rows have."""
        return cls(
            log_prob=0 - results.loss,  # not −0
            log_normalizer=results.log_normalizer,
            entropy=jnp.asarray(results.entropy),
            prediction=jnp.asarray(results.prediction),
        )


@jax.named_scope("softmax_statistics")
def softmax_statistics(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    class_axis_name: AxisName = None,
) -> SoftmaxStatistics:
    """Log-probability, log-normalizer, entropy and arg max of rows of logits.

        log_prob[n]       = logits[n, labels[n]] − log_normalizer[n]
        log_normalizer[n] = log Σ_v exp(logits[n, v])
        entropy[n]        = −Σ_v p[n, v]·log p[n, v],  p = softmax(logits)
        prediction[n]     = arg max_v logits[n, v]

    What a policy over actions, accuracy and perplexity are made of. Logits of `-inf`,
    or a `where` of their shape, mask actions: they have probability 0, add nothing to
    the entropy, and its gradient is finite beside them. The entropy of a confident row
    is a sum of non-negative terms and keeps its digits, however small it is.

    Cost: the logits are read twice for the values and once more for the gradient; a CPU
    takes more passes. The gradient keeps the logits and a few numbers a row.

    Args:
      logits: `float[..., V]`. Unnormalised log-probabilities. A NaN, a `+inf` or a row
        of `-inf` only makes the numbers of that row NaN.
      labels: `int[...]`, the shape of `logits` without `axis`. Class ids in `[0, V)`;
        any other id makes all numbers of its row NaN but the prediction.
      axis: The axis of the classes, or several (an id is then the row-major index over
        them in the order named), or `None` for all of them.
      where: `bool`, of the batch's shape (rows that count; a dropped row has 0 for its
        numbers, gradient 0, and prediction −1) or of the shape of `logits` (classes
        that count; a dropped class has probability 0 and is never predicted, and a
        label that names one has `log_prob` `-inf`).
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the class
        axis is sharded over. `logits` and a `where` of their shape are then this
        shard's, of which all have as many classes; ids count over all shards, and the
        statistics are the same on all. It costs five all-reduces, of 6 numbers a row
        together, and one more of 1 number with a `where` of the logits' shape.

    Returns:
      `SoftmaxStatistics` of arrays of the shape of `labels`: three of float32 (float64
      for float64 logits), in nats, differentiable by `logits` in every mode and order,
      and the int32 class ids `prediction`: the lowest of equally large ones, −1 where
      the largest logit is not finite.

    Raises:
      TypeError: `logits` are not floating, `labels` not integers, `where` is not
        boolean, `class_axis_name` is no name.
      ValueError: A shape differs from what is said here (nothing is broadcast), an axis
        does not exist, there are no classes, `class_axis_name` is not an axis of the
        mesh of a `shard_map` around the call, or goes with several class axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import softmax_statistics
      >>> jnp.set_printoptions(precision=4)
      >>> logits = jnp.array([[1.0, 2.0, -jnp.inf], [0.0, 30.0, 1.0]])
      >>> statistics = softmax_statistics(logits, jnp.array([0, 1]))
      >>> print(statistics.log_prob)
      [-1.3133e+00 -3.4794e-13]
      >>> print(statistics.entropy)
      [5.8220e-01 1.0532e-11]
      >>> print(statistics.prediction)
      [1 1]
    """
    function = "softmax_statistics"
    layout, keep, block, _ = read_given(function, logits, axis, where, class_axis_name)
    ids = arrays.read_class_ids(layout, labels, keep)
    kind = ClassIds(layout.class_axis, WantedSums(entropy=True, prediction=True))
    statistics = SoftmaxStatistics.of(row_results(Given(kind), block, Labels(ids)))
    return jax.tree.map(layout.squeeze, statistics)
