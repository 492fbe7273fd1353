"""The fused linear head compiled for TPUs: memory, traffic and matrix products.

Without kernels of its own, which `test_tpu_kernels.py` and `test_tpu_row_kernels.py`
are about.
"""

import jax
import pytest

from aot import compilers, linear
from aot.contracts import MEBIBYTE
from aot.linear import LLAMA, LONG, ODD, PROGRAMS, UNFUSED, linear_case

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.once, pytest.mark.exhaustive]

FORMS = pytest.mark.parametrize("reduction", ["mean", None])


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setenv("XENT_JAX_TPU_KERNELS", "0")


# At the sizes of `LLAMA`. A scalar loss takes blocks of 1024 rows; a loss per row has
# blocks of 32 MiB, and keeps them on the chip.
TEMP_BYTES = {"mean": LLAMA.scalar_bytes(1024), None: 300 * MEBIBYTE}

# With a scalar loss each block of rows reads the kernel twice, and reads and writes its
# gradient: 3.2 GB a block. With a loss per row, each block of classes reads the
# features and adds to their gradient; how much of that stays on the chip differs.
SCALAR_TRAFFIC = 50e9
ROWS_TRAFFIC = {"v5e": 20e9, "v6e": 30e9, "v5p": 45e9, "tpu7x": 45e9}
TRAFFIC = {"mean": SCALAR_TRAFFIC, None: ROWS_TRAFFIC["v5e"]}


def compiled_for(chip, case, sizes=LLAMA, program="both-gradients", **changes):
    make, _, _ = PROGRAMS[program]
    arguments = linear.arguments(case, sizes, **changes)
    return compilers.compile_for_tpu(chip, make(case), *arguments)


@pytest.mark.parametrize("chip", compilers.TPU_TOPOLOGIES)
@FORMS
def test_gradients_hold_no_logits(chip, reduction):
    # The compiler for this chip copies its arguments to another tiling first.
    copied = LLAMA.kernel_bytes + LLAMA.hidden_bytes if chip == "tpu7x" else 0
    linear.check(
        compiled_for(chip, linear_case(reduction)),
        LLAMA,
        matmuls=3 if reduction else 4,
        temp_bytes=TEMP_BYTES[reduction] + copied,
        traffic=SCALAR_TRAFFIC if reduction else ROWS_TRAFFIC[chip],
    )


# Compiling takes longest here: what the compiler has no part in, such as the products
# that a loss per row leaves out, is left to the tests for a GPU.
@pytest.mark.parametrize("program", ["value", "frozen-kernel", "frozen-features"])
def test_what_is_not_asked_for_is_not_computed(program):
    _, matmuls, _ = PROGRAMS[program]
    linear.check(
        compiled_for("v5e", linear_case("mean"), program=program),
        LLAMA,
        matmuls=matmuls,
        temp_bytes=TEMP_BYTES["mean"],
        traffic=TRAFFIC["mean"],
    )


@pytest.mark.parametrize(
    ("reduction", "option"), [("mean", "where"), ("mean", "every"), (None, "every")]
)
def test_options_add_no_logits(reduction, option):
    compiled = compiled_for("v5e", linear_case(reduction, option))
    linear.check(
        compiled,
        LLAMA,
        matmuls=3 if reduction else 4,
        temp_bytes=TEMP_BYTES[reduction],
        traffic=1.05 * TRAFFIC[reduction],
    )


@pytest.mark.parametrize(("option", "skips"), [("plain", False), ("where", True)])
def test_only_where_skips_work(option, skips):
    compiled = compiled_for("v5e", linear_case("mean", option), program="value")
    assert ("conditional" in compiled.module.opcodes) == skips


@FORMS
def test_a_float32_kernel_adds_its_cast_copy(reduction):
    linear.check(
        compiled_for("v5e", linear_case(reduction), kernel_dtype="float32"),
        LLAMA,
        matmuls=3 if reduction else 4,
        temp_bytes=TEMP_BYTES[reduction] + LLAMA.kernel_bytes,
        traffic=1.05 * TRAFFIC[reduction],
    )


def test_smaller_blocks_take_less_memory_and_more_traffic():
    linear.check(
        compiled_for("v5e", linear_case("mean", row_block=256)),
        LLAMA,
        matmuls=3,
        temp_bytes=LLAMA.scalar_bytes(256),
        traffic=125e9,
    )


def test_a_long_batch_fits_a_chip_that_its_logits_do_not_fit():
    linear.check(
        compiled_for("v5e", linear_case("mean"), LONG),
        LONG,
        matmuls=3,
        temp_bytes=4096 * MEBIBYTE,
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compiled_for("v5e", UNFUSED, LONG)


@FORMS
def test_sizes_that_divide_by_nothing(reduction):
    linear.check(
        compiled_for("v5e", linear_case(reduction), ODD),
        ODD,
        matmuls=3 if reduction else 4,
        temp_bytes={"mean": ODD.scalar_bytes(512), None: 40 * MEBIBYTE}[reduction],
    )


def test_the_usual_head_would_not_pass():
    # Keeps the checks honest: it computes the same loss in as many products.
    with pytest.raises(AssertionError, match=r"writes .*f32\[8192, 128256\].*; needs"):
        linear.check(
            compiled_for("v5e", UNFUSED),
            LLAMA,
            matmuls=3,
            temp_bytes=TEMP_BYTES["mean"],
        )
