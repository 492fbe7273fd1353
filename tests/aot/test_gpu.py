"""The losses compiled for an H100: memory and traffic at their floor."""

import dataclasses

import jax.numpy as jnp
import pytest

import xent_jax
from aot import compilers, contracts
from aot.cases import CASES, PLAIN, WITH_ALL

if not compilers.has_gpu_compiler():
    pytest.skip(
        "the GPU compiler is not installed: "
        "pip install jax-cuda13-plugin jax-cuda13-pjrt flatbuffers",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.once, pytest.mark.exhaustive]

# XLA reduces a row in two steps on a GPU, by way of 128 float32 numbers a row. A loss
# takes up to eight such reductions, six at once; each is written and read.
PARTIAL_RESULTS = 128 * contracts.SHAPE[0] * 4
LIMITS = {"temp_bytes": 6 * PARTIAL_RESULTS, "extra_bytes": 8 * 2 * PARTIAL_RESULTS}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [*CASES, *WITH_ALL], ids=lambda case: case.name)
def test_loss_is_at_the_floor(dtype, case):
    arguments = case.arguments(contracts.SHAPE, dtype)
    compiled = compilers.compile_for_gpu(case.value_and_grad, *arguments)
    contracts.check_loss(compiled, case, dtype, **LIMITS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_class_ids_take_one_pass_less_than_on_a_tpu(dtype, case):
    # The maximum and the sum are one reduction.
    case = dataclasses.replace(case, passes=3)
    arguments = case.arguments(contracts.SHAPE, dtype)
    compiled = compilers.compile_for_gpu(case.value_and_grad, *arguments)
    contracts.check_loss(compiled, case, dtype, **LIMITS)


def test_head_holds_no_float32_logits():
    head = contracts.head_value_and_grad(
        xent_jax.softmax_cross_entropy_with_integer_labels
    )
    compiled = compilers.compile_for_gpu(head, *contracts.head_arguments(jnp.bfloat16))
    contracts.check_head(compiled, slack=0.05)


def test_the_plain_formula_would_not_pass():
    # Keeps the checks honest: indexing an upcast copy is the usual way to write this.
    case = PLAIN
    arguments = case.arguments(contracts.SHAPE, jnp.bfloat16)
    compiled = compilers.compile_for_gpu(case.value_and_grad, *arguments)
    with pytest.raises(AssertionError, match=r"needs 10.* MiB; writes .*passes, not 4"):
        contracts.check_loss(compiled, case, jnp.bfloat16, **LIMITS)
