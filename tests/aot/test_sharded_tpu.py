"""Losses of sharded logits compiled for the eight chips of a TPU host."""

import jax
import jax.numpy as jnp
import pytest
import registry
from mesh_cases import spec_of
from registry import DENSE
from registry import IDS as INTEGER

from aot import compilers, contracts

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.once, pytest.mark.exhaustive]

ROWS, CLASSES = contracts.SHAPE
P = jax.P


def compiled_for(mesh, loss, masked, *, check_vma=True, mapped=True):
    row = registry.FUNCTIONS[loss]
    case = registry.Case(row, row.every()[-1] if masked else ())
    shapes = case.shapes(registry.Sizes((ROWS,), CLASSES), jnp.dtype(jnp.bfloat16))
    arguments = {word: one for word, one in shapes.items() if case.axes[word]}
    specs = {word: spec_of(case.axes[word], "rows", "classes") for word in arguments}

    def losses(arguments):
        names = {"class_axis_name": "classes"} if mapped else {}
        return case(arguments, **case.numbers, **names)

    if mapped:
        losses = jax.shard_map(
            losses,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=P("rows"),
            check_vma=check_vma,
        )

    def mean(logits, others):
        return jnp.mean(losses(others | {"logits": logits}))

    return compilers.compile_for_mesh(
        mesh,
        lambda arguments: jax.value_and_grad(mean)(arguments["logits"], arguments),
        (arguments,),
        (specs,),
    )


def check(compiled, shards, *, collectives, numbers):
    """Fails unless a few numbers a row are all that is shared, and held.

    Args:
      compiled: value and gradient.
      shards: how many share the rows, and the classes.
      collectives: the most there may be for the rows.
      numbers: the most float32 numbers a row that they may share.
    """
    of_rows, of_classes = shards
    module = compiled.module
    assert module.collective_kinds == {"all-reduce"}
    shared = [size for _, size in module.collectives]
    # The mean over shards of rows is one number.
    assert len(shared) <= collectives + (of_rows > 1)
    # Registers have 128 lanes, of which an array of a few numbers a row may use few.
    assert sum(shared) <= 4 * numbers * (ROWS // of_rows) + 1024
    local = (ROWS // of_rows) * (CLASSES // of_classes)
    assert not module.buffers("f32", local)
    assert compiled.temp_bytes <= 8 * contracts.MEBIBYTE


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [INTEGER, DENSE])
def test_sharded_classes(loss, masked):
    mesh = compilers.tpu_mesh((1, 8), ("rows", "classes"))
    numbers = 6 if loss is DENSE else 8 if masked else 3
    compiled = compiled_for(mesh, loss, masked)
    check(compiled, (1, 8), collectives=2 + masked, numbers=numbers + masked)


def test_sharded_classes_without_the_check():
    mesh = compilers.tpu_mesh((1, 8), ("rows", "classes"))
    compiled = compiled_for(mesh, INTEGER, True, check_vma=False)
    check(compiled, (1, 8), collectives=4, numbers=13)


def test_sharded_rows_and_classes():
    mesh = compilers.tpu_mesh((2, 4), ("rows", "classes"), "Explicit")
    compiled = compiled_for(mesh, INTEGER, True)
    check(compiled, (2, 4), collectives=3, numbers=9)


@pytest.mark.parametrize("loss", [INTEGER, DENSE])
def test_plain_jit(loss):
    mesh = compilers.tpu_mesh((2, 4), ("rows", "classes"))
    compiled = compiled_for(mesh, loss, False, mapped=False)
    check(compiled, (2, 4), collectives=4, numbers=8)
