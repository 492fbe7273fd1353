"""Softmax cross-entropy for dense targets and for class ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import arrays
from xent_jax._arguments.arrays import Axis
from xent_jax._forms.logits_arguments import read_given
from xent_jax._forms.rows import Given, row_results
from xent_jax._reductions.axis import AxisName
from xent_jax._targets.block import zero_where_dropped
from xent_jax._targets.class_ids import ClassIds, Coefficients, combined
from xent_jax._targets.dense import DenseTargets
from xent_jax._targets.linearized import LinearizedTargets
from xent_jax._targets.rivals import Labels, WantedSums


@jax.named_scope("softmax_cross_entropy")
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    class_axis_name: AxisName = None,
) -> jax.Array:
    """Softmax cross-entropy between logits and dense targets, in nats.

        loss[n] = Σ_v t[n, v]·(log Σ_u exp(logits[n, u]) − logits[n, v])
        t[n, v] = class_weights[v]·((1 − label_smoothing)·labels[n, v]
                                    + label_smoothing / V)

    Use it for soft targets: mixed-up, distilled or Sinkhorn targets, or one-hot rows.
    Rows of targets need not sum to one: value and gradient `(Σt)·softmax(x) − t` are
    right for any sum. For class ids,
    `softmax_cross_entropy_with_integer_labels` needs no [N, V] targets.

    Cost: the logits are read twice and the labels once for the value, and both once
    more for the gradient; a CPU takes more passes. The gradient keeps the logits, the
    targets and a few numbers a row.

    Args:
      logits: `float[..., V]`. Unnormalized log-probabilities. `-inf` is a class of
        probability 0; a NaN, a `+inf` or a row of `-inf` only makes that row NaN.
      labels: `[..., V]`, the shape of `logits`. Target mass of each class. Integer and
        boolean arrays are taken as numbers (a one-hot mask).
      axis: The axis of the classes, or several, or `None` for all of them.
      where: `bool`, of the batch's shape (rows that count; a dropped row has loss and
        gradient exactly 0, whatever it holds) or of the shape of `logits` (classes that
        count; a dropped class has probability 0 and its target mass is not counted; a
        row with nothing kept has loss and gradient 0).
      label_smoothing: In [0, 1]. Spread over the V (kept) classes.
      class_weights: `float[V]`. Multiplies the targets, smoothing term included.
      z_loss: Non-negative coefficient of `log_normalizer²`, which is added.
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the class
        axis is sharded over. `logits`, `labels`, a `where` of their shape and
        `class_weights` are then this shard's, of which all have as many classes; V
        counts the classes of all shards. The loss is the same on all shards. It costs
        two all-reduces, of 6 numbers a row together, one more of 1 number with a
        `where` of the logits' shape, and one of 6 for a tangent. The gradient costs
        none more with `check_vma=True`; with `check_vma=False` it costs one, and is
        right outside of the `shard_map` only.

    Returns:
      `float32[...]` (float64 for float64 logits), one loss per example. Differentiable
      by `logits`, `labels` (`−log softmax(logits)`), `class_weights`,
      `label_smoothing` and `z_loss`, in every mode and order.

    Raises:
      TypeError: `logits` are not floating, `where` is not boolean, an option is not a
        real number, `class_axis_name` is no name.
      ValueError: A shape differs from what is said here (nothing is broadcast), an axis
        does not exist, there are no classes, an option is out of its range,
        `class_axis_name` is not an axis of the mesh of a `shard_map` around the call,
        or goes with several class axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import softmax_cross_entropy
      >>> jnp.set_printoptions(precision=4)
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> labels = jnp.array([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0]])
      >>> print(softmax_cross_entropy(logits, labels))
      [0.4761 2.9518]

    References:
      Bishop, *Pattern Recognition and Machine Learning*, section 4.3.4.
      Szegedy et al., *Rethinking the Inception Architecture*, 2016 (smoothing).
      Chowdhery et al., *PaLM*, 2022, section 5 (z-loss).
    """
    given = read_given(
        "softmax_cross_entropy",
        logits,
        axis,
        where,
        class_axis_name,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
    )
    layout, _, block, options = given
    targets = arrays.read_targets(layout, labels, block.logits.dtype)
    targets = zero_where_dropped(targets, block)
    smoothing, weights = options["label_smoothing"], options["class_weights"]
    share = None if smoothing is None else 1 - smoothing
    if weights is not None:
        share = weights if share is None else share * weights
    if share is not None:
        targets = _share(share, targets, block.logits)
    uniform = given.uniform()
    if uniform is not None:
        if weights is not None:
            uniform = _share(weights, uniform, block.logits)
        targets = targets + uniform
    results = row_results(Given(DenseTargets(layout.class_axis)), block, targets)
    loss = results.loss
    if options["z_loss"] is not None:
        loss = loss + options["z_loss"] * jnp.square(results.log_normalizer)
    return layout.squeeze(loss)


@jax.named_scope("softmax_cross_entropy_with_integer_labels")
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    class_axis_name: AxisName = None,
) -> jax.Array:
    """Softmax cross-entropy between logits and integer class ids, in nats.

        loss[n] = log Σ_v exp(logits[n, v]) − logits[n, labels[n]]

    With options, the targets are those of `softmax_cross_entropy` for one-hot labels,
    without a one-hot array. Confident rows keep their loss and their gradient: the
    label is left out of the normalizer instead of being subtracted from it.

    Cost: the logits are read twice for the value and once more for the gradient,
    whatever the options; a CPU takes one more with `label_smoothing`. The gradient
    keeps the logits and a few numbers a row.

    Args:
      logits: `float[..., V]`. Unnormalized log-probabilities. `-inf` is a class of
        probability 0 (loss `+inf` if it is the label); a NaN, a `+inf` or a row of
        `-inf` only makes that row NaN.
      labels: `int[...]`, the shape of `logits` without `axis`. Class ids in `[0, V)`;
        any other id gives NaN in the loss and in that row's gradient, unless `where`
        drops the row: PyTorch's `ignore_index=-100` is `where=labels != -100`.
      axis: The axis of the classes, or several (an id is then the row-major index over
        them in the order named), or `None` for all of them.
      where: `bool`, of the batch's shape (rows that count; a dropped row has loss and
        gradient exactly 0, whatever it holds) or of the shape of `logits` (classes that
        count; a dropped class has probability 0, a label that names one has loss
        `+inf`; a row with nothing kept has loss and gradient 0).
      label_smoothing: In [0, 1]. Spread over the V (kept) classes.
      class_weights: `float[V]`. Multiplies the targets, smoothing term included, as in
        PyTorch, whose mean is then
        `loss.sum() / where(keep, w[where(keep, labels, 0)], 0).sum()`.
      z_loss: Non-negative coefficient of `log_normalizer²`, which is added.
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the class
        axis is sharded over. `logits`, a `where` of their shape and `class_weights`
        are then this shard's, of which all have as many classes; ids and V count the
        classes of all shards. The loss is the same on all shards. It costs two
        all-reduces, of 3 numbers a row together and up to 8 with options, one more of
        1 number with a `where` of the logits' shape, and one of 2 to 5 for a tangent.
        The gradient costs none more with `check_vma=True`; with `check_vma=False` it
        costs one, and is right outside of the `shard_map` only.

    Returns:
      `float32[...]` (float64 for float64 logits), one loss per example. Differentiable
      by `logits`, `class_weights`, `label_smoothing` and `z_loss`, in every mode and
      order.

    Raises:
      TypeError: `logits` are not floating, `labels` not integers (booleans are not
        class ids), `where` is not boolean, an option is not a real number,
        `class_axis_name` is no name.
      ValueError: A shape differs from what is said here (nothing is broadcast), an axis
        does not exist, there are no classes, an option is out of its range,
        `class_axis_name` is not an axis of the mesh of a `shard_map` around the call,
        or goes with several class axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import softmax_cross_entropy_with_integer_labels
      >>> jnp.set_printoptions(precision=4)
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1], [3.0, 1.0, 0.0]])
      >>> labels = jnp.array([0, 1, -100])
      >>> print(softmax_cross_entropy_with_integer_labels(logits, labels))
      [0.2761 2.9518    nan]
      >>> loss = softmax_cross_entropy_with_integer_labels(
      ...     logits, labels, where=labels != -100
      ... )
      >>> print(loss)
      [0.2761 2.9518 0.    ]

    References:
      Bishop, *Pattern Recognition and Machine Learning*, section 4.3.4.
      Szegedy et al., *Rethinking the Inception Architecture*, 2016 (smoothing).
      Chowdhery et al., *PaLM*, 2022, section 5 (z-loss).
    """
    given = read_given(
        "softmax_cross_entropy_with_integer_labels",
        logits,
        axis,
        where,
        class_axis_name,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
    )
    layout, keep, block, options = given
    ids = arrays.read_class_ids(layout, labels, keep)
    smoothing, weights = options["label_smoothing"], options["class_weights"]
    block = block._replace(class_weights=weights)
    wanted = WantedSums(uniform=smoothing is not None, label_weight=weights is not None)
    kind = ClassIds(layout.class_axis, wanted)
    results = row_results(Given(kind), block, Labels(ids))
    own = results.label_weight
    if smoothing is not None:
        own = 1 - smoothing if own is None else (1 - smoothing) * own
    coefficients = Coefficients(own, given.uniform(), options["z_loss"])
    return layout.squeeze(combined(results, coefficients, layout.axis))


@jax.named_scope("linearized_softmax_cross_entropy")
def linearized_softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, axis: Axis = -1
) -> jax.Array:
    """A surrogate that has the gradient of `softmax_cross_entropy` and not its value.

        value[n] = Σ_v g[n, v]·logits[n, v],  g = stop_gradient((Σt)·softmax(x) − t)

    Its gradient by `logits` is exactly `(Σt)·softmax(logits) − labels`; its value is
    not a cross-entropy: it may be negative, and for targets that sum to one it differs
    from it by the entropy of the softmax, `loss − value = H(softmax(logits))`. Some
    self-supervised codes train on it. Second derivatives and derivatives by `labels`
    are 0: the bracket is a constant. The gradient keeps the logits and the labels.

    Args:
      logits: `float[..., V]`. Unnormalized log-probabilities. A class with `g = 0` adds
        0, a logit of `-inf` included.
      labels: `[..., V]`, the shape of `logits`. Target mass of each class.
      axis: The axis of the classes, or several, or `None` for all of them.

    Returns:
      `float32[...]` (float64 for float64 logits), one value per example.

    Raises:
      TypeError: `logits` are not floating.
      ValueError: The shapes of `logits` and `labels` differ, an axis does not exist,
        there are no classes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import linearized_softmax_cross_entropy
      >>> jnp.set_printoptions(precision=4)
      >>> logits = jnp.array([[1.0, 2.0, 3.0]])
      >>> labels = jnp.array([[0.0, 1.0, 0.0]])
      >>> print(linearized_softmax_cross_entropy(logits, labels))
      [0.5752]
    """
    function = "linearized_softmax_cross_entropy"
    layout, _, block, _ = read_given(function, logits, axis, None, None)
    targets = arrays.read_targets(layout, labels, block.logits.dtype)
    kind = LinearizedTargets(layout.class_axis)
    return layout.squeeze(row_results(Given(kind), block, targets).loss)


def _share(share: jax.Array, targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns `share·targets`; where a logit is −inf, a factor of 0 is a constant 0.

    The derivative by the product is infinite there, and 0·inf would be formed on the
    way to the derivative by the other factor.
    """
    impossible = logits == -jnp.inf
    fixed = jax.lax.stop_gradient
    return jnp.where(impossible & (targets == 0), fixed(share), share) * jnp.where(
        impossible & (share == 0), fixed(targets), targets
    )
