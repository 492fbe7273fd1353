"""The fused linear head compiled for an H100: memory, traffic and matrix products."""

import jax.numpy as jnp
import pytest

from aot import compilers, linear
from aot.contracts import MEBIBYTE
from aot.linear import LLAMA, ODD, OPTIONS, PROGRAMS, STATISTICS, UNFUSED, linear_case

if not compilers.has_gpu_compiler():
    pytest.skip(
        "the GPU compiler is not installed: "
        "pip install jax-cuda13-plugin jax-cuda13-pjrt flatbuffers",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.once, pytest.mark.exhaustive]

FORMS = pytest.mark.parametrize("reduction", ["mean", None])

# At the sizes of `LLAMA`, whose kernel has a gradient of 1002 MiB in float32. A GPU has
# no room on the chip for a block of logits: it is written and read.
TEMP_BYTES = {"mean": 1.6 * 1024 * MEBIBYTE, None: 300 * MEBIBYTE}
TRAFFIC = {"mean": 49e9, None: 58e9}


def compiled(case, sizes=LLAMA, program="both-gradients", **changes):
    make, _, _ = PROGRAMS[program]
    arguments = linear.arguments(case, sizes, **changes)
    return compilers.compile_for_gpu(make(case), *arguments)


@pytest.mark.parametrize("program", PROGRAMS)
@FORMS
def test_programs_hold_no_logits(reduction, program):
    _, *matmuls = PROGRAMS[program]
    linear.check(
        compiled(linear_case(reduction), program=program),
        LLAMA,
        matmuls=matmuls[reduction is None],
        temp_bytes=TEMP_BYTES[reduction],
        traffic=TRAFFIC[reduction],
    )


@pytest.mark.parametrize("option", [*OPTIONS, "every"][1:])
@FORMS
def test_options_add_no_logits(reduction, option):
    linear.check(
        compiled(linear_case(reduction, option)),
        LLAMA,
        matmuls=3 if reduction else 4,
        temp_bytes=TEMP_BYTES[reduction],
        # Smoothing takes another pass, and what a softcap makes is written.
        traffic=1.2 * TRAFFIC[reduction],
    )


@pytest.mark.parametrize(("option", "skips"), [("plain", False), ("where", True)])
def test_only_where_skips_work(option, skips):
    program = compiled(linear_case("mean", option), program="value")
    assert ("conditional" in program.module.opcodes) == skips


@FORMS
def test_a_float32_kernel_adds_its_cast_copy(reduction):
    linear.check(
        compiled(linear_case(reduction), kernel_dtype=jnp.float32),
        LLAMA,
        matmuls=3 if reduction else 4,
        temp_bytes=TEMP_BYTES[reduction] + LLAMA.kernel_bytes,
        traffic=1.05 * TRAFFIC[reduction],
    )


def test_statistics_cost_what_a_loss_per_row_does():
    linear.check(
        compiled(STATISTICS),
        LLAMA,
        matmuls=4,
        temp_bytes=TEMP_BYTES[None],
        traffic=TRAFFIC[None],
    )


@FORMS
def test_sizes_that_divide_by_nothing(reduction):
    # XLA aligns the operands of a GPU's matrix units: it rounds the classes up to 64.
    linear.check(
        compiled(linear_case(reduction), ODD),
        ODD,
        matmuls=3 if reduction else 4,
        temp_bytes={"mean": ODD.scalar_bytes(1024), None: 80 * MEBIBYTE}[reduction],
        kernel_padding=64,
    )


def test_the_usual_head_would_not_pass():
    # Keeps the checks honest: it computes the same loss in as many products.
    with pytest.raises(AssertionError, match=r"writes .*f32\[8192, 128256\].*; needs"):
        linear.check(
            compiled(UNFUSED),
            LLAMA,
            matmuls=3,
            temp_bytes=TEMP_BYTES["mean"],
        )
