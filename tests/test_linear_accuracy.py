"""The fused head is as accurate as a dense one, in float32 and in bfloat16.

Error is the Euclidean distance to the float64 oracle on the same inputs, relative to
its norm; `NOISE` is what two orders of the same sums may differ by.
"""

import jax
import jax.numpy as jnp
import pytest
from grids import shortened
from heads import (
    cast,
    head_inputs,
    relative_error,
    truth_of,
    value_and_gradients,
)

pytestmark = pytest.mark.once

NOISE = 1.1
SHAPES = [(64, 65, 4001), (257, 33, 1000)]
BLOCKS = {
    None: {"class_block": 256},
    "mean": {"row_block": 40},
}


@jax.jit
def dense(hidden, kernel, labels, divisor=1.0):
    """Logits accumulated in float32, their gradient rounded for the two products.

    Returns the losses, and the gradients of their sum over the divisor.
    """
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    slope = (jnp.exp(logits - normalizer) - one_hot).astype(hidden.dtype)
    by_hidden = jnp.matmul(slope, kernel.T, preferred_element_type=jnp.float32)
    by_kernel = jnp.matmul(hidden.T, slope, preferred_element_type=jnp.float32)
    by_hidden = (by_hidden / divisor).astype(hidden.dtype)
    by_kernel = (by_kernel / divisor).astype(kernel.dtype)
    return (normalizer - label)[:, 0], by_hidden, by_kernel


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("scale", shortened([0.1, 1.0, 10.0], kept=[10.0]))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_dense(shape, dtype, scale, reduction, rng):
    rows, features, classes = shape
    inputs = head_inputs(rng, (rows,), features, classes)
    inputs["kernel"] *= scale
    inputs = cast(inputs, dtype)
    truth = truth_of(inputs, reduction)
    divisor = float(rows) if reduction == "mean" else 1.0
    losses, by_hidden, by_kernel = dense(**inputs, divisor=divisor)
    total = losses if reduction is None else losses.sum() / divisor
    value, gradients = value_and_gradients(
        inputs, reduction=reduction, **BLOCKS[reduction]
    )
    floor = 2.0**-23 if value.ndim == 0 else 0.0
    error = relative_error(value, truth.value)
    assert error <= NOISE * relative_error(total, truth.value) + floor
    for name, plain in (("hidden", by_hidden), ("kernel", by_kernel)):
        exact = getattr(truth, name)
        error = relative_error(gradients[name], exact)
        assert error <= NOISE * relative_error(plain, exact), name


def test_many_blocks_of_bfloat16_add_up_in_float32(rng):
    """Sums of 128 blocks in bfloat16 would be ten times worse."""
    inputs = cast(head_inputs(rng, (256,), 32, 2048), "bfloat16")
    _, by_hidden, by_kernel = dense(**inputs)
    for reduction, block in ((None, "class_block"), ("sum", "row_block")):
        size = {block: 16 if reduction is None else 2}
        _, gradients = value_and_gradients(inputs, reduction=reduction, **size)
        truth = truth_of(inputs, reduction)
        for name, plain in (("hidden", by_hidden), ("kernel", by_kernel)):
            exact = getattr(truth, name)
            error = relative_error(gradients[name], exact)
            assert error <= NOISE * relative_error(plain, exact), (reduction, name)
