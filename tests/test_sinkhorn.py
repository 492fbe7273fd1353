"""Sinkhorn targets and their cross-entropy, against float64 that does not use JAX."""

import functools
import itertools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from differences import differences

from xent_jax import sinkhorn_cross_entropy, sinkhorn_targets

compiled = jax.jit(sinkhorn_targets, static_argnames="num_iters")


def draw(kind, samples, prototypes, rng):
    """Scores as they occur, and harder ones."""
    if kind == "uniform costs":
        return -(rng.random((samples, prototypes)) ** 1.5)
    if kind == "cosine":
        features = rng.standard_normal((samples + prototypes, 32))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        return features[:samples] @ features[samples:].T
    offset = {"normal": 0, "offset 5": 5, "offset 1e4": 1e4}[kind]
    rows = offset * rng.uniform(-1, 1, (samples, 1))
    return rng.standard_normal((samples, prototypes)) + rows


def total_variation(targets, truth):
    return np.abs(np.asarray(targets, np.float64) - truth).sum(-1).max() / 2


def as_written(scores, epsilon, num_iters):
    """The listing that SwAV and its kin follow, in float64."""
    targets = np.exp(scores / epsilon)
    samples, prototypes = targets.shape
    for _ in range(num_iters):
        targets /= targets.sum(0) * prototypes / samples
        targets /= targets.sum(1, keepdims=True)
    return targets


# Every number of iterations counts: a result is not only right once it has converged.
@pytest.mark.once
@pytest.mark.parametrize("num_iters", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(128, 64), (512, 128), (4096, 300)])
def test_float32_is_within_2e_6_of_float64(shape, num_iters, rng):
    kinds = ["uniform costs", "cosine", "normal", "offset 5", "offset 1e4"]
    for kind, epsilon in itertools.product(kinds, [0.5, 0.05, 0.01, 1e-3]):
        scores = draw(kind, *shape, rng).astype(np.float32)
        epsilon = np.float32(epsilon)
        targets = compiled(scores, epsilon=epsilon, num_iters=num_iters)
        truth = oracle.sinkhorn_targets(scores, epsilon=epsilon, num_iters=num_iters)
        assert targets.dtype == jnp.float32
        assert total_variation(targets, truth) <= 2e-6, (kind, epsilon)


@pytest.mark.parametrize("num_iters", [3, 10])
@pytest.mark.parametrize(("kind", "epsilon"), [("cosine", 0.05), ("normal", 0.5)])
def test_equals_the_formula_as_it_is_written(kind, epsilon, num_iters, rng):
    scores = draw(kind, 128, 64, rng).astype(np.float32)
    epsilon = np.float32(epsilon)
    truth = as_written(scores.astype(np.float64), np.float64(epsilon), num_iters)
    targets = sinkhorn_targets(scores, epsilon=epsilon, num_iters=num_iters)
    assert total_variation(targets, truth) <= 5e-7
    reference = oracle.sinkhorn_targets(scores, epsilon=epsilon, num_iters=num_iters)
    assert total_variation(reference, truth) <= 1e-13


@pytest.mark.parametrize("epsilon", [1e-4, 1e-6, 1e-8, 1e-10, 1e-20, 2e-38])
def test_an_epsilon_far_below_the_scores_rounding(epsilon, rng):
    """Where a difference of scores is huge in units of epsilon, and their ulp too."""
    scores = rng.standard_normal((32, 8)).astype(np.float32)
    targets = sinkhorn_targets(jnp.asarray(scores), epsilon=epsilon, num_iters=5)
    np.testing.assert_allclose(np.sum(targets, -1), 1, rtol=1e-6)
    gradient = jax.grad(
        lambda s: jnp.sum(sinkhorn_targets(s, epsilon=epsilon)[:, 3] ** 2)
    )(jnp.asarray(scores))
    assert np.isfinite(gradient).all()
    if epsilon >= 1e-8:
        options = {"epsilon": np.float32(epsilon), "num_iters": 5}
        assert (
            total_variation(targets, oracle.sinkhorn_targets(scores, **options)) <= 2e-6
        )


def test_the_usual_forms_fail_where_this_one_does_not(rng):
    """exp overflows; the row's maximum subtracted before it changes the answer."""
    scores = draw("normal", 512, 128, rng).astype(np.float32)
    truth = oracle.sinkhorn_targets(scores)
    with np.errstate(over="ignore", invalid="ignore"):
        usual = as_written(scores, np.float32(0.05), 3)
    assert np.isnan(usual).any()
    shifted = scores.astype(np.float64) - scores.max(1, keepdims=True)
    shifted = as_written(shifted, 0.05, 3)
    assert np.mean(shifted.argmax(1) != truth.argmax(1)) > 0.1
    targets = np.asarray(sinkhorn_targets(scores))
    assert np.array_equal(targets.argmax(1), truth.argmax(1))


@pytest.mark.once
@pytest.mark.parametrize("kind", ["cosine", "normal", "offset 5"])
@pytest.mark.parametrize("epsilon", [0.05, 1e-3])
def test_no_column_starves(kind, epsilon, rng):
    """The bound that the algorithm rests on: a column sum is at least the prior."""
    scores = draw(kind, 200, 50, rng).astype(np.float32)
    prior = rng.dirichlet(np.full(50, 0.3)) + 1e-6
    prior /= prior.sum()
    for num_iters in (1, 2, 5):
        targets = sinkhorn_targets(
            scores, epsilon=epsilon, num_iters=num_iters, prior=prior
        )
        assert np.all(targets.sum(0) >= prior * (1 - 1e-5))


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "epsilon"), [("cosine", 0.1), ("uniform costs", 0.03)]
)
def test_column_error_falls_as_the_second_singular_value(kind, epsilon, rng):
    scores = draw(kind, 128, 64, rng).astype(np.float32)

    def error(num_iters):
        targets = sinkhorn_targets(scores, epsilon=epsilon, num_iters=num_iters)
        return np.abs(np.asarray(targets).sum(0) / 2 - 1).max()

    limit = oracle.sinkhorn_targets(scores, epsilon=epsilon, num_iters=500)
    # Scaled by its marginals, 1 a row and 2 a column.
    factor = np.linalg.svd(limit / np.sqrt(2))[1][1] ** 2
    errors = [error(num_iters) for num_iters in range(3, 9)]
    falls = np.divide(errors[1:], errors[:-1])
    np.testing.assert_allclose(falls[-1], factor, rtol=0.2)


@pytest.mark.once
def test_tol_stops_at_the_first_iteration_within_it(rng):
    scores = draw("cosine", 128, 64, rng).astype(np.float32)

    def error(targets):
        return np.abs(np.asarray(targets, np.float64).sum(0) / 2 - 1).max()

    plain = [compiled(scores, num_iters=count) for count in range(1, 9)]
    errors = [error(targets) for targets in plain]
    assert np.all(np.diff(errors) < 0)
    for num_iters in (6, 8, 100):
        for first in (0, 2, 5):
            # Just above the error of one iteration, below that of the one before.
            stopped = compiled(scores, tol=1.001 * errors[first], num_iters=num_iters)
            np.testing.assert_array_equal(stopped, plain[first])
    never = compiled(scores, tol=0.0, num_iters=8)
    np.testing.assert_array_equal(never, plain[7])


def test_iterations_after_tol_cost_next_to_nothing(rng):
    scores = jnp.asarray(draw("cosine", 2048, 128, rng), jnp.float32)

    def seconds(tol):
        run = functools.partial(compiled, scores, tol=tol, num_iters=300, epsilon=0.5)
        run().block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run().block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(1e-2) < seconds(0.0) / 5


@pytest.mark.once
@pytest.mark.parametrize("tol", [None, 1e-2])
def test_dropped_rows_do_not_count(tol, rng):
    scores = draw("normal", 60, 8, rng).astype(np.float32)
    keep = np.arange(60) % 3 > 0
    broken = np.where(keep[:, None], scores, np.nan)
    broken[0], broken[3] = np.inf, -np.inf
    weights = rng.standard_normal((60, 8)).astype(np.float32)

    def total(scores, weights, where):
        targets = sinkhorn_targets(scores, num_iters=9, tol=tol, where=where)
        return jnp.vdot(targets, weights), targets

    slope = jax.jit(jax.grad(total, has_aux=True))
    gradient, targets = slope(broken, weights, keep)
    assert not np.any(targets[~keep])
    assert not np.any(gradient[~keep])
    true_gradient, truth = slope(scores[keep], weights[keep], None)
    np.testing.assert_allclose(targets[keep], truth, atol=3e-7)
    np.testing.assert_allclose(gradient[keep], true_gradient, atol=2e-5)


def test_no_rows_and_none_kept():
    bad = np.full((4, 3), np.nan, np.float32)
    prior = jnp.ones(3)
    none = np.zeros(4, bool)

    def total(scores, prior):
        targets = sinkhorn_targets(scores, where=none, prior=prior, tol=0.1)
        return targets.sum(), targets

    gradients, targets = jax.grad(total, argnums=(0, 1), has_aux=True)(bad, prior)
    for array in (targets, *gradients):
        assert not np.any(array)
    assert sinkhorn_targets(bad[:0]).shape == (0, 3)
    assert sinkhorn_cross_entropy(bad[:0], bad[:0]).shape == (0,)


def test_prior(rng):
    scores = draw("uniform costs", 90, 6, rng).astype(np.float32)
    prior = np.array([5, 1, 1, 3, 0.5, 2])
    for scale in (1, 7):
        targets = sinkhorn_targets(scores, prior=prior * scale)
        truth = oracle.sinkhorn_targets(scores, epsilon=np.float32(0.05), prior=prior)
        assert total_variation(targets, truth) <= 1e-6
    balanced = sinkhorn_targets(scores, prior=prior, num_iters=200, tol=1e-5)
    np.testing.assert_allclose(balanced.sum(0), 90 * prior / prior.sum(), rtol=2e-5)
    # One prototype takes all, whatever its share.
    np.testing.assert_array_equal(sinkhorn_targets(scores[:, :1]), np.ones((90, 1)))


def test_forbidden_pairs(rng):
    scores = draw("normal", 40, 5, rng).astype(np.float32)
    forbidden = rng.random((40, 5)) < 0.3
    forbidden[:, 0] = False
    scores[forbidden] = -np.inf
    with np.errstate(invalid="ignore"):
        truth = oracle.sinkhorn_targets(scores, epsilon=np.float32(0.05))
    weights = rng.standard_normal((40, 5)).astype(np.float32)

    def total(scores, epsilon):
        targets = sinkhorn_targets(scores, epsilon=epsilon)
        return jnp.vdot(targets, weights), targets

    slope = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (gradient, by_epsilon), targets = slope(scores, np.float32(0.05))
    assert not np.any(targets[forbidden])
    assert total_variation(targets, truth) <= 2e-6
    assert not np.any(gradient[forbidden])
    assert np.all(np.isfinite(gradient))
    with np.errstate(invalid="ignore"):
        slope_of_truth = differences(
            lambda e: np.vdot(oracle.sinkhorn_targets(scores, epsilon=e[0]), weights),
            [0.05],
        )
    np.testing.assert_allclose([by_epsilon], slope_of_truth, rtol=1e-4)


@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_nan_and_infinity_reach_every_target(number, tol, rng):
    scores = draw("normal", 10, 4, rng).astype(np.float32)
    scores[3, 2] = number
    for num_iters in (1, 2, 3):
        targets = sinkhorn_targets(scores, num_iters=num_iters, tol=tol)
        assert np.all(np.isnan(targets))


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_a_row_or_a_column_that_cannot_be_assigned_is_never_hidden(tol, rng):
    scores = draw("normal", 10, 4, rng).astype(np.float32)
    column = np.where(np.arange(4) == 1, -np.inf, scores)
    row = np.where(np.arange(10)[:, None] == 7, -np.inf, scores)
    for num_iters in (1, 2, 3):
        targets = sinkhorn_targets(column, num_iters=num_iters, tol=tol)
        assert np.all(np.isnan(targets))
        targets = sinkhorn_targets(row, num_iters=num_iters, tol=tol)
        assert np.all(np.isnan(targets[7]))
        assert num_iters == 1 or np.all(np.isnan(targets))


def test_traced_options_that_are_not_positive_give_nan(rng):
    scores = draw("normal", 10, 4, rng).astype(np.float32)
    run = jax.jit(lambda e, p: sinkhorn_targets(scores, epsilon=e, prior=p))
    good = np.ones(4, np.float32)
    assert np.all(np.isfinite(run(0.05, good)))
    for bad in (np.array([1, 0, 1, 1]), np.array([1, -1, 1, 1]), good * np.nan):
        assert np.all(np.isnan(run(0.05, bad.astype(np.float32))))
    for epsilon in (0.0, np.nan):
        assert np.all(np.isnan(run(epsilon, good)))


@pytest.mark.once
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_scores_are_computed_in_float32(dtype, rng):
    scores = jnp.asarray(draw("normal", 64, 16, rng), dtype)
    wide = scores.astype(jnp.float32)
    np.testing.assert_array_equal(compiled(scores), compiled(wide))
    gradient = jax.grad(lambda s: (sinkhorn_targets(s) ** 2).sum())(scores)
    exact = jax.grad(lambda s: (sinkhorn_targets(s) ** 2).sum())(wide)
    assert gradient.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps)
    difference = np.abs(np.asarray(gradient, np.float32) - exact)
    assert np.all(difference <= rounding * np.abs(exact) + 1e-5)


def test_float64(rng, x64):
    for kind, epsilon in itertools.product(["cosine", "offset 5"], [0.5, 1e-3]):
        scores = draw(kind, 128, 64, rng)
        targets = sinkhorn_targets(scores, epsilon=epsilon, num_iters=10)
        assert targets.dtype == jnp.float64
        truth = oracle.sinkhorn_targets(scores, epsilon=epsilon, num_iters=10)
        # The reference divides first: 1e4·2⁻⁵³ of every exponent is its own error.
        assert total_variation(targets, truth) <= 1e-11
    assert sinkhorn_targets(jnp.asarray(scores, jnp.float32)).dtype == jnp.float32


@pytest.mark.once
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("num_iters", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"tol": 0.05}, {"where": [1, 1, 0, 1, 1]}])
def test_derivatives(options, num_iters, mode, rng, x64):
    scores = rng.standard_normal((5, 3)) / 5
    options = {name: np.asarray(value) for name, value in options.items()}
    if "where" in options:
        options["where"] = options["where"].astype(bool)
    truth = {name: value for name, value in options.items() if name == "where"}
    prior = np.array([1.0, 2.0, 1.5])
    point = np.concatenate([scores.ravel(), prior, [0.2]])

    def call(function, point, options):
        return function(
            point[:15].reshape(5, 3),
            prior=point[15:18],
            epsilon=point[18],
            **{"num_iters": num_iters} | options,
        )

    jacobian = jax.jit(mode(lambda p: call(sinkhorn_targets, p, options)))
    if "tol" in options:
        # The number of iterations that it stops at is a constant.
        truth["num_iters"] = stops_at(scores, prior, 0.2, 0.05, num_iters)
    expected = differences(lambda p: call(oracle.sinkhorn_targets, p, truth), point)
    np.testing.assert_allclose(jacobian(point), expected, rtol=1e-7, atol=1e-8)


def stops_at(scores, prior, epsilon, tol, num_iters):
    """Returns the iteration whose column sums are within tol, or the last."""
    share = len(scores) * prior / prior.sum()
    for count in range(1, num_iters):
        targets = oracle.sinkhorn_targets(
            scores, epsilon=epsilon, num_iters=count, prior=prior
        )
        if np.abs(targets.sum(0) / share - 1).max() < tol:
            return count
    return num_iters


@pytest.mark.parametrize("tol", [None, 1e-2])
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives(inner, outer, tol, rng, x64):
    scores = rng.standard_normal((4, 3)) / 5
    weights = rng.standard_normal((4, 3))
    count = 4 if tol is None else stops_at(scores, np.ones(3), 0.3, tol, 4)

    def total(scores):
        targets = sinkhorn_targets(scores, epsilon=0.3, num_iters=4, tol=tol)
        return (weights * targets**2).sum()

    def gradient(scores):
        return differences(
            lambda s: (
                weights * oracle.sinkhorn_targets(s, epsilon=0.3, num_iters=count) ** 2
            ).sum(),
            scores,
            1e-3,
        )

    expected = differences(gradient, scores, 1e-3)
    hessian = jax.jit(outer(inner(total)))(scores)
    np.testing.assert_allclose(hessian, expected, rtol=1e-5, atol=1e-5)


def test_float32_gradient_at_a_small_epsilon(rng):
    scores = draw("cosine", 128, 64, rng).astype(np.float32)
    weights = rng.standard_normal((128, 64)).astype(np.float32)

    def slope(dtype):
        return jax.grad(
            lambda s: jnp.vdot(
                sinkhorn_targets(s, epsilon=np.float32(0.01), num_iters=10),
                weights.astype(dtype),
            )
        )(jnp.asarray(scores, dtype))

    narrow = slope(np.float32)
    jax.config.update("jax_enable_x64", True)
    try:
        wide = slope(np.float64)
    finally:
        jax.config.update("jax_enable_x64", False)
    np.testing.assert_allclose(narrow, wide, atol=1e-5 * np.abs(wide).max())


FORMS = {
    "jit": lambda f, x: jax.jit(jax.vmap(f))(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "scan": lambda f, x: jax.lax.scan(lambda c, s: (c, f(s)), 0, x)[1],
    "checkpoint": lambda f, x: jnp.stack([jax.checkpoint(f)(s) for s in x]),
    "linearize": lambda f, x: jnp.stack([jax.linearize(f, s)[0] for s in x]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tol", [None, 0.1])
def test_transformations(form, tol, rng):
    scores = jnp.asarray(rng.standard_normal((3, 12, 5)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((12, 5)), jnp.float32)
    targets = functools.partial(sinkhorn_targets, epsilon=0.3, num_iters=6, tol=tol)
    gradient = jax.grad(lambda s: jnp.vdot(targets(s), weights))
    for function in (targets, gradient):
        apart = jnp.stack([function(s) for s in scores])
        together = FORMS[form](function, scores)
        np.testing.assert_allclose(together, apart, atol=2e-6)


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_memory_of_the_gradient_does_not_grow_with_the_iterations(tol):
    samples, prototypes = 512, 64

    def temporary(num_iters):
        def total(scores):
            targets = sinkhorn_targets(scores, num_iters=num_iters, tol=tol)
            return (targets**2).sum()

        shape = jax.ShapeDtypeStruct((samples, prototypes), jnp.float32)
        program = jax.jit(jax.grad(total)).lower(shape).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = temporary(4), temporary(104)
    array = 4 * samples * prototypes
    assert few <= 7 * array
    # Two numbers a prototype: nothing that grows with the samples.
    assert many - few <= 100 * (2 * 4 * prototypes + 64)


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_reverse_mode_keeps_the_scores_alone(tol, rng):
    scores = jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16)
    pullback = jax.vjp(lambda s: sinkhorn_targets(s, num_iters=9, tol=tol), scores)[1]
    kept = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)]
    large = [str(leaf.dtype) for leaf in kept if leaf.size >= scores.size]
    assert large == ["float32"]
    assert sum(leaf.size for leaf in kept) - scores.size <= 64 + 32 * (2 * 9 + 6)


def inner_jaxprs(jaxpr):
    """Yields a jaxpr and all that are in it, with whether they are in a cond."""
    yield jaxpr, False
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                for nested, conditional in inner_jaxprs(inner):
                    yield nested, conditional or equation.primitive.name == "cond"


def mesh_of(count, kind="Auto"):
    types = (getattr(jax.sharding.AxisType, kind),)
    return jax.make_mesh((count,), ("data",), types, devices=jax.devices()[:count])


def sharded(function, mesh, check_vma=True, **options):
    spec = jax.P("data")

    def body(scores, where):
        return function(scores, where=where, batch_axis_name="data", **options)

    return jax.shard_map(
        body, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check_vma
    )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("tol", [None, 0.1])
def test_samples_sharded_over_eight_devices(tol, check_vma, rng):
    scores = jnp.asarray(draw("cosine", 64, 16, rng), jnp.float32)
    # One device has no sample that counts.
    keep = jnp.asarray((np.arange(64) % 5 > 0) & (np.arange(64) >= 8))
    weights = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    options = {"tol": tol, "num_iters": 8}
    apart = sharded(sinkhorn_targets, mesh_of(8), check_vma, **options)

    def together(scores, where):
        return sinkhorn_targets(scores, where=where, **options)

    def both(targets):
        def total(scores):
            return jnp.vdot(targets(scores, keep), weights), targets(scores, keep)

        return jax.jit(jax.grad(total, has_aux=True))(scores)

    (gradient, targets), (true_gradient, truth) = both(apart), both(together)
    np.testing.assert_allclose(targets, truth, atol=1e-6)
    scale = np.abs(true_gradient).max()
    np.testing.assert_allclose(gradient, true_gradient, atol=3e-6 * scale)


def test_gradient_inside_shard_map(rng):
    scores = jnp.asarray(draw("cosine", 64, 16, rng), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    spec = jax.P("data")

    def total(scores, weights, **options):
        return jnp.vdot(sinkhorn_targets(scores, **options), weights)

    inside = jax.shard_map(
        jax.grad(
            lambda s, w: jax.lax.psum(total(s, w, batch_axis_name="data"), "data")
        ),
        mesh=mesh_of(8),
        in_specs=(spec, spec),
        out_specs=spec,
    )
    expected = jax.grad(total)(scores, weights)
    scale = np.abs(expected).max()
    gradient = jax.jit(inside)(scores, weights)
    np.testing.assert_allclose(gradient, expected, atol=3e-6 * scale)


@pytest.mark.parametrize("tol", [None, 0.1])
def test_an_iteration_sends_one_number_a_prototype(tol):
    """One psum of K numbers in the loop, none in a branch."""
    program = sharded(sinkhorn_targets, mesh_of(8), tol=tol, num_iters=5)
    arguments = jnp.zeros((64, 16)), jnp.ones(64, bool)
    loops, branches = [], []
    for jaxpr, conditional in inner_jaxprs(jax.make_jaxpr(program)(*arguments).jaxpr):
        names = [e.primitive.name for e in jaxpr.eqns]
        sums = [e for e in jaxpr.eqns if e.primitive.name.startswith(("psum", "pm"))]
        if conditional:
            branches += sums
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                body = equation.params["jaxpr"].jaxpr
                loops += [
                    variable.aval.shape
                    for inner, _ in inner_jaxprs(body)
                    for e in inner.eqns
                    if e.primitive.name.startswith("psum")
                    for variable in e.outvars
                ]
        assert "all_gather" not in names
        assert "all_to_all" not in names
    assert loops == [(1, 16)]
    assert not branches


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [("a", None), (None, "b"), ("a", "b")])
def test_sharded_under_plain_jit(spec, kind, rng):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), types)
    scores = jnp.asarray(draw("cosine", 32, 16, rng), jnp.float32)
    logits = jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)

    @jax.jit
    def both(scores, logits):
        def total(scores, logits):
            targets = sinkhorn_targets(scores, num_iters=5, tol=1e-2)
            loss = sinkhorn_cross_entropy(logits, scores, temperature=0.5)
            return loss.mean() + (targets**2).mean()

        return jax.value_and_grad(total, argnums=(0, 1))(scores, logits)

    expected = both(scores, logits)
    with jax.set_mesh(mesh):
        put = [jax.device_put(array, jax.P(*spec)) for array in (scores, logits)]
        computed = both(*put)
    for got, want in zip(*map(jax.tree.leaves, (computed, expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_compiles_once_a_shape(rng):
    chex.clear_trace_counter()
    targets = chex.assert_max_traces(
        lambda s, e: sinkhorn_targets(s, epsilon=e, tol=0.1), n=1
    )
    run = jax.jit(targets)
    for epsilon in (0.05, 0.1, 0.2):
        run(draw("normal", 16, 4, rng).astype(np.float32), epsilon)
