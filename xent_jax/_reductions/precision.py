"""Dtypes of the computation, and arithmetic that does not lose what it should keep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._reductions.lowering import CPU, Place, by_place


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which everything is computed: float64 only for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def two_sum(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and its rounding error (Knuth's TwoSum).

    The error is 0 where the sum is not finite, and a constant to differentiation.
    """
    total = left + right
    finite = jnp.isfinite(total)
    left, right = (jnp.where(finite, part, 0) for part in (left, right))
    virtual = (left + right) - left
    error = (left - ((left + right) - virtual)) + (right - virtual)
    return total, jax.lax.stop_gradient(error)


def log(values: jax.Array) -> jax.Array:
    """Returns the logarithm as accurately as the device can: a TPU's is off by 1e-4.

    For numbers a row, of which there are few.
    """
    return jax.lax.log(values, accuracy=jax.lax.AccuracyMode.HIGHEST)


def log1p(values: jax.Array) -> jax.Array:
    """Returns log(1 + values), as accurately."""
    return jax.lax.log1p(values, accuracy=jax.lax.AccuracyMode.HIGHEST)


# log(1 + s) / s on [0, 1] in float32, off by at most 2^-27.5: the polynomial with the
# smallest relative error, its coefficients rounded one after the other.
_LOG1P = (
    -0.003290468594059348,
    0.020086241886019707,
    -0.05745723098516464,
    0.10661128163337708,
    -0.15344880521297455,
    0.19692102074623108,
    -0.24958018958568573,
    0.33330464363098145,
    -0.4999993145465851,
    1.0,
)


def log1p_of_share(values: jax.Array) -> jax.Array:
    """Returns log(1 + values) for values from 0 to 1.

    Compiled for a CPU in float32 to 2 ulp, by a polynomial: half the operations of
    XLA's logarithm there, off by 2.5 ulp. On a TPU it would be more operations.
    """
    is_float32 = values.dtype == jnp.float32

    def at(place: Place) -> Callable[..., Any] | None:
        short = is_float32 and place.chip == CPU
        return _log1p_polynomial if short else None

    return by_place(jnp.log1p, at)(values)


def _log1p_polynomial(values: jax.Array) -> jax.Array:
    quotient = jnp.full_like(values, _LOG1P[0])
    for coefficient in _LOG1P[1:]:
        quotient = quotient * values + coefficient
    return quotient * values


def scaled(factor: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `factor·values`, 0 where a factor of 0 meets an infinite value.

    A finite value keeps its derivative by a factor of 0.
    """
    absent = (factor == 0) & jnp.isinf(values)
    return factor * jnp.where(absent, 0, values)


def nan_where(bad: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the values, NaN where they are bad: no NaN is made for any other.

    A constant NaN beside them would raise under `jax_debug_nans` on data that are good.
    """
    return jnp.where(bad, jnp.sqrt(-bad.astype(values.dtype)), values)
