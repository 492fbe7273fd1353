"""Every loss under every transformation, against float64 that does not use JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import losses
import numpy as np
import oracle
import pytest
import registry
from differences import differences
from grids import shortened
from losses import CASES, EACH, SIZES, LossCase
from registry import Case

import xent_jax

every_loss = pytest.mark.parametrize("case", EACH)


def value_of(truth):
    return truth.value if isinstance(truth, oracle.Loss) else truth


def true_gradient(case: LossCase, inputs, labels):
    truth = case.truth(inputs, labels)
    if isinstance(truth, oracle.Loss):
        return truth.gradient
    return differences(lambda x: value_of(case.truth(x, labels)).sum(), inputs)


@pytest.fixture
def setting(case: LossCase, rng):
    inputs, labels = case.inputs(rng)
    inputs = inputs.astype(np.float32)
    labels = labels if case.kind == "ids" else labels.astype(np.float32)
    return inputs, labels


@every_loss
@pytest.mark.parametrize(
    "form",
    shortened(["eager", "jit", "vmap", "jit of vmap", "scan"], kept=["eager", "scan"]),
)
def test_value(case, form, setting):
    inputs, labels = setting
    forms = {
        "eager": case,
        "jit": jax.jit(case),
        "vmap": jax.vmap(case),
        "jit of vmap": jax.jit(jax.vmap(case)),
        "scan": lambda x, y: jax.lax.scan(lambda c, xy: (c, case(*xy)), 0, (x, y))[1],
    }
    computed = forms[form](jnp.asarray(inputs), jnp.asarray(labels))
    assert computed.dtype == jnp.float32
    truth = value_of(case.truth(inputs, labels))
    np.testing.assert_allclose(computed, truth, rtol=2e-6, atol=1e-7)


@every_loss
@pytest.mark.parametrize(
    "mode",
    shortened(
        [
            "grad",
            "jit of grad",
            "vmap of grad",
            "grad of vmap",
            "jacrev",
            "jacfwd",
            "jvp",
            "linearize",
            "checkpoint",
            "inside scan",
            "of scan",
        ],
        kept=["jit of grad", "vmap of grad", "jvp"],
    ),
)
def test_gradient(case, mode, setting):
    inputs, labels = jnp.asarray(setting[0]), jnp.asarray(setting[1])

    def total(x, y):
        return case(x, y).sum()

    def columns(jacobian):
        return jacobian(lambda x: total(x, labels))(inputs)

    def scanned(x):
        return jax.lax.scan(lambda c, xy: (c + total(*xy), None), 0.0, (x, labels))[0]

    def by_basis(linear):
        basis = jnp.eye(inputs.size).reshape(-1, *inputs.shape)
        return jnp.stack([linear(b) for b in basis]).reshape(inputs.shape)

    grad = jax.grad(total)
    forms = {
        "grad": lambda: grad(inputs, labels),
        "jit of grad": lambda: jax.jit(grad)(inputs, labels),
        "vmap of grad": lambda: jax.vmap(grad)(inputs, labels),
        "grad of vmap": lambda: jax.grad(lambda x: jax.vmap(case)(x, labels).sum())(
            inputs
        ),
        "jacrev": lambda: columns(jax.jacrev),
        "jacfwd": lambda: columns(jax.jacfwd),
        "jvp": lambda: by_basis(
            lambda d: jax.jvp(lambda x: total(x, labels), (inputs,), (d,))[1]
        ),
        "linearize": lambda: by_basis(
            jax.linearize(lambda x: total(x, labels), inputs)[1]
        ),
        "checkpoint": lambda: jax.grad(jax.checkpoint(total))(inputs, labels),
        "inside scan": lambda: jax.lax.scan(
            lambda c, xy: (c, grad(*xy)), 0, (inputs, labels)
        )[1],
        "of scan": lambda: jax.grad(scanned)(inputs),
    }
    computed = forms[mode]()
    assert computed.dtype == inputs.dtype
    truth = true_gradient(case, *setting)
    np.testing.assert_allclose(computed, truth, rtol=2e-5, atol=2e-6)


@every_loss
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize(
    "inner", shortened([jax.jacfwd, jax.jacrev], kept=[jax.jacrev])
)
def test_second_order(case, outer, inner, setting):
    inputs, labels = setting[0][:2], setting[1][:2]
    hessian = jax.jit(outer(inner(lambda x: case(x, jnp.asarray(labels)).sum())))
    truth = differences(lambda x: true_gradient(case, x, labels), inputs)
    np.testing.assert_allclose(
        hessian(jnp.asarray(inputs)), truth, rtol=1e-4, atol=3e-5
    )


@every_loss
def test_third_order(case, setting):
    inputs, labels = setting[0][:1], jnp.asarray(setting[1][:1])
    direction = np.linspace(-1, 1, inputs.size).reshape(inputs.shape)
    tangent = jnp.asarray(direction, jnp.float32)

    def along(function):
        return lambda x: jax.jvp(function, (x,), (tangent,))[1]

    loss = along(along(along(lambda x: case(x, labels).sum())))(jnp.asarray(inputs))
    step = 3e-3
    value = [
        value_of(
            case.truth(
                inputs.astype(np.float64) + k * step * direction,
                setting[1][:1],
            )
        ).sum()
        for k in (-3, -2, -1, 1, 2, 3)
    ]
    weights = np.array([1, -8, 13, -13, 8, -1]) / 8
    truth = weights @ value / step**3
    np.testing.assert_allclose(loss, truth, rtol=1e-3, atol=2e-4)


@every_loss
@pytest.mark.parametrize("check_vma", shortened([True, False], kept=[True]))
def test_rows_sharded_in_shard_map(case, check_vma, rng):
    inputs, labels = case.inputs(rng, rows=8)
    inputs = jnp.asarray(inputs, jnp.float32)
    labels = jnp.asarray(labels, None if case.kind == "ids" else jnp.float32)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
    spec = jax.P("data")
    sharded = jax.shard_map(
        case,
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=check_vma,
    )
    results = [jax.jit(f)(inputs, labels) for f in (sharded, case)]
    chex.assert_trees_all_close(*results, rtol=1e-6)
    gradients = [
        jax.jit(jax.grad(lambda x, f=f: f(x, labels).sum()))(inputs)
        for f in (sharded, case)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        (row.key, by)
        for row in losses.ROWS
        for by in Case(row, row.unmasked()).moving[1:]
    ],
)
@pytest.mark.parametrize("mode", shortened([jax.jacfwd, jax.jacrev], kept=[jax.jacrev]))
def test_gradient_by_the_other_arguments(name, by, mode, rng):
    """With zeros and ones among them: one-hot rows are what is used most."""
    row = registry.FUNCTIONS[name]
    case = Case(row, row.unmasked())
    hard = case.draw(rng, extreme=True)
    (first, inputs), *_ = case.draw(rng).items()
    arrays = registry.narrow(hard | {first: inputs})

    def truth(value):
        return value_of(case.truth(arrays | {by: value}))

    jacobian = jax.jit(mode(lambda value: case(arrays | {by: value})))
    expected = differences(truth, arrays[by])
    np.testing.assert_allclose(
        jacobian(jnp.asarray(arrays[by])), expected, rtol=1e-5, atol=2e-6
    )


def mixed_case(name, masked, rng):
    """A loss and its oracle, by all floating arguments, with zeros among these."""
    row = registry.FUNCTIONS[name]
    case = Case(row, (*row.unmasked(), *(("where_classes",) if masked else ())))
    arrays = case.draw(rng, registry.Sizes((2,), 3))
    dense = arrays["labels"].ndim == 2
    arrays["labels"] = np.array([[1, 0, 0], [0, 0.5, 0.5]] if dense else [0, 1])
    for word, axes in case.axes.items():
        if axes == "v":
            arrays[word][0] = 0
    if masked:
        arrays["where"] = np.array([[True, True, False], [True] * 3])
    moving, rest = registry.parted(case.moving, arrays)

    def call(function, *values):
        return function(rest | dict(zip(moving, values, strict=True)))

    return (
        tuple(moving.values()),
        functools.partial(call, case),
        lambda *values: call(case.truth, *values).value,
    )


@pytest.mark.parametrize("masked", shortened([False, True], kept=[True]))
@pytest.mark.parametrize(
    "name",
    shortened([registry.IDS, registry.DENSE, registry.SIGMOID], kept=[registry.IDS]),
)
def test_every_second_derivative_of_a_function_of_the_loss(name, masked, rng, x64):
    """Zeros among targets and weights, and the square that a chain rule brings in."""
    point, loss, truth = mixed_case(name, masked, rng)
    sizes = np.cumsum([np.size(p) for p in point])[:-1]

    def unpack(flat):
        pieces = np.split(np.arange(flat.size), sizes)
        parts = zip(pieces, point, strict=True)
        return [flat[piece].reshape(np.shape(p)) for piece, p in parts]

    flat = np.concatenate([np.ravel(p) for p in point])

    def gradient(flat):
        return differences(lambda v: (truth(*unpack(v)) ** 2).sum(), flat, 1e-3)

    expected = differences(gradient, flat, 1e-3)
    total = jax.jit(lambda v: (loss(*unpack(v)) ** 2).sum())
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            hessian = jax.jit(outer(inner(total)))(jnp.asarray(flat))
            np.testing.assert_allclose(hessian, expected, rtol=1e-5, atol=1e-5)


def test_confident_rows_keep_their_hessian():
    # optax, torch and TF return 0: p_y rounds to 1.
    loss = functools.partial(
        xent_jax.softmax_cross_entropy_with_integer_labels, labels=jnp.array(1)
    )
    row = np.array([0.0, 25.0, 1.0])
    rivals = np.exp(row[[0, 2]] - 25)
    top = rivals.sum() / (1 + rivals.sum()) ** 2
    for outer in (jax.jacfwd, jax.jacrev):
        hessian = outer(jax.grad(loss))(jnp.asarray(row, jnp.float32))
        np.testing.assert_allclose(hessian[1, 1], top, rtol=1e-6)


def test_linearized_gradient_is_constant(rng):
    logits = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    labels = jnp.asarray(rng.dirichlet(np.ones(4), 3), jnp.float32)
    surrogate = xent_jax.linearized_softmax_cross_entropy

    def total(x, y):
        return surrogate(x, y).sum()

    truth = oracle.linearized_softmax_cross_entropy(logits, labels)
    np.testing.assert_allclose(surrogate(logits, labels), truth.value, atol=1e-6)
    gradient = jax.jit(jax.grad(total))(logits, labels)
    np.testing.assert_allclose(gradient, truth.gradient, atol=1e-6)
    forward = jax.jvp(lambda x: surrogate(x, labels), (logits,), (logits,))[1]
    np.testing.assert_allclose(forward, truth.value, atol=1e-5)
    assert not np.any(jax.hessian(total)(logits, labels))
    assert not np.any(jax.grad(total, argnums=1)(logits, labels))


@pytest.mark.parametrize(
    "dtype", shortened(["float32", "bfloat16", "float16"], kept=["bfloat16"])
)
@every_loss
def test_dtypes(case, dtype, rng):
    inputs, labels = case.inputs(rng)
    inputs = jnp.asarray(inputs, dtype)
    labels = labels if case.kind == "ids" else labels.astype(np.float32)
    value, gradient = jax.value_and_grad(lambda x: case(x, labels).sum())(inputs)
    assert value.dtype == jnp.float32
    assert gradient.dtype == inputs.dtype
    exact = np.asarray(inputs).astype(np.float64)
    truth = value_of(case.truth(exact, labels)).sum()
    np.testing.assert_allclose(value, truth, rtol=2e-6)
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(gradient).astype(np.float64),
        true_gradient(case, exact, labels),
        rtol=rounding,
        atol=4e-6,
    )


@every_loss
def test_float64(case, rng, x64):
    inputs, labels = case.inputs(rng)
    value, gradient = jax.value_and_grad(lambda x: case(x, labels).sum())(
        jnp.asarray(inputs)
    )
    assert value.dtype == gradient.dtype == jnp.float64
    np.testing.assert_allclose(
        value, value_of(case.truth(inputs, labels)).sum(), rtol=1e-14
    )
    np.testing.assert_allclose(
        gradient, true_gradient(case, inputs, labels), rtol=1e-9, atol=1e-9
    )


@every_loss
def test_float32_stays_float32_with_x64_enabled(case, rng, x64):
    inputs, labels = case.inputs(rng)
    value = case(jnp.asarray(inputs, jnp.float32), labels)
    assert value.dtype == jnp.float32
    lists = case(inputs.tolist(), labels.tolist())
    np.testing.assert_allclose(value, lists, rtol=1e-5)


@every_loss
def test_compiles_once_a_shape(case, setting):
    inputs, labels = jnp.asarray(setting[0]), jnp.asarray(setting[1])
    chex.clear_trace_counter()
    loss = jax.jit(jax.value_and_grad(chex.assert_max_traces(_total(case), n=1)))
    for shift in (0.0, 0.001, 0.002):
        loss(inputs + shift, labels)


def _total(case):
    def total(x, y):
        return case(x, y).sum()

    return total


@pytest.mark.parametrize("name", [case.name for case in CASES if "-" not in case.name])
def test_reverse_mode_keeps_the_inputs_and_a_few_numbers_a_row(name, rng):
    """What a loss keeps decides whether a model fits: one array of the logits' size."""
    case = next(case for case in CASES if case.name == name)
    inputs, labels = case.inputs(rng, rows=64, classes=128)
    inputs = jnp.asarray(inputs, jnp.bfloat16)
    labels = jnp.asarray(labels, None if case.kind == "ids" else jnp.float32)
    pullback = jax.vjp(lambda x: case(x, labels), inputs)[1]
    kept = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)]
    large = sorted(str(leaf.dtype) for leaf in kept if leaf.size >= inputs.size)
    # Losses of log-probabilities and probabilities keep what they multiply with.
    most = {"nll_loss": 2, "categorical_cross_entropy": 5, "binary_cross_entropy": 6}
    if name in most:
        assert len(large) <= most[name]
    else:
        of_labels = case.kind not in ("ids", "sparse")
        assert large == ["bfloat16", *(["float32"] if of_labels else [])]
    small = [leaf for leaf in kept if leaf.size < inputs.size]
    numbers = 10 + (5 * SIZES.ids if case.kind == "sparse" else 0)
    assert sum(leaf.size for leaf in small) <= numbers * inputs.shape[0]
