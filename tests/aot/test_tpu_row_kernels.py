"""The TPU kernels of a loss a row compiled: they fit, hold no logits, and are fast."""

import jax
import pytest
from grids import shortened
from registry import NO_KERNEL

from aot import compilers, linear
from aot.contracts import MEBIBYTE
from aot.linear import LLAMA, Sizes, compiled_for, compiled_without_kernels, linear_case
from aot.predict import predict

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = pytest.mark.once

PLAIN = linear_case(None)
EVERY = linear_case(None, "every", without=NO_KERNEL)
# What a chip holds least of, and numbers of classes that fill no register.
LARGE = "v6e", Sizes(3000, 5120, 4001)
SIZES = {
    LARGE: "float32",
    ("v5p", Sizes(2048, 4096, 4096)): "float32",
    ("tpu7x", Sizes(40, 256, 300)): "bfloat16",
    ("v5e", Sizes(1, 128, 1)): "bfloat16",
}


def has_kernels(compiled):
    return "xent_forward" in compiled.text and "xent_rows_backward" in compiled.text


# The most time is a multiple of that of four bare matmuls at the chip's peak.
@pytest.mark.parametrize(
    ("chip", "most"),
    [
        pytest.param("v5e", 1.02, marks=pytest.mark.exhaustive),
        ("v6e", 1.12),
        pytest.param("tpu7x", 1.02, marks=pytest.mark.exhaustive),
    ],
)
def test_predicted_time_and_memory_of_a_language_model(chip, most):
    prediction = predict(chip, "rows")
    # What the kernels say of themselves.
    assert 3.99 <= prediction.products <= 4.05
    assert 1 <= prediction.ratio * 3 / 4 <= most
    # The features' gradient in float32, and numbers a row.
    assert prediction.temp_bytes <= 75 * MEBIBYTE


@pytest.mark.parametrize(
    ("chip", "sizes"),
    shortened(SIZES, kept=[("v6e", Sizes(3000, 5120, 4001))]),
    ids=str,
)
def test_all_options_fit(chip, sizes):
    kernel = SIZES[chip, sizes]
    compiled = compiled_for(chip, EVERY, sizes, kernel_dtype=kernel)
    assert has_kernels(compiled)
    # Neither the kernel nor its gradient is copied to be laid out in another way.
    features = 4 * sizes.rows * sizes.features
    assert compiled.temp_bytes <= 2 * features + 8 * MEBIBYTE


def test_the_logits_are_nowhere():
    compiled = compiled_for("v5p", PLAIN, LLAMA)
    assert has_kernels(compiled)
    assert compiled.temp_bytes <= 75 * MEBIBYTE
    assert not compiled.module.buffers(None, LLAMA.features * LLAMA.classes + 1)


def test_inside_a_shard_map():
    # With `check_vma`, which the interpreter of the kernels cannot do.
    mesh = compilers.tpu_mesh((2, 4), ("data", "model"))
    specs = jax.P("data", None), jax.P(None, "model"), jax.P("data")
    case = linear_case(None, label_smoothing=0.1, class_axis_name="model")
    loss = jax.shard_map(case.loss, mesh=mesh, in_specs=specs, out_specs=jax.P("data"))
    arguments = linear.arguments(case, Sizes(64, 256, 1200))

    def mean(*arguments):
        return loss(*arguments).mean()

    # Nothing else says which chip a program for several devices is for.
    with jax.default_device(mesh.devices.flat[0]):
        function = jax.value_and_grad(mean, argnums=(0, 1))
        compiled = compilers.compile_for_mesh(mesh, function, arguments, specs)
    assert has_kernels(compiled)
    assert compiled.module.collective_kinds == {"all-reduce"}


@pytest.mark.parametrize("change", ["switch", "chip", "two devices"])
def test_where_they_are_not(change, monkeypatch):
    compiled = compiled_without_kernels(change, PLAIN, monkeypatch)
    assert "xent_forward" not in compiled.text
    assert "xent_rows_backward" not in compiled.text
