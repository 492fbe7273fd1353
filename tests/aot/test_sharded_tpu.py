"""Losses of sharded logits compiled for the eight chips of a TPU host."""

import functools

import jax
import jax.numpy as jnp
import pytest

import xent_jax
from aot import compilers, contracts

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = pytest.mark.once

INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels
DENSE = xent_jax.softmax_cross_entropy
ROWS, CLASSES = contracts.SHAPE
P = jax.P


def program(loss, masked, dtype=jnp.bfloat16):
    """Returns the mean of a loss with its arguments and how they are sharded."""
    full, row = P("rows", "classes"), P("rows")

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    arguments = {"logits": array(dtype, ROWS, CLASSES)}
    specs = {"logits": full}
    if loss is DENSE:
        arguments["labels"], specs["labels"] = array(dtype, ROWS, CLASSES), full
    else:
        arguments["labels"], specs["labels"] = array(jnp.int32, ROWS), row
    if masked:
        arguments["where"], specs["where"] = array(jnp.bool_, ROWS, CLASSES), full
        weights = array(jnp.float32, CLASSES)
        arguments["class_weights"], specs["class_weights"] = weights, P("classes")
        loss = functools.partial(loss, label_smoothing=0.1, z_loss=1e-4)
    return loss, arguments, specs


def compiled_for(mesh, loss, masked, *, check_vma=True, mapped=True):
    loss, arguments, specs = program(loss, masked)

    def losses(arguments):
        return loss(**arguments, class_axis_name="classes")

    if mapped:
        losses = jax.shard_map(
            losses,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=P("rows"),
            check_vma=check_vma,
        )
    else:

        def losses(arguments):
            return loss(**arguments)

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
