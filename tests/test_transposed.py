"""A linear function whose transpose is chosen when it is lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xent_jax._reductions.transposed import transposed_by_place

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("unoptimized")]

CONSTANTS = {"scale": jnp.arange(1.0, 4.0), "count": jnp.arange(3)}
DOTS = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)


def linear(constants, dots):
    factor = jnp.sin(constants["scale"]) + constants["count"].astype(jnp.float32)
    left, right = dots
    return {"sum": (factor[None] * left).sum(1), "right": factor * right * 2}


def by_hand(constants, bars):
    factor = jnp.sin(constants["scale"]) + constants["count"].astype(jnp.float32)
    left = bars["sum"][:, None] * factor[None]
    return left, 2 * factor * bars["right"]


@pytest.fixture
def programs():
    """The places that a transpose was lowered for; `None` for the equations'."""
    return []


@pytest.fixture(params=[True, False], ids=["by hand", "by equations"])
def function(request, programs):
    def at(place):
        programs.append(place.chip)
        return by_hand if request.param else None

    return transposed_by_place(linear, at)


def gradients(function, constants, dots):
    """Returns what a quadratic function of the results is differentiated to."""

    def total(scale, dots):
        results = function(constants | {"scale": scale}, dots)
        squares = jax.tree.map(lambda array: jnp.sum(array**2), results)
        return squares["sum"] + squares["right"]

    return jax.grad(total, argnums=(0, 1))(constants["scale"], dots)


def assert_equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), left, right)


def of_dots(function, constants, dots):
    """Returns a gradient that is the transpose."""
    return jax.grad(lambda dots: jnp.sum(jnp.sin(function(constants, dots)["sum"])))(
        dots
    )


def test_value_and_transpose(function, programs):
    assert_equal(jax.jit(function)(CONSTANTS, DOTS), linear(CONSTANTS, DOTS))
    assert not programs
    transposed = jax.jit(lambda d: of_dots(function, CONSTANTS, d))
    assert_equal(transposed(DOTS), of_dots(linear, CONSTANTS, DOTS))
    assert programs == ["cpu"]


def test_without_jit(function):
    assert_equal(function(CONSTANTS, DOTS), linear(CONSTANTS, DOTS))
    assert_equal(of_dots(function, CONSTANTS, DOTS), of_dots(linear, CONSTANTS, DOTS))


def test_gradient_by_the_constants_too(function, programs):
    wanted = gradients(linear, CONSTANTS, DOTS)
    assert_equal(jax.jit(lambda: gradients(function, CONSTANTS, DOTS))(), wanted)
    # Then it is not linear in what is differentiated.
    assert not programs


def test_part_of_the_tangents(function, programs):
    def part(right, function):
        return of_dots(
            lambda c, d: function(c, (DOTS[0] * right, d)), CONSTANTS, DOTS[1]
        )

    assert_equal(jax.jit(lambda: part(2.0, function))(), part(2.0, linear))
    assert len(programs) <= 1


@pytest.mark.parametrize("mapped", ["dots", "constants", "both"])
def test_vmap(function, programs, mapped):
    def stack(array):
        return jnp.stack([array, array + 1, array + 2])

    axes = [0 if mapped in (name, "both") else None for name in ("constants", "dots")]
    arguments = [
        jax.tree.map(stack, tree) if axis == 0 else tree
        for tree, axis in zip((CONSTANTS, DOTS), axes, strict=True)
    ]

    def both(function):
        def result(*arguments):
            return function(*arguments), of_dots(function, *arguments)

        return jax.jit(jax.vmap(result, in_axes=axes))(*arguments)

    assert_equal(both(function), both(linear))
    assert not programs


def test_higher_derivatives(function):
    def hessian_products(function):
        def of_scale(scale):
            return gradients(function, CONSTANTS | {"scale": scale}, DOTS)

        def of_transpose(scale):
            return of_dots(function, CONSTANTS | {"scale": scale}, DOTS)

        scale = CONSTANTS["scale"]
        return [
            jax.jvp(of_scale, (scale,), (scale,)),
            jax.jvp(of_transpose, (scale,), (scale,)),
            jax.vjp(of_transpose, scale)[1](DOTS),
            jax.jacfwd(jax.jacrev(lambda s: of_transpose(s)[1]))(scale),
            jax.jacrev(jax.jacfwd(lambda s: of_transpose(s)[1]))(scale),
            jax.hessian(lambda d: of_dots(function, CONSTANTS, (DOTS[0], d))[1].sum())(
                DOTS[1]
            ),
        ]

    assert_equal(
        jax.jit(lambda: hessian_products(function))(), hessian_products(linear)
    )


def test_inside_loops_and_checkpoints(function, programs):
    def looped(function):
        def step(carry, scale):
            rule = jax.checkpoint(lambda d: function(CONSTANTS | {"scale": scale}, d))
            return carry + jnp.sum(jnp.sin(rule((carry, DOTS[1]))["sum"])), None

        def total(start):
            return jax.lax.scan(step, start, jnp.ones((4, 3)))[0].sum()

        return jax.grad(total)(DOTS[0])

    assert_equal(jax.jit(lambda: looped(function))(), looped(linear))
    del programs


def test_linear_transpose_and_export(function, programs):
    def pulled(bars):
        return jax.linear_transpose(lambda d: function(CONSTANTS, d), DOTS)(bars)

    bars = linear(CONSTANTS, DOTS)
    assert_equal(jax.jit(pulled)(bars)[0], by_hand(CONSTANTS, bars))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), bars)
    programs.clear()
    exported = jax.export.export(jax.jit(pulled), platforms=("cpu", "tpu", "cuda"))
    exported = jax.export.deserialize(exported(shapes).serialize())
    assert_equal(exported.call(bars)[0], by_hand(CONSTANTS, bars))
    assert set(programs) == {"cpu", "tpu", None}


def test_inside_a_shard_map(function):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = ({"scale": jax.P(), "count": jax.P()}, (jax.P("x"), jax.P()))

    def sharded(function):
        def local(constants, dots):
            return function(constants, dots)["sum"]

        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P("x"))

    def gradient(function):
        def total(scale, dots):
            return jnp.sum(sharded(function)(CONSTANTS | {"scale": scale}, dots) ** 2)

        return jax.jit(jax.grad(total, argnums=(0, 1)))(CONSTANTS["scale"], DOTS)

    assert_equal(gradient(function), gradient(linear))
