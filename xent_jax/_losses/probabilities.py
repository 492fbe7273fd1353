"""Losses of numbers that are already normalized: log-probabilities, probabilities."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from xent_jax._arguments import arrays, checks, placement
from xent_jax._arguments.arrays import Axis
from xent_jax._arguments.options import read_option
from xent_jax._reductions.classes import unfused_on_cpu
from xent_jax._reductions.lowering import on_one_device
from xent_jax._reductions.precision import accumulation_dtype, nan_where, scaled
from xent_jax._targets.block import (
    Block,
    block_at,
    class_ids,
    values_of,
    zero_in_dropped_rows,
    zero_where_dropped,
)


@jax.named_scope("nll_loss")
def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Negative log-likelihood of integer class ids under log-probabilities, in nats.

        loss[n] = −class_weights[labels[n]]·log_probs[n, labels[n]]

    `log_probs` are used as they are: `nll_loss(jax.nn.log_softmax(x), y)` is
    PyTorch's way to write `softmax_cross_entropy_with_integer_labels(x, y)`, which is
    more accurate for confident rows (the log-softmax has rounded the loss away).

    Args:
      log_probs: `float[..., V]`. Normalised log-probabilities.
      labels: `int[...]`, the shape of `log_probs` without `axis`. Class ids in
        `[0, V)`; any other id gives NaN in the loss and in that row's gradient, unless
        `where` drops the row.
      axis: The axis of the classes, or several, or `None` for all of them.
      where: `bool`, of the batch's shape (rows that count; a dropped row has loss and
        gradient exactly 0, whatever it holds) or of the shape of `log_probs` (classes
        that count; a label that names a dropped class has loss `+inf`).
      class_weights: `float[V]`. Multiplies each row's loss by the weight of its label.

    Returns:
      `float32[...]` (float64 for float64 input), one loss per example. Differentiable
      by `log_probs` and `class_weights`.

    Raises:
      TypeError: `log_probs` are not floating, `labels` not integers, `where` is not
        boolean.
      ValueError: A shape differs from what is said here, an axis does not exist, there
        are no classes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import nll_loss
      >>> jnp.set_printoptions(precision=4)
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
      >>> print(nll_loss(log_probs, jnp.array([0, 2])))
      [0.6931 0.2231]
    """
    function = "nll_loss"
    array, layout = arrays.read_logits(function, "log_probs", log_probs, axis)
    keep = arrays.read_where(layout, where)
    ids = arrays.read_class_ids(layout, labels, keep)
    weights = read_option(layout, array.dtype, "class_weights", class_weights)
    ids_here = class_ids(array, layout.axis, 0)
    block = Block(array, ids_here, keep.classes, keep.rows, weights)
    return layout.squeeze(_surprise(layout.axis, block, ids))


@jax.named_scope("categorical_cross_entropy")
def categorical_cross_entropy(
    probs: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    epsilon: float = 1e-7,
) -> jax.Array:
    """Cross-entropy between probabilities and dense targets, in nats (Keras's form).

        loss[n] = −Σ_v labels[n, v]·log clip(probs[n, v] / Σ_u probs[n, u])

    with clipping to [epsilon, 1 − epsilon]. Prefer the logits: rounding a probability
    to float32 has already lost what a confident row's loss consists of (p = 0.99983
    leaves 3 digits of a loss of 1.7e-4), and no loss can bring it back.

    The gradient is that of the logarithm at the clipped probability, `−labels / p`,
    also where clipping took place: a label of probability 0 pulls with 1/epsilon, and
    not with the 0 that differentiating the clip would give.

    Args:
      probs: `float[..., V]`. Non-negative; divided by their sum first. A row whose sum
        is 0 is NaN.
      labels: `[..., V]`, the shape of `probs`. Target mass of each class.
      axis: The axis of the classes, or several, or `None` for all of them.
      where: `bool`, of the batch's shape (rows that count; a dropped row has loss and
        gradient exactly 0) or of the shape of `probs` (classes that count; a dropped
        class is left out of the sum and its target mass is not counted).
      epsilon: In (0, 0.5). 1 − epsilon is at most the number before 1.

    Returns:
      `float32[...]` (float64 for float64 input), one loss per example. Differentiable
      by `probs` and `labels`.

    Raises:
      TypeError: `probs` are not floating, `where` is not boolean, `epsilon` is not a
        real number.
      ValueError: A shape differs from what is said here, an axis does not exist, there
        are no classes, `epsilon` is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import categorical_cross_entropy
      >>> jnp.set_printoptions(precision=4)
      >>> probs = jnp.array([[0.7, 0.2, 0.1], [0.05, 0.95, 0.0]])
      >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
      >>> print(categorical_cross_entropy(probs, labels))
      [0.3567 0.0513]
    """
    function = "categorical_cross_entropy"
    array, layout = arrays.read_logits(function, "probs", probs, axis)
    keep = arrays.read_where(layout, where)
    targets = arrays.read_targets(layout, labels, array.dtype)
    margin = _read_epsilon(function, epsilon, targets.dtype)
    block = Block(array, class_ids(array, layout.axis, 0), keep.classes, keep.rows)
    values = array.astype(targets.dtype)
    if keep.classes is not None:
        values = jnp.where(keep.classes, values, 0)
    if keep.rows is not None:
        values = jnp.where(keep.rows, values, 1)
    targets = zero_where_dropped(targets, block)
    values = values / jnp.sum(values, axis=layout.axis, keepdims=True)
    surprise = -jnp.log(_clip(values, margin))
    loss = jnp.sum(targets * surprise, axis=layout.axis, keepdims=True)
    return layout.squeeze(zero_in_dropped_rows(loss, keep.rows))


@jax.named_scope("binary_cross_entropy")
def binary_cross_entropy(
    probs: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None = None,
    *,
    epsilon: float = 1e-7,
) -> jax.Array:
    """Binary cross-entropy between probabilities and labels, elementwise, in nats.

        loss = −labels·log p − (1 − labels)·log(1 − p),  p = clip(probs)

    with clipping to [epsilon, 1 − epsilon] (Keras's form). Prefer
    `sigmoid_binary_cross_entropy` on the logits: rounding a probability near 1 to
    float32 has already lost what the loss consists of.

    The gradient is `(1 − labels) / (1 − p) − labels / p` at the clipped p, also where
    clipping took place: an element that is wrong with certainty still learns.

    Args:
      probs: `float[...]`. Probabilities of the positive answer.
      labels: `[...]`, the shape of `probs`. In [0, 1].
      where: `bool[...]`, the shape of `probs`. Elements that count; a dropped element
        has loss and gradient exactly 0, whatever it holds.
      epsilon: In (0, 0.5). 1 − epsilon is at most the number before 1.

    Returns:
      `float32[...]` (float64 for float64 input), the shape of `probs`. Differentiable
      by `probs` and `labels`.

    Raises:
      TypeError: `probs` are not floating, `where` is not boolean, `epsilon` is not a
        real number.
      ValueError: The shapes differ, or `epsilon` is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import binary_cross_entropy
      >>> jnp.set_printoptions(precision=4)
      >>> probs = jnp.array([0.9, 0.2, 0.0])
      >>> print(binary_cross_entropy(probs, jnp.array([1.0, 0.0, 1.0])))
      [ 0.1054  0.2231 16.1181]
    """
    function = "binary_cross_entropy"
    array = checks.as_array(function, "probs", probs)
    checks.check_floating(function, "probs", array)
    targets = checks.as_real(function, "labels", labels)
    meaning = "that of probs"
    checks.check_shape(function, "labels", targets, array.shape, meaning)
    dtype = accumulation_dtype(array.dtype)
    margin = _read_epsilon(function, epsilon, dtype)
    targets = placement.beside(targets, array)
    keep = arrays.read_mask(function, where, array.shape, meaning, array)
    values = array.astype(dtype)
    targets = targets.astype(values.dtype)
    if keep is not None:
        values, targets = jnp.where(keep, values, 0.5), jnp.where(keep, targets, 0)
    values = _clip(values, margin)
    loss = -targets * jnp.log(values) - (1 - targets) * jnp.log1p(-values)
    return loss if keep is None else jnp.where(keep, loss, 0)


def _read_epsilon(
    function: str, epsilon: ArrayLike, dtype: jnp.dtype
) -> jax.Array | np.floating:
    return checks.read_number(
        function, "epsilon", epsilon, dtype, highest=0.5, inside=True
    )


# Compiled as one where it runs eagerly: the −inf of a dropped class, at which
# `jax_debug_infs` would stop, is then no result.
@functools.partial(jax.jit, static_argnums=0)
def _surprise(axis: int, block: Block, ids: jax.Array) -> jax.Array:
    """Returns −w_y·x_y of every row, of size 1 along the class axis.

    The row of a bad id is NaN, and so is its gradient.
    """

    def of(ids: Any, values: Any, weights: Any) -> jax.Array:
        sign = nan_where(ids < 0, -jnp.ones_like(ids, values.dtype))
        surprise = sign * values
        return surprise if weights is None else scaled(weights, surprise)

    def by_mask(block: Block, ids: jax.Array) -> jax.Array:
        # A bad id hits every class, so that its whole gradient row is NaN.
        hit = (block.class_ids == ids) | (ids < 0)
        weights = block.class_weights
        if weights is not None:
            weights = jnp.where(hit, weights, 0)
        surprise = of(ids, jnp.where(hit, values_of(block), 0), weights)
        return jnp.sum(surprise, axis=axis, keepdims=True)

    def by_gather(block: Block, ids: jax.Array) -> jax.Array:
        picked = block_at(axis, block, jnp.maximum(ids, 0))
        return of(ids, values_of(picked), picked.class_weights)

    loss = unfused_on_cpu(on_one_device(by_mask, by_gather)(block, ids))
    return zero_in_dropped_rows(loss, block.keep_row)


@jax.custom_jvp
def _clip(probs: jax.Array, margin: jax.Array | np.floating) -> jax.Array:
    """Clips to [margin, 1 − margin]; the derivative is 1 everywhere.

    A traced margin that the dtype cannot tell from 0, and any that it cannot tell from
    1 when subtracted from it, is rounded up to one that it can.
    """
    limits = jnp.finfo(probs.dtype)
    low = jnp.maximum(margin, limits.tiny)
    high = jnp.minimum(1 - margin, 1 - limits.epsneg)
    return jnp.clip(probs, low, high)


@_clip.defjvp
def _clip_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _clip(*primals), tangents[0]
