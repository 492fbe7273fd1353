"""Heads with several ids a row, or a teacher: what their programs for a TPU hold."""

import jax
import jax.numpy as jnp
import pytest

import xent_jax
from aot.compilers import compile_for_tpu, has_tpu_compiler
from aot.contracts import MEBIBYTE
from aot.linear import LLAMA

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed"),
]

IDS = 64
HIDDEN = jax.ShapeDtypeStruct((LLAMA.rows, LLAMA.features), jnp.bfloat16)
KERNEL = jax.ShapeDtypeStruct((LLAMA.features, LLAMA.classes), jnp.bfloat16)
# The kernel's gradient in float32 and a block of logits; a block of logits alone.
PLAIN = {"mean": 1055 * MEBIBYTE, None: 64 * MEBIBYTE}
BLOCK = {"mean": 502 * MEBIBYTE, None: 48 * MEBIBYTE}  # of a teacher's, in float32


@pytest.mark.parametrize("reduction", ["mean", None])
def test_sparse_targets(reduction):
    labels = jax.ShapeDtypeStruct((LLAMA.rows, IDS), jnp.int32)
    probs = jax.ShapeDtypeStruct((LLAMA.rows, IDS), jnp.float32)

    def loss(hidden, kernel, labels, probs):
        return xent_jax.linear_softmax_cross_entropy(
            hidden, kernel, labels, label_probs=probs, reduction=reduction
        ).mean()

    program = jax.value_and_grad(loss, (0, 1))
    compiled = compile_for_tpu("v5e", program, HIDDEN, KERNEL, labels, probs)
    assert compiled.temp_bytes <= 1.2 * PLAIN[reduction], compiled.temp_bytes / MEBIBYTE
    products = compiled.module.matmul_flops / LLAMA.matmul_flops
    assert products <= 1.05 * (3 if reduction else 4)


@pytest.mark.parametrize("reduction", ["mean", None])
def test_divergence(reduction):
    def loss(hidden, kernel, teacher, teacher_kernel):
        return xent_jax.linear_softmax_kl_divergence(
            hidden, kernel, teacher, teacher_kernel, reduction=reduction
        ).mean()

    program = jax.value_and_grad(loss, (0, 1))
    compiled = compile_for_tpu("v5e", program, HIDDEN, KERNEL, HIDDEN, KERNEL)
    bound = 1.2 * PLAIN[reduction] + BLOCK[reduction]
    assert compiled.temp_bytes <= bound, compiled.temp_bytes / MEBIBYTE
    products = compiled.module.matmul_flops / LLAMA.matmul_flops
    assert products <= 1.05 * (4 if reduction else 6)
