"""Softmax cross-entropy for K class ids a row, with probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import arrays
from xent_jax._arguments.arrays import Axis, SparseTargets
from xent_jax._forms.logits_arguments import read_given
from xent_jax._forms.rows import Given, row_results
from xent_jax._reductions.axis import AxisName, ClassAxis, psum
from xent_jax._targets.block import Block
from xent_jax._targets.class_ids import ClassIds, Coefficients, combined
from xent_jax._targets.rivals import Labels, WantedSums, values_at


@jax.named_scope("softmax_cross_entropy_with_sparse_targets")
def softmax_cross_entropy_with_sparse_targets(
    logits: ArrayLike,
    indices: ArrayLike,
    probs: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    class_axis_name: AxisName = None,
) -> jax.Array:
    """Softmax cross-entropy between logits and K class ids a row, in nats.

        loss[n] = Σ_v t[n, v]·(log Σ_u exp(logits[n, u]) − logits[n, v])
        t[n, v] = class_weights[v]·((1 − label_smoothing)·p[n, v] + label_smoothing / V)
        p[n, v] = Σ_k probs[n, k]·[indices[n, k] = v]

    Targets of the top K classes of a teacher (K = 8 … 512), of mixup and CutMix
    (K = 2), or of several right answers, without an [N, V] array of them. It is
    `softmax_cross_entropy` of these targets: ids that repeat add up, and rows need not
    sum to one. One id with probability 1 has exactly the loss of
    `softmax_cross_entropy_with_integer_labels`, confident rows included: the most
    probable id is left out of the normalizer.

    Cost: that of class ids, and K comparisons a logit in the gradient (on a TPU, on a
    GPU and with `class_axis_name` as many in the value, where a CPU gathers); for more
    than 16 ids a row the gradient has one more pass, a scatter, instead. The gradient
    keeps the logits and K numbers a row.

    Args:
      logits: `float[..., V]`. Unnormalised log-probabilities. `-inf` is a class of
        probability 0 (loss `+inf` if it has target mass); a NaN, a `+inf` or a row of
        `-inf` only makes that row NaN.
      indices: `int[..., K]`, the shape of `logits` without `axis`, and K. Class ids in
        `[0, V)`. Any other id with probability 0 is padding; with any other
        probability it gives NaN in the loss and in that row's gradient, unless `where`
        drops the row.
      probs: `[..., K]`, the shape of `indices`. Probability of each id; real numbers.
      axis: The axis of the classes, or several (an id is then the row-major index over
        them in the order named), or `None` for all of them.
      where: `bool`, of the batch's shape (rows that count; a dropped row has loss and
        gradient exactly 0, whatever it holds) or of the shape of `logits` (classes that
        count; a dropped class has probability 0 and its target mass is not counted; a
        row with nothing kept has loss and gradient 0).
      label_smoothing: In [0, 1]. Spread over the V (kept) classes.
      class_weights: `float[V]`. Multiplies the targets, smoothing term included.
      z_loss: Non-negative coefficient of `log_normalizer²`, which is added.
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the class
        axis is sharded over. `logits`, a `where` of their shape and `class_weights`
        are then this shard's, of which all have as many classes; ids and V count the
        classes of all shards, and an id lies on one of them. The loss is the same on
        all shards. It costs two all-reduces, of K + 3 numbers a row together and up to
        4 more with smoothing, one more of K for each of `class_weights` and a `where`
        of the logits' shape, and one of K + 2 for a tangent.

    Returns:
      `float32[...]` (float64 for float64 logits), one loss per example. Differentiable
      by `logits`, `probs` (`−log softmax(logits)` at the ids), `class_weights`,
      `label_smoothing` and `z_loss`, in every mode and order.

    Raises:
      TypeError: `logits` are not floating, `indices` not integers, `probs` not real,
        `where` is not boolean, an option is not a real number, `class_axis_name` is no
        name.
      ValueError: A shape differs from what is said here (nothing is broadcast), an axis
        does not exist, there are no classes or no ids, an option is out of its range,
        `class_axis_name` is not an axis of the mesh of a `shard_map` around the call,
        or goes with several class axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import softmax_cross_entropy_with_sparse_targets
      >>> jnp.set_printoptions(precision=4)
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> indices = jnp.array([[0, 1], [1, -1]])  # −1 is padding
      >>> probs = jnp.array([[0.9, 0.1], [1.0, 0.0]])
      >>> print(softmax_cross_entropy_with_sparse_targets(logits, indices, probs))
      [0.4761 2.9518]

    References:
      Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.
      Zhang et al., *mixup: Beyond Empirical Risk Minimization*, 2018.
    """
    given = read_given(
        "softmax_cross_entropy_with_sparse_targets",
        logits,
        axis,
        where,
        class_axis_name,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
    )
    layout, keep, block, options = given
    names = "indices", "probs"
    target = arrays.read_sparse_targets(
        layout, names, indices, probs, keep, block.logits.dtype
    )
    block = block._replace(class_weights=options["class_weights"])
    smoothing = options["label_smoothing"]
    kind = ClassIds(layout.class_axis, WantedSums(uniform=smoothing is not None))
    labels = Labels.of(target.own, target.ids)
    results = row_results(Given(kind), block, labels)
    others = _weighted(layout.class_axis, block, target)
    if smoothing is not None:
        others = (1 - smoothing) * others
    coefficients = Coefficients(None, given.uniform(), options["z_loss"], others)
    return layout.squeeze(combined(results, coefficients, layout.axis))


def _weighted(classes: ClassAxis, block: Block, target: SparseTargets) -> jax.Array:
    """Returns the probabilities times the weights of their classes, 0 if dropped."""
    probs = target.probs
    if block.class_weights is not None:
        own = values_at(classes.axis, block, block.class_weights, target.ids)
        probs = probs * psum(own, classes.axis_name)
    if block.keep_class is not None:
        mask = block.keep_class.astype(probs.dtype)
        own = values_at(classes.axis, block, mask, target.ids)
        probs = jnp.where(psum(own, classes.axis_name) == 0, 0, probs)
    return probs
