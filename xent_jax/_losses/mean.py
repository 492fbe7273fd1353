"""The mean that a training loop takes of per-example losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import checks, placement
from xent_jax._arguments.arrays import Axis, read_mask
from xent_jax._reductions.axis import AxisName, psum
from xent_jax._reductions.precision import accumulation_dtype


@jax.named_scope("weighted_mean")
def weighted_mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    axis: Axis = None,
    batch_axis_name: AxisName = None,
) -> jax.Array:
    """Weighted mean of per-example losses; 0 when nothing counts.

        Σ weights·values / Σ weights,  over the entries that `where` keeps

    With the mask that a loss was given as `where`, this is the mean over the examples
    that count: `weighted_mean(loss, where=mask)`. Give the mask to both: the NaN of a
    bad row is left out of the mean, but its own gradient is NaN whatever it is
    multiplied by. Accuracy is the mean of a boolean array:
    `weighted_mean(prediction == labels, where=mask)`, and `axis=-1` makes a mean a
    sequence of tokens.

    PyTorch's mean under class weights `w` is that of the loss without them:
    `weighted_mean(loss, w[jnp.where(keep, labels, 0)], where=keep)`. Of a loss that has
    the class weights already, the denominator is another:
    `loss.sum() / where(keep, w[where(keep, labels, 0)], 0).sum()`.

    Args:
      values: `[...]`. One real number an example; booleans and integers are counted.
      weights: `[...]`, the shape of `values`; real numbers or a boolean mask. `None`
        weighs all alike. An entry of weight 0 adds nothing, an inf or a NaN included.
      where: `bool[...]`, the shape of `values`. Entries that count; a dropped one adds
        nothing, whatever it and its weight hold, and has gradient 0.
      axis: The axis to average over, or several, or `None` for all of them.
      batch_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the values
        are sharded over: both sums are then over all shards, whatever each of them
        weighs, and all get the same mean. One all-reduce of two numbers a mean. With
        `check_vma=False` gradients are right outside of the `shard_map` only.

    Returns:
      `float32[...]` (float64 for float64 values), without the axes that are averaged
      over. Exactly 0, with gradient 0, where the weights sum to 0 or there are no
      values. Differentiable by `values`, where they are floating, and `weights`.

    Raises:
      TypeError: `values` or `weights` are complex, `where` is not boolean, or
        `batch_axis_name` is no name.
      ValueError: The shapes differ, an axis does not exist, or `batch_axis_name` is not
        an axis of the mesh of a `shard_map` around the call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import weighted_mean
      >>> loss = jnp.array([1.0, 3.0, jnp.nan])
      >>> print(weighted_mean(loss, where=jnp.array([True, True, False])))
      2.0
      >>> correct = jnp.array([[True, False, True], [False, False, True]])
      >>> keep = jnp.array([[True, True, False], [False, True, True]])
      >>> print(weighted_mean(correct, where=keep, axis=-1))
      [0.5 0.5]
    """
    function = "weighted_mean"
    array = checks.as_real(function, "values", values)
    array = array.astype(accumulation_dtype(array.dtype))
    keep = read_mask(function, where, array.shape, "that of values", array)
    if weights is None:
        scale = jnp.ones_like(array)
    else:
        scale = checks.as_real(function, "weights", weights)
        checks.check_shape(function, "weights", scale, array.shape, "that of values")
        scale = placement.beside(scale, array).astype(array.dtype)
    axes = checks.canonical_axes(function, axis, array.ndim) if array.ndim else ()
    checks.check_axis_name(function, "batch_axis_name", batch_axis_name)
    # A finite value of weight 0 stays, so that the gradient by its weight is true.
    absent = (scale == 0) & ~jnp.isfinite(array)
    if keep is not None:
        absent, scale = absent | ~keep, jnp.where(keep, scale, 0)
    total = jnp.sum(scale * jnp.where(absent, 0, array), axes)
    mass = jnp.sum(scale, axes)
    if batch_axis_name is not None:
        total, mass = psum(jnp.stack([total, mass]), batch_axis_name)
    return jnp.where(mass == 0, 0, total / jnp.where(mass == 0, 1, mass))
