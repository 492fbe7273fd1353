"""softcap·tanh(logits / softcap), and quotients, for every positive normal divisor."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._reductions.tangents import unless_zero


@jax.custom_jvp
def softcapped(logits: jax.Array, softcap: jax.Array) -> jax.Array:
    """Returns softcap·tanh(logits / softcap), for every positive normal softcap.

    A logit far below the softcap is left alone: the quotient of a small number and a
    large one would underflow.
    """
    ratio = _ratio(logits, softcap)
    # tanh(r) = r·(1 − r²/3 + …)
    alone = jnp.square(ratio) < jnp.finfo(ratio.dtype).eps / 4
    return jnp.where(alone, logits, softcap * jnp.tanh(ratio))


@functools.partial(softcapped.defjvp, symbolic_zeros=True)
def _softcapped_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    # In closed form: the chain rule goes by way of 1 / softcap, which underflows for a
    # large one, and of logits / softcap², which overflows for a small one.
    # The slope is made of the result, which is kept anyway.
    value = softcapped(*primals)
    slope = 1 - jnp.square(quotient(value, primals[1]))
    logits_dot, softcap_dot = map(unless_zero, tangents)
    change = jnp.zeros_like(value)
    if logits_dot is not None:
        change += slope * logits_dot
    if softcap_dot is not None:
        change += _slope_by_softcap(_ratio(*primals), slope) * softcap_dot
    return value, change


def _slope_by_softcap(ratio: jax.Array, slope: jax.Array) -> jax.Array:
    """Returns tanh(r) − r·slope, by its series where the two terms cancel."""
    small = jnp.abs(ratio) < jnp.finfo(ratio.dtype).eps ** (1 / 8)
    near = jnp.where(small, ratio, 0)
    square = jnp.square(near)
    series = near * square * (2 / 3 - square * (8 / 15 - square * (34 / 105)))
    return jnp.where(small, series, jnp.tanh(ratio) - ratio * slope)


def _ratio(logits: jax.Array, softcap: jax.Array) -> jax.Array:
    """Returns logits / softcap, a constant ±20 from where tanh is ±1 in every dtype."""
    high = jnp.abs(logits) >= 20 * jnp.abs(softcap)
    ratio = quotient(jnp.where(high, 0, logits), softcap)
    return jnp.where(high, 20 * jnp.sign(logits), ratio)


@jax.custom_jvp
def quotient(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns left / right, whose derivatives never take the square of `right`."""
    return left / right


@quotient.defjvp
def quotient_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    value, right = quotient(*primals), primals[1]
    left_dot, right_dot = tangents
    return value, quotient(left_dot - value * right_dot, right)
