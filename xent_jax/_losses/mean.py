"""The mean that a training loop takes of per-example losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import checks, placement
from xent_jax._reductions.axis import AxisName, psum
from xent_jax._reductions.precision import accumulation_dtype


@jax.named_scope("weighted_mean")
def weighted_mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    batch_axis_name: AxisName = None,
) -> jax.Array:
    """Weighted mean of per-example losses; 0 when nothing counts.

        Σ weights·values / Σ weights

    With the mask that a loss was given as `where`, this is the mean over the examples
    that count: `weighted_mean(loss, mask)`. Give the mask to both: the NaN of a bad row
    of weight 0 is left out of the mean, but its own gradient is NaN whatever it is
    multiplied by.

    It is not PyTorch's mean under class weights, whose denominator is the sum of the
    labels' weights over the kept rows:
    `loss.sum() / where(keep, w[where(keep, labels, 0)], 0).sum()`.

    Args:
      values: `float[...]`. One number an example.
      weights: `[...]`, the shape of `values`; real numbers or a boolean mask. `None`
        weighs all alike. An entry of weight 0 adds nothing, an inf or a NaN included.
      batch_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the values
        are sharded over: both sums are then over all shards, whatever each of them
        weighs, and all get the same mean. One all-reduce of two numbers. With
        `check_vma=False` gradients are right outside of the `shard_map` only.

    Returns:
      `float32[]` (float64 for float64 values). Exactly 0, with gradient 0, when the
      weights sum to 0 or there are no values. Differentiable by both arguments.

    Raises:
      TypeError: `values` are not floating, `weights` are complex, or `batch_axis_name`
        is no name.
      ValueError: The shapes differ, or `batch_axis_name` is not an axis of the mesh of
        a `shard_map` around the call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import weighted_mean
      >>> loss = jnp.array([1.0, 3.0, jnp.nan])
      >>> print(weighted_mean(loss, jnp.array([True, True, False])))
      2.0
    """
    function = "weighted_mean"
    array = checks.as_array(function, "values", values)
    checks.check_floating(function, "values", array)
    array = array.astype(accumulation_dtype(array.dtype))
    if weights is None:
        scale = jnp.ones_like(array)
    else:
        scale = checks.as_real(function, "weights", weights)
        checks.check_shape(function, "weights", scale, array.shape, "that of values")
        scale = placement.beside(scale, array).astype(array.dtype)
    checks.check_axis_name(function, "batch_axis_name", batch_axis_name)
    # A finite value of weight 0 stays, so that the gradient by its weight is true.
    absent = (scale == 0) & ~jnp.isfinite(array)
    total = jnp.sum(scale * jnp.where(absent, 0, array))
    mass = jnp.sum(scale)
    if batch_axis_name is not None:
        total, mass = psum(jnp.stack([total, mass]), batch_axis_name)
    return jnp.where(mass == 0, 0, total / jnp.where(mass == 0, 1, mass))
