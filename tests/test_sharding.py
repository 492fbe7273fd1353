"""Classes sharded over a mesh axis inside `jax.shard_map`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import shards
from aot import hlo
from differences import slopes

import xent_jax

CASES = [
    shards.case(name, mask, *options)
    for name in (shards.INTEGER, shards.DENSE)
    for mask, options in (("rows", ()), ("classes", shards.OPTIONS))
]


FULL_AND_PLAIN = [
    shards.case(name, mask, *options)
    for name in (shards.INTEGER, shards.DENSE)
    for mask, options in ((None, ()), ("classes", shards.OPTIONS))
]
INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels


def truth_of(case, batch, **changed):
    """What the oracle says of a batch, in float64, with some arguments changed."""
    options = {**batch.moving, **changed}
    return case.oracle(
        options.pop("logits"), batch.labels, where=batch.where, **options
    )


def check_values(case, batch, values, gradient):
    """Value and gradient of all rows against the oracle, at the promised accuracy."""
    truth = truth_of(case, batch)
    scale = np.nanmax(np.where(np.isfinite(truth.gradient), abs(truth.gradient), 0), -1)
    if case.dense or case.options:
        np.testing.assert_allclose(values, truth.value, rtol=1e-6)
        atol = 3e-7 * np.maximum(1, scale[:, None])
    else:
        assert oracle.ulp_error(values, truth.value, "float32").max() <= 4
        hit = np.arange(gradient.shape[1]) == batch.labels[:, None]
        error = oracle.ulp_error(gradient[hit], truth.gradient[hit], "float32")
        assert error.max() <= 4
        atol = 4 * 2.0**-23 * scale[:, None] + 1e-37
    np.testing.assert_array_equal(np.isnan(gradient), np.isnan(truth.gradient))
    difference = np.nan_to_num(np.asarray(gradient) - truth.gradient)
    assert np.all(np.abs(difference) <= atol), np.abs(difference / atol).max()


def check_derivatives(case, batch, directions, results):
    """Gradients by the options, tangent and Hessian-vector product of finite rows."""
    _, gradient, values_dot, gradient_dot = results
    moving = {name: np.float64(array) for name, array in batch.moving.items()}
    expected = (truth_of(case, batch).gradient * directions["logits"]).sum(-1)
    for name in case.options:

        def at(step, name=name):
            changed = {name: moving[name] + step * directions[name]}
            return truth_of(case, batch, **changed).value

        slope = slopes(at)
        by_option = np.sum(gradient[name] * directions[name])
        # A sum of many terms of either sign.
        size = np.abs(slope).sum()
        np.testing.assert_allclose(by_option, slope.sum(), rtol=2e-5, atol=1e-6 * size)
        expected = expected + slope
    np.testing.assert_allclose(values_dot, expected, rtol=1e-5, atol=1e-5)

    def slope(step):
        moved = {name: moving[name] + step * directions[name] for name in moving}
        return truth_of(case, batch, **moved).gradient

    curved = slopes(slope)
    np.testing.assert_allclose(gradient_dot["logits"], curved, rtol=1e-4, atol=1e-5)


EACH_SETTING = [
    pytest.param(
        setting,
        id=str(setting),
        marks=() if setting in shards.SETTINGS[2:4] else pytest.mark.exhaustive,
    )
    for setting in shards.SETTINGS
]


@pytest.mark.parametrize("setting", EACH_SETTING)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sharded_is_the_oracle(case, setting, rng):
    special, plain = shards.batch(case, True), shards.batch(case, False)
    directions = {
        name: np.asarray(rng.standard_normal(array.shape), np.float32)
        for name, array in plain.moving.items()
    }
    direction = shards.placed(case, plain._replace(moving=directions), setting).moving
    run = shards.program(case, plain, setting)
    results = run(shards.placed(case, special, setting), direction)
    values, gradient, *_ = jax.device_get(results)
    check_values(case, special, values, gradient["logits"])
    results = jax.device_get(run(shards.placed(case, plain, setting), direction))
    check_values(case, plain, results[0], results[1]["logits"])
    check_derivatives(case, plain, directions, results)
    # Other values, the same program.
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", [shards.INTEGER, shards.DENSE])
def test_one_class_a_shard(name):
    """An array of this shard's classes then has the shape of one number a row."""
    case = shards.case(name, "classes", *shards.OPTIONS)
    batch = shards.batch(case, True, classes=8)
    setting = shards.SETTINGS[0]
    run = shards.program(case, batch, setting)
    arguments = shards.placed(case, batch, setting)
    values, gradient, *_ = jax.device_get(run(arguments, arguments.moving))
    check_values(case, batch, values, gradient["logits"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy_of_many_classes(dtype, rng):
    """Several mesh axes, classes on the first axis of the array, large offsets."""
    rows, classes = 60, 8192
    mesh = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    logits = rng.standard_normal((rows, classes))
    ids = rng.integers(0, classes, rows)
    hit = np.arange(classes) == ids[:, None]
    rivals = np.where(hit, -np.inf, logits).max(-1)
    margins = np.linspace(-60, 80, rows)
    logits = np.where(hit, (rivals + margins)[:, None], logits) + 1e3
    logits = np.asarray(jnp.asarray(logits, dtype))
    spec = jax.P(("a", "b"))

    def total(logits):
        loss = jax.shard_map(
            lambda logits: INTEGER(logits, ids, 0, class_axis_name=("a", "b")),
            mesh=mesh,
            in_specs=spec,
            out_specs=jax.P(),
        )(logits)
        return loss.sum(), loss

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits.T)
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
    assert oracle.ulp_error(values, truth.value, "float32").max() <= 4
    normal = np.abs(truth.gradient) > 1e-36
    error = oracle.ulp_error(gradient.T, truth.gradient, dtype)
    if dtype == "float32":
        assert error[hit & normal].max() <= 4
    else:
        assert error[normal].max() <= 0.52


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("case", FULL_AND_PLAIN, ids=lambda case: case.name)
def test_collectives_are_a_few_numbers_a_row(case, check_vma):
    batch = shards.batch(case, False)
    setting = shards.Setting((1, 8), "Auto", check_vma)
    losses = shards.losses_of(case, batch, setting)

    def total(logits, batch):
        moving = batch.moving | {"logits": logits}
        return losses(moving, batch.labels, batch.where).sum()

    batch = shards.placed(case, batch, setting)
    step = jax.jit(jax.value_and_grad(total)).lower(batch.moving["logits"], batch)
    module = hlo.parse(step.compile().as_text())
    collectives = module.collectives
    masked = case.mask == "classes"
    assert module.collective_kinds == {"all-reduce"}
    assert len(collectives) <= 2 + masked + (not check_vma)
    numbers = sum(size for _, size in collectives) / 4 / shards.ROWS
    forward = 6 if case.dense else 1 + 2 + (5 if case.options else 0)
    backward = 6 if case.dense else 2 + (2 if case.options else 0)
    assert numbers <= forward + masked + (0 if check_vma else backward)


@pytest.mark.parametrize("case", FULL_AND_PLAIN, ids=lambda case: case.name)
def test_rows_may_be_left_to_the_compiler(case):
    """A `shard_map` over the axis of classes alone; the rows are sharded outside."""
    batch = shards.batch(case, False)
    setting = shards.Setting((2, 4), "Auto", True)
    losses = jax.shard_map(
        functools.partial(shards.call, case, class_axis_name="classes"),
        mesh=setting.mesh,
        in_specs=tuple(shards.specs_of(case, batch, rows=None)),
        out_specs=jax.P(),
        axis_names={"classes"},
    )

    def total(moving, labels, where):
        values = losses(moving, labels, where)
        return values.sum(), values

    with jax.set_mesh(setting.mesh):
        arguments = shards.placed(case, batch, setting)
        step = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(*arguments)
        compiled = step.compile()
        (_, values), gradient = jax.device_get(compiled(*arguments))
    check_values(case, batch, values, gradient["logits"])
    assert hlo.parse(compiled.as_text()).collective_kinds == {"all-reduce"}


@pytest.mark.parametrize("check_vma", [True, False])
def test_where_gradients_may_be_taken(check_vma, rng):
    """Outside of the body always; inside only where JAX knows what varies."""
    setting = shards.Setting((2, 4), "Auto", check_vma)
    logits = np.float32(rng.standard_normal((6, 32)))
    ids = rng.integers(0, 32, 6).astype(np.int32)
    weights = np.float32([1, 2, 0, 1, 5, 1])
    full, row = jax.P("rows", "classes"), jax.P("rows")

    def mean(logits, ids, weights):
        loss = INTEGER(logits, ids, class_axis_name="classes", label_smoothing=0.1)
        return xent_jax.weighted_mean(loss, weights, batch_axis_name="rows")

    def mapped(function, out_specs):
        return jax.shard_map(
            function,
            mesh=setting.mesh,
            in_specs=(full, row, row),
            out_specs=out_specs,
            check_vma=check_vma,
        )

    outside = jax.grad(mapped(mean, jax.P()), (0, 2), allow_int=True)
    inside = mapped(jax.grad(mean, (0, 2)), (full, row))
    both = jax.jit(lambda *arguments: (outside(*arguments), inside(*arguments)))
    (by_logits, by_weights), (logits_inside, weights_inside) = both(
        logits, ids, weights
    )
    truth = oracle.softmax_cross_entropy_with_integer_labels(
        logits, ids, label_smoothing=0.1
    )
    share = weights / weights.sum()
    expected = truth.gradient * share[:, None]
    average = np.sum(truth.value * share)
    np.testing.assert_allclose(by_logits, expected, 1e-5, 1e-7)
    slope = (truth.value - average) / weights.sum()
    np.testing.assert_allclose(by_weights, slope, 1e-5, 1e-7)
    # Without the check every sum over a mesh axis that is transposed inside is one
    # over as many equal numbers as there are shards: two rows, four classes.
    factor = 1 if check_vma else 8
    np.testing.assert_allclose(logits_inside, factor * expected, 1e-5, 1e-6)
    factor = 1 if check_vma else 2
    np.testing.assert_allclose(weights_inside, factor * slope, 1e-5, 1e-6)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weighted_mean_of_unequal_shards(kind, rng):
    """One shard has no mass, one holds the NaN of a dropped row."""
    mesh = jax.make_mesh((8,), ("rows",), (getattr(jax.sharding.AxisType, kind),))
    spec = jax.P("rows")
    values = np.float32(rng.standard_normal(24))
    weights = np.float32(rng.integers(0, 3, 24))
    weights[3:6] = 0
    weights[7], values[7] = 0, np.nan

    @jax.jit
    def both(values, weights):
        mean = jax.shard_map(
            lambda v, w: xent_jax.weighted_mean(v, w, batch_axis_name="rows"),
            mesh=mesh,
            in_specs=spec,
            out_specs=jax.P(),
        )
        return jax.value_and_grad(mean, (0, 1))(values, weights)

    put = jax.NamedSharding(mesh, spec)
    for mass in (weights, 0 * weights):
        arguments = jax.device_put((values, mass), put)
        value, gradients = jax.device_get(both(*arguments))
        alone = jax.value_and_grad(xent_jax.weighted_mean, (0, 1))(values, mass)
        np.testing.assert_allclose(value, alone[0], rtol=1e-6)
        if not mass.any():
            assert value == 0
        for ours, theirs in zip(gradients, alone[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert both._cache_size() == 1


NAME = "name a mesh axis of the jax.shard_map that the call is in, got "


@pytest.mark.parametrize(
    ("kind", "axis_name", "axis", "message"),
    [
        (ValueError, "v", -1, f"class_axis_name must {NAME}'v'."),
        (ValueError, ("classes", "v"), -1, f"class_axis_name must {NAME}'v'."),
        (
            ValueError,
            (),
            -1,
            "class_axis_name must name different mesh axes, got ().",
        ),
        (
            ValueError,
            ("rows", "rows"),
            -1,
            "class_axis_name must name different mesh axes, got ('rows', 'rows').",
        ),
        (
            TypeError,
            1,
            -1,
            "class_axis_name must be the name of a mesh axis or a tuple of them, "
            "got 1.",
        ),
        (
            ValueError,
            "classes",
            (0, 1),
            "axis must be one axis where class_axis_name shards it, got (0, 1).",
        ),
    ],
)
@pytest.mark.parametrize("name", [shards.INTEGER, shards.DENSE])
def test_names_of_mesh_axes_are_checked(name, kind, axis_name, axis, message):
    loss = getattr(xent_jax, name)

    def call(logits):
        labels = logits if name == shards.DENSE else jnp.zeros(2, jnp.int32)
        return loss(logits, labels, axis, class_axis_name=axis_name)

    mapped = jax.shard_map(
        call,
        mesh=shards.SETTINGS[0].mesh,
        in_specs=jax.P(None, "classes"),
        out_specs=jax.P(),
    )
    with pytest.raises(kind) as raised:
        mapped(jnp.zeros((2, 8)))
    assert str(raised.value) == f"{name}: {message}"


@pytest.mark.parametrize(
    ("name", "count", "argument"),
    [
        (shards.INTEGER, 2, "class_axis_name"),
        ("weighted_mean", 1, "batch_axis_name"),
        ("sinkhorn_targets", 1, "batch_axis_name"),
        ("sinkhorn_cross_entropy", 2, "batch_axis_name"),
    ],
)
def test_a_name_outside_of_shard_map_is_refused(name, count, argument):
    arguments = [np.zeros((2, 3), np.float32), np.zeros(2, np.int32)]
    if name == "sinkhorn_cross_entropy":
        arguments[1] = arguments[0]
    with pytest.raises(ValueError, match="shard_map") as raised:
        getattr(xent_jax, name)(*arguments[:count], **{argument: "rows"})
    assert str(raised.value) == f"{name}: {argument} must {NAME}'rows'."
