"""Every public function as an exported program for all platforms, with no compiler.

Exporting lowers for the three platforms on any machine; what comes out is what a
server loads. It must survive serialisation and give on a CPU what the function gives.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from jax import export

import xent_jax
from aot.cases import CASES, PASSES, Case, loss_of, mean
from aot.linear import DIVERGENCE, STATISTICS, linear_case

# JAX needs it to serialise, and does not depend on it.
pytest.importorskip("flatbuffers")

PLATFORMS = ("cpu", "cuda", "tpu")

# Rows of 1024 take the path that is special to long rows on a CPU.
SHAPE = (4, 1024)

# Rows of features, where a linear layer makes the logits.
FEATURES = 16
LINEAR_CASES = [
    dataclasses.replace(case, features=FEATURES)
    for case in (
        linear_case("mean"),
        linear_case("mean", "every"),
        linear_case(None),
        linear_case(None, "every"),
        STATISTICS,
        DIVERGENCE,
    )
]
ALL_CASES = (
    *CASES,
    *LINEAR_CASES,
    *(
        Case(row.key, call, loss_of(call))
        for row in registry.ROWS
        if "kernel" not in row.inputs and row.name not in PASSES
        for call in (registry.Case(row, row.every()[0], row.forms[-1]),)
    ),
)

# The options of a function only matter to its own values, but those of the linear head
# decide which of two programs it is.
ONE_CASE_A_FUNCTION = list(
    {case.function: case for case in reversed(ALL_CASES)}.values()
)
ONE_CASE_A_PROGRAM = [*ONE_CASE_A_FUNCTION, *LINEAR_CASES[1:4]]


def every(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def sample(arguments):
    """Arrays of the given shapes that are logits and probabilities alike."""
    generator = np.random.default_rng(0)

    def draw(argument):
        if argument.dtype == jnp.bool_:
            return jnp.asarray(generator.random(argument.shape) < 0.7)
        if argument.dtype == jnp.int32:
            return jnp.asarray(
                generator.integers(0, SHAPE[1], argument.shape, np.int32)
            )
        values = generator.uniform(0.01, 0.99, argument.shape)
        return jnp.asarray(values, argument.dtype)

    return [draw(argument) for argument in arguments]


def assert_close(got, want):
    """Equal up to the order of summation, and one rounding where that tips one."""

    def check(got, want):
        assert got.dtype == want.dtype
        exact = np.asarray(want, np.float64)
        relative = max(1e-6, float(jnp.finfo(want.dtype).eps))
        # Targets whose rows sum to one have a mean whose gradient is all rounding, and
        # the slope of a softcap far below the logits is a difference.
        absolute = 1e-5 * max(np.abs(exact).max(), 1e-8)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), exact, rtol=relative, atol=absolute
        )

    jax.tree.map(check, got, want)


def exported_and_back(function, arguments, **options):
    """The function as a server gets it."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    restored = export.deserialize(exported.serialize(**options))
    assert restored.platforms == PLATFORMS
    return restored.call


def test_every_public_function_has_a_case():
    public = {
        name for name in xent_jax.__all__ if inspect.isfunction(getattr(xent_jax, name))
    }
    assert public == {case.function.__name__ for case in ALL_CASES}


@every(ALL_CASES)
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.exhaustive)]
)
def test_value_and_gradient_survive_export(case, dtype):
    arguments = sample(case.arguments(SHAPE, dtype))
    call = exported_and_back(case.value_and_grad, arguments)
    assert_close(call(*arguments), jax.jit(case.value_and_grad)(*arguments))


@pytest.mark.exhaustive
@every(ONE_CASE_A_PROGRAM)
def test_exported_value_can_be_differentiated(case):
    arguments = sample(case.arguments(SHAPE, "float32"))
    call = exported_and_back(case.loss, arguments, vjp_order=1)

    exported_gradient = jax.grad(lambda *a: mean(call(*a)), case.by)
    _, gradient = jax.jit(case.value_and_grad)(*arguments)
    assert_close(jax.jit(exported_gradient)(*arguments), gradient)


@pytest.mark.exhaustive
@every(ONE_CASE_A_PROGRAM)
def test_number_of_rows_may_stay_open(case):
    arguments = sample(case.arguments(SHAPE, "float32"))
    (rows,) = export.symbolic_shape("rows")
    shapes = case.arguments((rows, SHAPE[1]), "float32")
    call = exported_and_back(case.value_and_grad, shapes)
    assert_close(call(*arguments), jax.jit(case.value_and_grad)(*arguments))
