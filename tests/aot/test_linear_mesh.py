"""The fused linear head compiled for the eight chips of a TPU host."""

import jax
import jax.numpy as jnp
import pytest

import xent_jax
from aot import compilers
from aot.contracts import MEBIBYTE
from aot.linear import Sizes

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = pytest.mark.once

P = jax.P
SIZES = Sizes(8192, 2048, 131072)
ROWS_BLOCK = 1024  # the default at these sizes


def compiled_for(shape, reduction, *, mapped=True, where=False):
    """Value and gradients, by rows and classes of a mesh (rows x classes)."""
    mesh = compilers.tpu_mesh(shape, ("rows", "classes"))
    arrays = (
        ((SIZES.rows, SIZES.features), jnp.bfloat16, P("rows")),
        ((SIZES.features, SIZES.classes), jnp.bfloat16, P(None, "classes")),
        ((SIZES.rows,), jnp.int32, P("rows")),
        ((SIZES.rows,), jnp.bool_, P("rows")),
    )[: 4 if where else 3]
    shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in arrays)
    specs = tuple(spec for _, _, spec in arrays)
    names = {}
    if mapped:
        names["class_axis_name"] = "classes"
        if reduction is not None:
            names["batch_axis_name"] = "rows"

    def loss(hidden, kernel, labels, where=None):
        return xent_jax.linear_softmax_cross_entropy(
            hidden, kernel, labels, where=where, reduction=reduction, **names
        )

    function = loss
    if mapped:
        function = jax.shard_map(
            loss,
            mesh=mesh,
            in_specs=specs,
            out_specs=P("rows") if reduction is None else P(),
        )
    step = jax.value_and_grad(lambda *a: jnp.sum(function(*a)), (0, 1))
    return compilers.compile_for_mesh(mesh, step, shapes, specs)


@pytest.mark.parametrize(
    ("shape", "reduction", "where", "mebibytes"),
    [
        # A chip's part of the kernel's gradient in float32 has 128 MiB with all eight
        # along the classes, and 256 MiB with four; there it is summed over the rows.
        ((1, 8), "mean", False, 140),
        ((1, 8), "mean", True, 300),
        ((2, 4), "mean", False, 850),
        # The features' gradient in float32 has 64 MiB, or 32 MiB with half of the rows.
        ((1, 8), None, False, 65),
        ((2, 4), None, False, 40),
    ],
)
def test_mapped(shape, reduction, where, mebibytes):
    compiled = compiled_for(shape, reduction, where=where)
    module = compiled.module
    assert compiled.temp_bytes <= mebibytes * MEBIBYTE
    assert module.matmul_dtypes == {("bf16", "bf16")}
    products = 3 if reduction else 4
    done = 8 * module.matmul_flops / SIZES.matmul_flops
    assert products * 0.99 <= done <= products * 1.05
    assert module.collective_kinds == {"all-reduce"}
    rows = SIZES.rows // shape[0]
    blocks = rows // ROWS_BLOCK if reduction else 1
    # The features' gradient; with rows sharded, the kernel's and up to two numbers.
    others = 1 if shape[0] == 1 else 4
    assert len(module.collectives) <= 2 * blocks + others
    of_hidden = 4 * rows * SIZES.features
    of_kernel = 0 if shape[0] == 1 else 4 * SIZES.features * SIZES.classes // shape[1]
    sent = sum(size for _, size in module.collectives)
    assert sent <= 12 * rows + of_hidden + of_kernel + 64


def test_plain_jit_gathers_nothing():
    """Blocks of rows span the shards, and the kernel's gradient is summed once."""
    compiled = compiled_for((2, 4), "mean", mapped=False)
    module = compiled.module
    assert compiled.temp_bytes <= 800 * MEBIBYTE
    assert 8 * module.matmul_flops <= 1.05 * 3 * SIZES.matmul_flops
    assert module.collective_kinds == {"all-reduce"}
    of_kernel = SIZES.features * SIZES.classes // 4
    large = [size for _, size in module.collectives if size >= 2 * of_kernel]
    assert len(large) == 1
