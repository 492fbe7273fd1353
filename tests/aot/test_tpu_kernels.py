"""The TPU kernels of the head compiled: they fit, and the logits are nowhere."""

import jax
import jax.numpy as jnp
import pytest

from aot import compilers
from aot.contracts import MEBIBYTE
from xent_jax._class_axis import ClassAxis
from xent_jax._label_terms import Coefficients
from xent_jax._tpu_sum import Head, value_and_gradients
from xent_jax._tpu_tiling import tiling_of

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

CHIPS = {
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}
LLAMA = (8192, 2048, 128256)
# What a chip holds least of: features, or nothing at all.
WIDE = {
    "v5e": (4096, 8192, 2048),
    "v5p": (4096, 4096, 2048),
    "v6e": (4096, 8192, 2048),
    "tpu7x": (4096, 4096, 2048),
}


def head_of(sizes, *, options=False, dtype=jnp.bfloat16):
    """Returns the arguments' shapes, of a plain head or of one with all options."""
    rows, features, classes = sizes

    def row(dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, 1), dtype)

    def column(dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, classes), dtype) if options else None

    return Head(
        jax.ShapeDtypeStruct((rows, features), jnp.bfloat16),
        jax.ShapeDtypeStruct((features, classes), dtype),
        row(jnp.int32),
        row(jnp.bool_) if options else None,
        row() if options else None,
        column(),
        column(jnp.bool_),
        column(),
        Coefficients(row(), row() if options else None, row() if options else None),
    )


def compiled_for(chip, sizes, **options):
    head = head_of(sizes, **options)
    tiling = tiling_of(*sizes, CHIPS[chip], head.kernel.dtype.itemsize)
    # Lowering asks which chip it is for.
    with jax.default_device(compilers._tpu_device(chip)):
        return compilers.compile_for_tpu(
            chip, lambda head: value_and_gradients(tiling, head, ClassAxis(-1)), head
        )


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [*((chip, jnp.bfloat16) for chip in CHIPS), ("v6e", jnp.float32)],
    ids=str,
)
def test_memory_of_a_language_model(chip, dtype):
    compiled = compiled_for(chip, LLAMA, dtype=dtype)
    assert compiled.text.count('custom_call_target="tpu_custom_call"') >= 2
    # The kernel's gradient in float32, or the kernel in 16 bits and a block's
    # exponentials, which the result takes the memory of where it has 16 bits.
    assert compiled.temp_bytes <= 1150 * MEBIBYTE


@pytest.mark.parametrize("chip", CHIPS)
def test_all_options_fit(chip):
    compiled_for(chip, WIDE[chip], options=True)


@pytest.mark.parametrize("sizes", [(1, 128, 1), (40, 256, 300), (8519, 768, 50257)])
@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_ragged_sizes(chip, sizes):
    compiled_for(chip, sizes, options=True)
