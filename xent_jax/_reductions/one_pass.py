"""A maximum and what is relative to it, over classes, in one pass: for a GPU.

There a block of logits is in memory and every pass reads it. A CPU and a TPU have what
is quicker: reductions in vectors, and passes that what makes the logits takes part in.
"""

import jax
import jax.numpy as jnp


def sums_relative_to_maximum(
    values: jax.Array, numbers: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns m = max values, Σ exp(values − m) and Σ numbers, of size 1 along `axis`.

    Every partial sum is relative to its own maximum, and is scaled by a power that is
    at most 1 where it meets a larger one; one of the two powers is exactly 1. Of values
    that are all −inf the maximum is −inf and the sum 0.

    Args:
      values: floating.
      numbers: of the same shape and dtype.
      axis: negative.
    """
    # Finite, so that no −inf − (−inf) is formed; what is −inf adds 0.
    lowest = jnp.finfo(values.dtype).min
    counted = jnp.where(values == -jnp.inf, 0, jnp.ones_like(values))
    zero = jnp.zeros((), values.dtype)
    largest, total, added = jax.lax.reduce(
        (jnp.maximum(values, lowest), counted, numbers),
        (jnp.asarray(lowest, values.dtype), zero, zero),
        _joined,
        (values.ndim + axis,),
    )
    largest = jnp.where(total == 0, -jnp.inf, largest)
    return (
        jnp.expand_dims(largest, axis),
        jnp.expand_dims(total, axis),
        jnp.expand_dims(added, axis),
    )


def _joined(
    left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    largest = jnp.maximum(left[0], right[0])
    total = left[1] * jnp.exp(left[0] - largest) + right[1] * jnp.exp(
        right[0] - largest
    )
    return largest, total, left[2] + right[2]
