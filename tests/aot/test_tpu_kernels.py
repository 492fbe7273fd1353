"""The TPU kernels of the head compiled: they fit, hold no logits, and are fast."""

import jax
import pytest
from grids import shortened
from registry import NO_KERNEL

from aot import compilers, linear
from aot.contracts import MEBIBYTE
from aot.linear import (
    LLAMA,
    ODD,
    Sizes,
    compiled_for,
    compiled_without_kernels,
    linear_case,
)
from aot.predict import loops_of, predict

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = pytest.mark.once

# What a chip holds least of. A v5e has as much vector memory as a v6e, a 7x as a v5p.
WIDE = {"v5p": Sizes(4096, 4096, 2048), "v6e": Sizes(4096, 8192, 2048)}


# What the kernels are for: all but these, and a gradient by class weights.
PLAIN = linear_case("mean")
EVERY = linear_case("mean", "every", without=NO_KERNEL)


def has_kernels(compiled):
    return "xent_forward" in compiled.text and "xent_backward" in compiled.text


# The most time is a multiple of that of three bare matmuls at the chip's peak.
@pytest.mark.parametrize(
    ("chip", "kernel", "most"),
    [
        pytest.param("v5e", "bfloat16", 1.05, marks=pytest.mark.exhaustive),
        ("v6e", "bfloat16", 1.20),
        pytest.param("tpu7x", "bfloat16", 1.10, marks=pytest.mark.exhaustive),
        pytest.param("v6e", "float32", 1.35, marks=pytest.mark.exhaustive),
    ],
)
def test_predicted_time_and_memory_of_a_language_model(chip, kernel, most):
    prediction = predict(chip, "mean", kernel=kernel)
    # What the kernels say of themselves: padded classes and rows are part of it.
    assert 2.99 <= prediction.products <= 3.05
    assert 1 <= prediction.ratio <= most
    # The kernel's gradient in float32 or the kernel in 16 bits, and a block's
    # exponentials, whose memory a result of 16 bits takes.
    assert prediction.temp_bytes <= 1150 * MEBIBYTE


@pytest.mark.parametrize("chip", shortened(WIDE, kept=["v6e"]))
def test_all_options_fit(chip):
    compiled = compiled_for(chip, EVERY, WIDE[chip], kernel_dtype="float32")
    assert has_kernels(compiled)


def test_the_logits_are_nowhere():
    compiled = compiled_for("v5p", PLAIN, LLAMA)
    assert has_kernels(compiled)
    assert compiled.temp_bytes <= 1150 * MEBIBYTE
    assert not compiled.module.buffers(None, LLAMA.features * LLAMA.classes + 1)


@pytest.mark.parametrize(
    ("chip", "sizes"),
    [
        ("v5e", Sizes(1, 128, 1)),
        ("tpu7x", Sizes(40, 256, 300)),
        ("v5e", ODD),
    ],
    ids=str,
)
def test_ragged_sizes(chip, sizes):
    assert has_kernels(compiled_for(chip, EVERY, sizes))


def test_inside_a_shard_map():
    # With `check_vma`, which the interpreter of the kernels cannot do.
    mesh = compilers.tpu_mesh((2, 4), ("data", "model"))
    specs = jax.P("data", None), jax.P(None, "model"), jax.P("data")
    names = {"class_axis_name": "model", "batch_axis_name": "data"}
    case = linear_case("mean", label_smoothing=0.1, **names)
    loss = jax.shard_map(case.loss, mesh=mesh, in_specs=specs, out_specs=jax.P())
    arguments = linear.arguments(case, Sizes(64, 256, 1200))
    # Nothing else says which chip a program for several devices is for.
    with jax.default_device(mesh.devices.flat[0]):
        function = jax.value_and_grad(loss, argnums=(0, 1))
        compiled = compilers.compile_for_mesh(mesh, function, arguments, specs)
    assert has_kernels(compiled)
    assert compiled.module.collective_kinds == {"all-reduce"}


@pytest.mark.parametrize("change", ["switch", "chip", "two devices"])
def test_where_they_are_not(change, monkeypatch):
    compiled = compiled_without_kernels(change, PLAIN, monkeypatch)
    assert "xent_backward" not in compiled.text


def test_bundles_of_a_schedule_are_counted():
    schedule = """
     0   :  { %s1 = inlined_call_operand.hbm }
   0x1 LB: > { %s2 = sphi 0, %s1 }
   0x2 LB: >> { %s3 = sphi 0, %s1 }
   0x3   : >> { %p1 = scmp.ge.s32.totalorder %s3, 5 /* loop exit test */ }
   0x4   : >> { %10 = sbr.rel (!%p1) target bundleno = 2 }
   0x5   : > { %p2 = scmp.ge.s32.totalorder %s2, 3 /* loop exit test */ }
   0x6   : > { %11 = sbr.rel (!%p2) target bundleno = 1 }
   0x7   :  { %12 = vsyncpa [#allocation5], 1 }
"""
    loops = loops_of(schedule)
    assert [(loop.bundles, loop.trips) for loop in loops] == [(2, 1), (3, 3), (3, 15)]
