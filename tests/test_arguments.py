"""What arguments may be: wide class ids, numbers at the ends of a dtype, wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened
from heads import LOSS, STATISTICS

import xent_jax

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("unoptimized")]

IDS_LOSS = xent_jax.softmax_cross_entropy_with_integer_labels
SIGMOID = xent_jax.sigmoid_binary_cross_entropy
LOGITS = np.array([[0.3, -1.0, 2.0]] * 2, np.float32)
TARGETS = np.array([[0.2, 0.3, 0.5]] * 2, np.float32)
PROBS = np.array([[0.5, 0.2, 0.3]] * 2, np.float32)
KERNEL = np.eye(3, dtype=np.float32)
KEEP = np.array([True, False])
WIDE = 2**32 + 1  # whose low 32 bits are class 1


class Wrapped:
    """As `flax.nnx.Param` is: no array, but something that JAX takes for one."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


class Tensor:
    """As a tensor of another library is: something that NumPy takes for an array."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def __array__(self, dtype=None, copy=None):
        return self.value if dtype is None else self.value.astype(dtype)


def of_torch(value):
    return pytest.importorskip("torch").tensor(value)


OF_IDS = {
    "softmax": lambda ids, logits: IDS_LOSS(logits, ids),
    "nll": lambda ids, logits: xent_jax.nll_loss(logits, ids),
    "head": lambda ids, logits: LOSS(logits, KERNEL, ids),
    "head, sum": lambda ids, logits: LOSS(logits, KERNEL, ids, reduction="sum"),
    "statistics": lambda ids, logits: STATISTICS(logits, KERNEL, ids).log_prob,
}
ONE_ID = {"NumPy": np.int64, "int": int, "0-d": np.array, "unsigned": np.uint64,
          "tensor": Tensor, "torch": of_torch}  # fmt: skip
SOME_IDS = {"array": np.array, "unsigned": lambda ids: np.array(ids, np.uint64),
            "ints": list, "tuple": tuple,
            "scalars": lambda ids: list(map(np.int64, ids)),
            "arrays": lambda ids: list(map(np.array, ids)), "tensor": Tensor,
            "mixed": lambda ids: [np.array(ids[0]), jnp.asarray(ids[1])],
            "torch": of_torch}  # fmt: skip


@pytest.mark.parametrize("form", ONE_ID)
@pytest.mark.parametrize("name", OF_IDS)
def test_an_id_beyond_32_bits_is_no_class(name, form):
    function = OF_IDS[name]
    plain = function(np.int32(1), LOGITS[0])
    np.testing.assert_array_equal(function(ONE_ID[form](1), LOGITS[0]), plain)
    for wide in (WIDE, 2**62 + 1, 2**31):
        assert np.isnan(function(ONE_ID[form](wide), LOGITS[0]))


@pytest.mark.parametrize("form", SOME_IDS)
@pytest.mark.parametrize("name", OF_IDS)
def test_ids_beyond_32_bits_are_no_classes(name, form):
    function = OF_IDS[name]
    plain = function(np.array([0, 1], np.int32), LOGITS)
    np.testing.assert_array_equal(function(SOME_IDS[form]([0, 1]), LOGITS), plain)
    loss = function(SOME_IDS[form]([WIDE, 1]), LOGITS)
    if name == "head, sum":
        assert np.isnan(loss)
    else:
        np.testing.assert_array_equal(loss, [np.nan, plain[1]])


@pytest.mark.parametrize("name", OF_IDS)
def test_negative_and_very_large_ids_are_no_classes(name):
    for ids in ([-WIDE, 2**70], [-(2**70), np.int64(2 - 2**32)]):
        assert np.isnan(OF_IDS[name](ids, LOGITS)).all()


def test_wide_ids_with_64_bit_types(x64):
    for form in SOME_IDS.values():
        loss = IDS_LOSS(LOGITS, form([WIDE, 1]))
        np.testing.assert_array_equal(np.isnan(loss), [True, False])


def test_wide_ids_on_a_mesh_of_explicit_axes():
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=kinds, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        hidden = jax.device_put(
            LOGITS, jax.sharding.NamedSharding(mesh, jax.P("rows", None))
        )
        for form in ("array", "scalars", "arrays", "tensor"):
            loss = LOSS(hidden, KERNEL, SOME_IDS[form]([WIDE, 1]))
            np.testing.assert_array_equal(np.isnan(loss), [True, False])


LARGE = np.array([2**32 + 1, 2**33])
OF_NUMBERS = {
    "targets": lambda n: xent_jax.softmax_cross_entropy(LOGITS[0, :2], n),
    "answers": lambda n: SIGMOID(LOGITS[0, :2], n),
    "pos_weight": lambda n: SIGMOID(LOGITS[:, :2], TARGETS[:, :2], pos_weight=n),
    "class_weights": lambda n: IDS_LOSS(LOGITS[:, :2], [0, 1], class_weights=n),
    "weights": lambda n: LOSS(LOGITS, KERNEL, [0, 1], weights=n),
    "mean": lambda n: xent_jax.weighted_mean(LOGITS[0, :2], n),
    "prior": lambda n: xent_jax.sinkhorn_targets(LOGITS[:, :2], prior=n),
    "z_loss": lambda n: IDS_LOSS(LOGITS[0], 0, z_loss=n[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_integers_beyond_32_bits_are_numbers_where_numbers_are_meant(name):
    function = OF_NUMBERS[name]
    np.testing.assert_array_equal(function(LARGE), function(LARGE.astype(np.float32)))


CALLS = {
    "softmax_cross_entropy": (
        {"logits": LOGITS, "labels": TARGETS, "where": KEEP},
        {"label_smoothing": 0.1, "z_loss": 0.2, "class_weights": TARGETS[0]},
    ),
    "softmax_cross_entropy_with_integer_labels": (
        {"logits": LOGITS, "labels": np.array([0, 2]), "where": KEEP},
        {"label_smoothing": 0.1, "z_loss": 0.2, "class_weights": TARGETS[0]},
    ),
    "sigmoid_binary_cross_entropy": (
        {"logits": LOGITS, "labels": TARGETS, "where": LOGITS > 0},
        {"label_smoothing": 0.1, "pos_weight": TARGETS[0]},
    ),
    "nll_loss": (
        {"log_probs": LOGITS, "labels": np.array([0, 2]), "where": KEEP},
        {"class_weights": TARGETS[0]},
    ),
    "categorical_cross_entropy": (
        {"probs": PROBS, "labels": TARGETS, "where": KEEP},
        {"epsilon": 0.3},
    ),
    "binary_cross_entropy": (
        {"probs": PROBS, "labels": TARGETS, "where": PROBS > 0.25},
        {"epsilon": 0.3},
    ),
    "linearized_softmax_cross_entropy": ({"logits": LOGITS, "labels": TARGETS}, {}),
    "linear_softmax_cross_entropy": (
        {"hidden": LOGITS, "kernel": KERNEL, "labels": np.array([0, 2]), "where": KEEP},
        {"bias": TARGETS[0], "weights": TARGETS[0, :2], "label_smoothing": 0.1,
         "class_weights": TARGETS[0], "z_loss": 0.2, "softcap": 1.5,
         "temperature": TARGETS[1, :2],
         "class_mask": np.array([True, False, True])},
    ),
    "linear_softmax_statistics": (
        {"hidden": LOGITS, "kernel": KERNEL, "labels": np.array([0, 2]), "where": KEEP},
        {"bias": TARGETS[0], "softcap": 1.5, "temperature": 0.7,
         "class_mask": np.array([True, False, True])},
    ),
    "softmax_cross_entropy_with_sparse_targets": (
        {"logits": LOGITS, "indices": np.array([[0, 1], [2, 2]]),
         "probs": TARGETS[:, :2], "where": KEEP},
        {"label_smoothing": 0.1, "class_weights": TARGETS[0], "z_loss": 0.2},
    ),
    "softmax_statistics": (
        {"logits": LOGITS, "labels": np.array([0, 2]), "where": KEEP}, {},
    ),
    "softmax_kl_divergence": (
        {"logits": LOGITS, "teacher_logits": TARGETS, "where": KEEP},
        {"temperature": 0.7},
    ),
    "linear_softmax_kl_divergence": (
        {"hidden": LOGITS, "kernel": KERNEL, "teacher_hidden": LOGITS + 1,
         "teacher_kernel": KERNEL, "where": KEEP},
        {"bias": TARGETS[0], "teacher_bias": TARGETS[1], "weights": TARGETS[0, :2],
         "softcap": 1.5, "teacher_softcap": 2.5, "temperature": 0.7,
         "class_mask": np.array([True, False, True])},
    ),
    "sinkhorn_targets": (
        {"scores": LOGITS, "where": KEEP},
        {"epsilon": 0.3, "tol": 0.01, "prior": TARGETS[0]},
    ),
    "sinkhorn_cross_entropy": (
        {"logits": LOGITS, "scores": LOGITS, "where": KEEP},
        {"temperature": 0.7, "epsilon": 0.3, "tol": 0.01, "prior": TARGETS[0]},
    ),
    "weighted_mean": ({"values": LOGITS, "weights": TARGETS, "where": LOGITS > 0}, {}),
}  # fmt: skip


def of_flax(value):
    return pytest.importorskip("flax.nnx").Param(jnp.asarray(value))


@pytest.mark.parametrize(
    "wrap",
    shortened([lambda value: Wrapped(jnp.asarray(value)), of_flax], kept=[of_flax]),
)
@pytest.mark.parametrize("name", CALLS)
def test_wrappers_of_arrays_are_arrays(name, wrap):
    """All arguments at once, and in a `jax.jit` that traces what is wrapped."""
    function, (arrays, options) = getattr(xent_jax, name), CALLS[name]
    arguments = jax.tree.map(jnp.asarray, arrays | options)
    plain = function(**arguments)

    def wrapped(arguments):
        return function(**{key: wrap(value) for key, value in arguments.items()})

    for run in (wrapped, jax.jit(wrapped)):
        for left, right in zip(
            jax.tree.leaves(run(arguments)), jax.tree.leaves(plain), strict=True
        ):
            np.testing.assert_allclose(left, right, rtol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_wrappers_of_numbers_and_numpy_arrays(name):
    """What a wrapper holds is checked and read as if it had come without one."""
    function, (arrays, options) = getattr(xent_jax, name), CALLS[name]
    arguments = arrays | options
    plain = function(**arguments)
    wrapped = function(**{key: Wrapped(value) for key, value in arguments.items()})
    jax.tree.map(np.testing.assert_array_equal, wrapped, plain)
    for key in set(options) & {"z_loss", "label_smoothing", "epsilon", "softcap"}:
        with pytest.raises(ValueError, match=f"{key} must lie in"):
            function(**arrays, **{key: Wrapped(-1.0)})


def test_wrapped_options_on_a_mesh_of_explicit_axes():
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=kinds, devices=jax.devices()[:2])
    arrays, options = CALLS["linear_softmax_cross_entropy"]
    plain = LOSS(**arrays, **options)
    with jax.set_mesh(mesh):
        spec = jax.sharding.NamedSharding(mesh, jax.P("rows", None))
        arrays = arrays | {"hidden": jax.device_put(LOGITS, spec)}
        kept = {key: Wrapped(value) for key, value in options.items()}
        moved = {key: Wrapped(jnp.asarray(value)) for key, value in options.items()}
        jitted = jax.jit(lambda arrays: LOSS(**arrays, **moved))
        for loss in (LOSS(**arrays, **kept), jitted(arrays)):
            np.testing.assert_allclose(loss, plain, rtol=1e-6)


@pytest.mark.parametrize("z_loss", [1e-46, 1e-40, 1e-30, 1e30, 1e37])
def test_z_losses_of_every_size(z_loss):
    loss = IDS_LOSS(LOGITS, [0, 1], z_loss=z_loss)
    truth = oracle.softmax_cross_entropy_with_integer_labels(
        LOGITS, np.array([0, 1]), z_loss=z_loss
    )
    np.testing.assert_allclose(loss, truth.value, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1.2e-38, 1e-30, 1e-12, 0.4, 0.49999])
def test_margins_of_every_size(epsilon):
    probs, answers = np.float32([0.0, 0.5, 0.75]), np.float32([1.0, 1.0, 0.0])
    loss = xent_jax.binary_cross_entropy(probs, answers, epsilon=epsilon)
    clipped = np.clip(probs.astype(np.float64), epsilon, 1 - epsilon)
    truth = -np.log([clipped[0], clipped[1], 1 - clipped[2]])
    np.testing.assert_allclose(loss, truth, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1e10, 1e20, 1e30, 1e38, 3.4e38])
def test_sinkhorn_at_large_epsilons(epsilon):
    scores = np.float32([[1, -2, 3], [4, 5, -np.inf], [0, 0, 1], [3, -1, 2]])
    truth = oracle.sinkhorn_targets(scores, epsilon=epsilon)
    targets = xent_jax.sinkhorn_targets(scores, epsilon=epsilon)
    np.testing.assert_allclose(targets, truth, rtol=1e-5, atol=1e-30)
    finite = np.where(np.isfinite(scores), scores, 0) * np.float32(epsilon / 8)
    truth = oracle.sinkhorn_targets(finite, epsilon=np.float32(epsilon))
    targets = xent_jax.sinkhorn_targets(finite, epsilon=epsilon)
    np.testing.assert_allclose(targets, truth, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1e-3, 1e30, 3e38])
def test_temperatures_of_every_size(temperature):
    logits = np.float32([[1, 2, 3], [3, 3, 1]])
    loss = xent_jax.sinkhorn_cross_entropy(logits, logits, temperature=temperature)
    targets = np.asarray(xent_jax.sinkhorn_targets(logits)).astype(np.float64)
    scaled = logits.astype(np.float64) / np.float64(np.float32(temperature))
    truth = oracle.softmax_cross_entropy(scaled, targets)
    expected = np.where(truth.value > np.finfo(np.float32).max, np.inf, truth.value)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "prior", [[3e38, 1e38, 3e38], [2e-38, 3e-38, 2e-38], [1e-36, 1.0, 1.0], [1, 2, 3]]
)
@pytest.mark.parametrize("convert", [list, np.float32, jnp.float32, "traced"])
def test_priors_of_every_size(prior, convert, rng):
    scores = rng.standard_normal((6, 3)).astype(np.float32)
    truth = oracle.sinkhorn_targets(scores, epsilon=0.5, prior=np.float32(prior))
    run = functools.partial(xent_jax.sinkhorn_targets, scores, epsilon=0.5)
    if convert == "traced":
        targets = jax.jit(lambda prior: run(prior=prior))(np.float32(prior))
    else:
        targets = run(prior=convert(prior))
    np.testing.assert_allclose(targets, truth, rtol=1e-5, atol=1e-37)


def test_float64_takes_what_float32_does_not(x64):
    logits, scores = LOGITS.astype(np.float64), LOGITS.astype(np.float64)
    plain = np.asarray(LOSS(logits, np.eye(3), [0, 1]))
    capped = LOSS(logits, np.eye(3), [0, 1], softcap=1e300)
    np.testing.assert_allclose(capped, plain, rtol=1e-14)
    loss = IDS_LOSS(logits, [0, 1], z_loss=1e39)
    truth = oracle.softmax_cross_entropy_with_integer_labels(
        logits, np.array([0, 1]), z_loss=1e39
    )
    np.testing.assert_allclose(loss, truth.value, rtol=1e-14)
    targets = xent_jax.sinkhorn_targets(scores, epsilon=1e300, prior=[1e-46, 1, 1e39])
    assert np.isfinite(targets).all()
    margin = xent_jax.binary_cross_entropy(np.zeros(1), np.ones(1), epsilon=1e-46)
    np.testing.assert_allclose(margin, [46 * np.log(10)], rtol=1e-14)
    for option in (1e-310, 10**400):
        with pytest.raises((ValueError, TypeError), match="softcap must"):
            LOSS(logits, np.eye(3), [0, 1], softcap=option)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (5,), (2, 1), (3, 1, 1), (1, 3, 2, 1), (4, 1, 1, 1), (4, 3, 2, 5)],
)
def test_pos_weight_broadcasts_to_the_logits(shape, rng):
    logits = rng.standard_normal((4, 3, 2, 5)).astype(np.float32)
    answers = rng.uniform(size=logits.shape).astype(np.float32)
    weight = rng.uniform(0.5, 2, shape).astype(np.float32)
    whole = np.broadcast_to(weight, logits.shape)
    truth = oracle.sigmoid_binary_cross_entropy(logits, answers, pos_weight=whole)
    run = functools.partial(SIGMOID, logits, answers)
    np.testing.assert_allclose(run(pos_weight=weight), truth.value, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda w: run(pos_weight=w).sum()))(weight)
    share = answers * np.log1p(np.exp(-logits.astype(np.float64)))
    missing = tuple(range(logits.ndim - weight.ndim))
    kept = np.expand_dims(weight, missing).shape
    axes = tuple(axis for axis, size in enumerate(kept) if size == 1)
    expected = share.sum(axis=axes, keepdims=True).reshape(shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


NAMED = {
    "softmax_cross_entropy": "class_axis_name",
    "softmax_cross_entropy_with_integer_labels": "class_axis_name",
    "softmax_cross_entropy_with_sparse_targets": "class_axis_name",
    "softmax_statistics": "class_axis_name",
    "softmax_kl_divergence": "class_axis_name",
    "linear_softmax_statistics": "class_axis_name",
    "linear_softmax_kl_divergence": "class_axis_name",
    "linear_softmax_cross_entropy": "batch_axis_name",
    "sinkhorn_targets": "batch_axis_name",
    "weighted_mean": "batch_axis_name",
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_an_axis_of_a_vmap_is_no_axis_of_the_mesh(name, inside):
    """Not within a `jax.shard_map` either, where the mesh has other axes."""
    arrays = {key: value for key, value in CALLS[name][0].items() if key != "where"}
    arrays = {key: jnp.stack([value, value]) for key, value in arrays.items()}
    option = {NAMED[name]: "examples"}
    if name == "linear_softmax_cross_entropy":
        option["reduction"] = "mean"

    def function(arrays):
        return getattr(xent_jax, name)(**arrays, **option)

    run = jax.vmap(function, axis_name="examples")
    if inside:
        mesh = jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])
        spec = jax.P()
        run = jax.shard_map(run, mesh=mesh, in_specs=(spec,), out_specs=spec)
    message = (
        f"{name}: {NAMED[name]} must name a mesh axis of the jax.shard_map that the "
        "call is in, got 'examples'."
    )
    with pytest.raises(ValueError, match="must name a mesh axis") as raised:
        run(arrays)
    assert str(raised.value) == message
