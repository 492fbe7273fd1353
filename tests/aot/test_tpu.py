"""The losses compiled for TPUs: memory and traffic at their floor."""

import jax.numpy as jnp
import pytest

import xent_jax
from aot import compilers, contracts
from aot.cases import CASES, PLAIN, WITH_ALL

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.once, pytest.mark.exhaustive]

# A number a row is 32 KiB, and most of those stay on the chip.
LIMITS = {"temp_bytes": 4 * contracts.MEBIBYTE, "extra_bytes": 8 * contracts.MEBIBYTE}

# bfloat16 logits on every chip. For float32, one chip of each kind: compilers of chips
# with one and with two cores differ, those of v6e and v5p add nothing to these.
CHIPS_AND_DTYPES = [
    *((chip, "bfloat16") for chip in compilers.TPU_TOPOLOGIES),
    ("v5e", "float32"),
    ("tpu7x", "float32"),
]


@pytest.mark.parametrize(("chip", "dtype"), CHIPS_AND_DTYPES)
@pytest.mark.parametrize("case", [*CASES, *WITH_ALL], ids=lambda case: case.name)
def test_loss_is_at_the_floor(chip, dtype, case):
    arguments = case.arguments(contracts.SHAPE, dtype)
    compiled = compilers.compile_for_tpu(chip, case.value_and_grad, *arguments)
    contracts.check_loss(compiled, case, dtype, **LIMITS)


@pytest.mark.parametrize("chip", compilers.TPU_TOPOLOGIES)
def test_head_holds_no_float32_logits(chip):
    head = contracts.head_value_and_grad(
        xent_jax.softmax_cross_entropy_with_integer_labels
    )
    compiled = compilers.compile_for_tpu(
        chip, head, *contracts.head_arguments(jnp.bfloat16)
    )
    contracts.check_head(compiled, slack=0.01)


def test_the_plain_formula_would_not_pass():
    # Keeps the checks honest: indexing an upcast copy is the usual way to write this.
    case = PLAIN
    arguments = case.arguments(contracts.SHAPE, jnp.bfloat16)
    compiled = compilers.compile_for_tpu("v5e", case.value_and_grad, *arguments)
    with pytest.raises(AssertionError, match=r"needs 10.* MiB; writes .*passes, not 4"):
        contracts.check_loss(compiled, case, jnp.bfloat16, **LIMITS)
