"""The pieces of the numerics layer, and what XLA must not do to them."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened

import xent_jax
from xent_jax._losses import sigmoid
from xent_jax._reductions import classes as reductions
from xent_jax._reductions import precision
from xent_jax._targets.block import class_ids


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_two_sum_survives_the_compiler(transform, rng):
    left = rng.standard_normal(10_000).astype(np.float32) * 100
    right = rng.standard_normal(10_000).astype(np.float32)
    total, error = transform(precision.two_sum)(left, right)
    exact = left.astype(np.float64) + right.astype(np.float64)
    got = np.asarray(total, np.float64) + np.asarray(error, np.float64)
    np.testing.assert_array_equal(got, exact)
    assert np.any(error)


def test_two_sum_of_infinities_has_no_error():
    total, error = precision.two_sum(jnp.array([jnp.inf, 3e38]), jnp.array([1.0, 3e38]))
    assert np.isposinf(total).all()
    assert not np.any(error)


@pytest.mark.parametrize("classes", [1, 15, 255, 256, 257, 1000, 1791, 1793, 4099])
@pytest.mark.parametrize("axis", [-1, -2])
def test_reductions_equal_numpy(classes, axis, rng):
    values = rng.standard_normal((4, classes)).astype(np.float32)
    offsets = rng.standard_normal((4, 1)).astype(np.float32)
    if axis == -2:
        values, offsets = values.T, offsets.T
    total = jax.jit(
        lambda x, o: reductions.sum_classes(lambda x, o: jnp.exp(x + o), (x, o), axis)
    )(values, offsets)
    largest = reductions.max_classes(operator.add, (values, offsets), axis)
    exact = np.exp(values.astype(np.float64) + offsets)
    np.testing.assert_allclose(total, exact.sum(axis, keepdims=True), rtol=4e-7)
    np.testing.assert_array_equal(largest, (values + offsets).max(axis, keepdims=True))


def test_sums_in_slices_propagate_nan():
    values = jnp.zeros((2, 4096)).at[0, 1234].set(jnp.nan)
    for reduction in (reductions.SUM, reductions.SPLIT_SUM):
        total = jax.jit(
            lambda x, by=reduction: reductions.reduce_classes(by, lambda x: x, (x,), -1)
        )(values)
        np.testing.assert_array_equal(np.isnan(total), [[True], [False]])


@pytest.mark.parametrize("classes", [300, 4096])
def test_a_nan_makes_a_wide_row_undefined(classes):
    """Also where XLA:CPU's maximum of an array passes over it."""
    logits = jnp.zeros((3, classes)).at[0, 7].set(jnp.nan).at[1, -1].set(jnp.nan)
    dense = jnp.full((3, classes), 1 / classes)
    for loss, target in (
        (xent_jax.softmax_cross_entropy_with_integer_labels, jnp.array([7, 7, 7])),
        (xent_jax.softmax_cross_entropy, dense),
    ):
        np.testing.assert_array_equal(
            np.isnan(jax.jit(loss)(logits, target)), [True, True, False]
        )


@pytest.mark.once
@pytest.mark.parametrize("classes", shortened([2000, 4099, 50257], kept=[2000, 4099]))
@pytest.mark.parametrize("axis", [-1, -2])
def test_groups_of_slices_equal_numpy(classes, axis, rng, monkeypatch):
    """As many groups as there may be, and terms of which two are summed at a time."""
    monkeypatch.setattr(reductions, "_MOST_BYTES_OF_RESULT", 1)
    values = rng.standard_normal((4, classes)).astype(np.float32)
    weights = rng.random((1, classes)).astype(np.float32)
    if axis == -2:
        values, weights = values.T, weights.T
    groups = reductions._slices_of_operands([jnp.asarray(values)], axis)
    assert len(groups) == min(8, classes // (14 * 128))

    def terms(values, weights, exp=jnp.exp):
        powers = exp(values)
        return {"exp": powers, "product": powers * weights, "square": values * values}

    exact = terms(values.astype(np.float64), weights.astype(np.float64), np.exp)
    for reduction in (reductions.SUM, reductions.SPLIT_SUM):
        totals = jax.jit(
            lambda *operands, by=reduction: reductions.reduce_classes(
                by, terms, operands, axis
            )
        )(values, weights)
        for name, total in totals.items():
            truth = exact[name].sum(axis, keepdims=True)
            np.testing.assert_allclose(total, truth, rtol=4e-7)
    largest = reductions.max_classes(operator.mul, (values, weights), axis)
    np.testing.assert_array_equal(largest, (values * weights).max(axis, keepdims=True))


def test_groups_round_the_largest_a_few_times(rng, monkeypatch):
    monkeypatch.setattr(reductions, "_MOST_BYTES_OF_RESULT", 1)
    values = rng.uniform(0, 1e-6, (200, 50257)).astype(np.float32)
    values[:, 0] = 1
    exact = values.astype(np.float64).sum(-1, keepdims=True)
    total = reductions.reduce_classes(
        reductions.SPLIT_SUM, lambda x: x, (jnp.asarray(values),), -1
    )
    # Beside the five of one group, one for each of the three levels of a tree of eight.
    assert np.abs(np.asarray(total) - exact).max() <= 8 * 2.0**-24 * 1.01


@pytest.mark.parametrize("classes", [100, 1000, 4096, 50257])
def test_split_sum_rounds_the_largest_a_few_times(classes, rng):
    """A one and many small numbers: a plain sum rounds at every addition."""
    values = rng.uniform(0, 1e-6, (200, classes)).astype(np.float32)
    values[:, 0] = 1
    exact = values.astype(np.float64).sum(-1, keepdims=True)
    total = reductions.reduce_classes(
        reductions.SPLIT_SUM, lambda x: x, (jnp.asarray(values),), -1
    )
    # Half an ulp for the result, and for each of the four levels of a tree of slices.
    assert np.abs(np.asarray(total) - exact).max() <= 5 * 2.0**-24 * 1.01


def test_reduction_in_slices_is_not_a_copy():
    """The masked exponentials of a wide row exist only inside a fusion."""

    def total(x, y):
        return reductions.sum_classes(
            lambda x, i, y: jnp.where(i == y, 0, jnp.exp(x)),
            (x, class_ids(x, -1, 0), y),
            -1,
        )

    shapes = [
        jax.ShapeDtypeStruct((256, 32768), jnp.float32),
        jax.ShapeDtypeStruct((256, 1), jnp.int32),
    ]
    memory = jax.jit(total).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 256 * 32768 * 4 / 8 + 2**20


ids_loss, dense_loss = (
    xent_jax.softmax_cross_entropy_with_integer_labels,
    xent_jax.softmax_cross_entropy,
)
WIDE = {
    "ids": lambda x, y, t: ids_loss(x, y),
    "class mask": lambda x, y, t: ids_loss(x, y, where=t > 0),
    "smoothing": lambda x, y, t: ids_loss(x, y, label_smoothing=0.1),
    "class weights": lambda x, y, t: ids_loss(x, y, class_weights=t[0]),
    "all": lambda x, y, t: ids_loss(
        x, y, where=t > 0, label_smoothing=0.1, class_weights=t[0], z_loss=1e-4
    ),
    "other axis": lambda x, y, t: ids_loss(x.reshape(8192, 256), y, axis=0),
    "dense": lambda x, y, t: dense_loss(x, t),
}


def memory_of_gradient(name, donated=()):
    rows, classes = 256, 8192
    operands = (
        jax.ShapeDtypeStruct((rows, classes), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, classes), jnp.float32),
    )

    def mean(*operands):
        return WIDE[name](*operands).mean()

    step = jax.jit(jax.value_and_grad(mean), donate_argnums=donated)
    return step.lower(*operands).compile().memory_analysis(), 4 * rows * classes


@pytest.mark.parametrize("name", WIDE)
def test_a_wide_loss_on_cpu_holds_a_fraction_of_the_logits(name):
    memory, logits = memory_of_gradient(name)
    assert memory.temp_size_in_bytes <= logits / 4


@pytest.mark.parametrize("name", ["ids", "class weights", "dense"])
def test_a_donated_gradient_on_cpu_takes_the_logits_memory(name):
    """Every sum of logits that the loss needs comes before the gradient."""
    memory, logits = memory_of_gradient(name, donated=(0,))
    assert memory.alias_size_in_bytes == logits
    assert memory.temp_size_in_bytes <= logits / 4


@pytest.mark.once
@pytest.mark.parametrize(("rows", "arrays"), [(512, 2), (16384, 0)])
def test_sigmoid_on_cpu_holds_two_arrays_or_none(rows, arrays):
    """Exponentials and losses, which both have two users; of many numbers neither."""
    operand = jax.ShapeDtypeStruct((rows, 1000), jnp.float32)
    step = jax.jit(
        jax.value_and_grad(
            lambda x, t: xent_jax.sigmoid_binary_cross_entropy(x, t).mean()
        )
    )
    memory = step.lower(operand, operand).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= arrays * 4 * rows * 1000 + 2**16


@pytest.mark.parametrize("options", [{}, {"pos_weight": 3.0, "label_smoothing": 0.1}])
def test_sigmoid_of_many_numbers_equals_the_oracle(options, rng, monkeypatch):
    monkeypatch.setattr(sigmoid, "_MOST_WRITTEN", 0)
    logits = (10 * rng.standard_normal((64, 100))).astype(np.float32)
    labels = rng.random((64, 100)).astype(np.float32)
    logits[0, :6] = np.inf, -np.inf, np.inf, -np.inf, np.nan, 0
    labels[0, :4] = 1, 0, 0.5, 0.5
    labels[1:20] = rng.integers(0, 2, (19, 100))

    def loss(logits):
        return xent_jax.sigmoid_binary_cross_entropy(logits, labels, **options)

    @jax.jit
    def both(logits):
        losses, pull = jax.vjp(loss, logits)
        return losses, pull(jnp.ones_like(losses))[0]

    truth = oracle.sigmoid_binary_cross_entropy(logits, labels, **options)
    losses, slopes = both(logits)
    # 1 less a label that is smoothed to 0.95 is off by 1e-6.
    rounding = 2e-6 if options else 5e-7
    np.testing.assert_allclose(jax.jit(loss)(logits), truth.value, rtol=rounding)
    np.testing.assert_allclose(losses, truth.value, rtol=rounding)
    np.testing.assert_allclose(slopes, truth.gradient, rtol=rounding, atol=5e-7)
    point = jnp.array([0.5, -2.0, 0.0])
    second = jax.hessian(
        lambda x: xent_jax.sigmoid_binary_cross_entropy(x, jnp.ones(3)).sum()
    )(point)
    share = jax.nn.sigmoid(point)
    np.testing.assert_allclose(jnp.diag(second), share * (1 - share), rtol=1e-6)


# Eagerly it is XLA's own.
@pytest.mark.parametrize(
    ("transform", "most"), [(lambda f: f, 2.5), (jax.jit, 2)], ids=["eager", "jit"]
)
def test_log1p_of_a_share(transform, most):
    steps = np.linspace(0, 1, 100_001, dtype=np.float32)
    shares = np.concatenate([steps, np.exp2(-np.linspace(0, 120, 10_001)), [np.nan]])
    shares = shares.astype(np.float32)
    found = transform(precision.log1p_of_share)(shares)
    truth = np.log1p(shares.astype(np.float64))
    assert oracle.ulp_error(found, truth, "float32").max() <= most


def test_slices_are_chosen_by_the_number_of_devices():
    """Of one program, compiled for one device and for the shards of several."""

    def total(x):
        return reductions.sum_classes(jnp.exp, (x,), -1)

    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("rows"))
    whole = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
    sharded = jax.ShapeDtypeStruct((64, 4096), jnp.float32, sharding=rows)
    manual = jax.shard_map(total, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec)
    for function, operand, in_slices in (
        (total, whole, True),
        (total, sharded, False),
        (manual, sharded, True),
    ):
        text = jax.jit(function).lower(operand).compile().as_text()
        assert ("slice(" in text) == in_slices
        assert "conditional" not in text


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_classes_sharded_under_jit_need_all_reduces_only(kind):
    """Slices of the class axis would be gathered."""
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(axis,))
    with jax.set_mesh(mesh):
        logits = jax.device_put(
            jnp.linspace(-3, 3, 4 * 8192).reshape(4, 8192), jax.P(None, "classes")
        )
        ids = jnp.array([0, 1500, 5000, 8191])

        def mean(x, y):
            return xent_jax.softmax_cross_entropy_with_integer_labels(x, y).mean()

        compiled = jax.jit(jax.value_and_grad(mean)).lower(logits, ids).compile()
        value, gradient = compiled(logits, ids)
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    assert "all-reduce" in text
    alone = jax.value_and_grad(mean)(np.asarray(logits), np.asarray(ids))
    np.testing.assert_allclose(value, alone[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, alone[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lead", [20.0, 36.0, 36.5, 37.0, 37.43, 38.0, 60.0])
@pytest.mark.parametrize("target", [0.5, 0.25, 0.1, 1.0, 0.0])
def test_gradients_of_dense_targets_beside_a_confident_class(target, lead, x64):
    """In float64 to an ulp; 37.43 is where 1 + r and t − r both round."""
    targets = np.array([target, 1 - target])

    def loss(logits):
        return xent_jax.softmax_cross_entropy(logits, targets)

    odds = np.longdouble(np.exp(np.longdouble(-lead)))
    rival = odds / (1 + odds)
    truth = np.array([targets[1] - rival, rival - targets[1]], np.longdouble)
    gradient = np.asarray(jax.grad(loss)(np.array([lead, 0.0])))
    error = np.abs(gradient.astype(np.longdouble) - truth)
    ulps = error / np.spacing(np.abs(truth).astype(np.float64))
    assert np.all(ulps <= (0.6 if 0 < target < 1 else 2))
