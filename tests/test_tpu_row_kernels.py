"""The TPU kernels of a loss a row, interpreted on a CPU, against a float64 oracle.

The calls are those of users: the one thing that differs from a TPU is that the sizes of
blocks are given, for a chip that has none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import LOSS, relative_error, truth_of
from jax.experimental.pallas import tpu as pltpu
from kernels import (
    ALL,
    EACH,
    TILING,
    assert_gradients,
    assert_verify_takes,
    bfloat16_inputs,
    parts_of,
)

from xent_jax._forms import class_blocks
from xent_jax._forms.tpu import choice
from xent_jax._forms.tpu.tiling import (
    Tiling,
    tiling_of_gradients,
    tiling_of_results,
)
from xent_jax._reductions import transposed
from xent_jax._reductions.lowering import Place

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("unoptimized")]

# Rows, features and classes; tiles of 128 classes and blocks of 32 rows, of which one
# stays in vector memory, two and three take turns.
SHAPES = [
    (1, 128, 1),
    (3, 128, 2),
    (33, 256, 129),
    (64, 128, 384),
    (70, 128, 300),
]
# Every option with a shape before a change lands, four of them always.
PAIRS = [(SHAPES[i % len(SHAPES)], options) for i, options in enumerate(EACH)]
KEPT = [
    ((1, 128, 1), ()),
    ((70, 128, 300), ("label_smoothing", "class_weights")),
    ((33, 256, 129), ("bias", "where", "z_loss")),
    ((64, 128, 384), ALL),
]


@pytest.fixture
def use(monkeypatch):
    """Makes programs of the test take the kernels, and names those that do."""
    programs = []

    def with_tiling(tiling: Tiling | None) -> list[str]:
        def sizes(name: str, rows: int, features: int, classes: int, *_: Any) -> Any:
            programs.append(name)
            return tiling and tiling._replace(by_class=classes % 128 > 0)

        for name in ("results", "gradients"):
            function = functools.partial(sizes, name)
            monkeypatch.setattr(choice, f"tiling_of_{name}", function)
        return programs

    return with_tiling


def weighted_sum(moving, rest):
    """Returns the sum of the losses times numbers that differ from row to row."""
    losses = LOSS(**moving, **rest)
    return jnp.sum(losses * jnp.cos(jnp.arange(losses.size, dtype=jnp.float32)))


def value_and_gradients(inputs):
    """Returns the weighted sum and its gradients, from a program compiled anew."""
    moving, rest = parts_of(inputs)
    return jax.jit(jax.value_and_grad(lambda m: weighted_sum(m, rest)))(moving)


def assert_right(inputs, result, rtol=6e-3):
    """Asserts value and gradients, these to the digits of half-precision numbers."""
    rows = inputs["hidden"].shape[0]
    # The oracle's sum with weights is that of the weighted losses.
    weights = inputs.get("weights", 1) * np.cos(np.arange(rows, dtype=np.float64))
    truth = truth_of(inputs | {"weights": weights}, "sum")
    value, gradients = result
    np.testing.assert_allclose(float(value), truth.value, rtol=1e-5, atol=1e-4)
    gradients = {k: v for k, v in gradients.items() if k != "weights"}
    assert_gradients(inputs, gradients, truth, rtol)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *KEPT,
        *(
            pytest.param(*pair, marks=pytest.mark.exhaustive)
            for pair in PAIRS
            if pair not in KEPT
        ),
    ],
    ids=str,
)
def test_equals_the_oracle(shape, options, use, rng):
    programs = use(TILING)
    inputs = bfloat16_inputs(rng, shape, options)
    assert_right(inputs, value_and_gradients(inputs))
    assert sorted(programs) == ["gradients", "results"]


@pytest.mark.parametrize("shape", [(16, 128, 200), (70, 128, 256)], ids=str)
def test_float32_kernel(shape, use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, shape, ("bias",), "float32")
    result = value_and_gradients(inputs)
    assert_right(inputs, result)
    gradient = result[1]["kernel"]
    rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(gradient != rounded)) > 0.9


@pytest.mark.parametrize("name", ["hidden", "kernel"])
def test_one_gradient_alone(name, use, rng):
    programs = use(TILING)
    inputs = bfloat16_inputs(rng, (70, 128, 300), ("label_smoothing",))
    moving, rest = parts_of(inputs)
    rest |= {other: moving[other] for other in moving if other != name}
    moving = {name: moving[name]}
    function = jax.value_and_grad(lambda m: weighted_sum(m, rest))
    assert_right(inputs, jax.jit(function)(moving))
    assert "gradients" in programs


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((7, 128, 100), ("bias", "where")),
        ((70, 128, 300), ("label_smoothing", "class_weights", "class_mask")),
    ],
    ids=str,
)
def test_as_a_tpu_would_run_it(shape, options, use, monkeypatch, rng):
    # Memory holds NaN until it is written to, and copies are apart from computation.
    tiling = TILING._replace(interpret=pltpu.InterpretParams(detect_races=True))
    use(tiling)
    # This interpreter has effects, which what is traced in a lowering cannot have.
    place = Place("TPU", whole=True)
    for module in (class_blocks, transposed):
        monkeypatch.setattr(module, "by_place", lambda _, at, **__: at(place))
    inputs = bfloat16_inputs(rng, shape, options)
    assert_right(inputs, value_and_gradients(inputs))


@pytest.mark.usefixtures("x64")
def test_with_64_bit_types(use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (70, 128, 200), ("where", "label_smoothing"))
    assert_right(inputs, value_and_gradients(inputs))


@pytest.mark.parametrize("margin", [20.0, 80.0])
def test_confident_rows_keep_their_digits(margin, use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (40, 128, 300), margin=margin)
    moving, rest = parts_of(inputs)
    losses, pull = jax.vjp(jax.jit(lambda m: LOSS(**m, **rest)), moving)
    truth = truth_of(inputs, None)
    assert 0 < truth.value.max() < 1e-2
    np.testing.assert_allclose(losses, truth.value, rtol=1e-4)
    gradients = pull(jnp.ones_like(losses))[0]
    for name, gradient in gradients.items():
        assert relative_error(gradient, getattr(truth, name)) < 6e-3


@pytest.mark.parametrize("margin", [-5.0, 3.0, 30.0])
def test_errors_are_those_of_the_other_form(margin, use, rng, monkeypatch):
    def narrow(left: Any, right: Any, dtype: Any) -> Any:
        product = jnp.matmul(left.astype(dtype), right.astype(dtype))
        return product.astype(jnp.float32)

    # As on a TPU: on a CPU the other form multiplies slopes that are not rounded.
    monkeypatch.setattr(class_blocks, "_tangent_product", narrow)
    inputs = bfloat16_inputs(rng, (256, 128, 700), margin=margin)
    truth = truth_of(inputs, None)
    moving, rest = parts_of(inputs)

    def gradients():
        return jax.jit(jax.grad(lambda m: LOSS(**m, **rest).sum()))(moving)

    use(TILING)
    ours = gradients()
    use(None)
    others = gradients()
    for name, gradient in ours.items():
        wanted = getattr(truth, name)
        largest = 1.1 * relative_error(others[name], wanted)
        assert relative_error(gradient, wanted) <= largest


@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all options"])
def test_sharded_rows_and_classes(options, use, rng):
    programs = use(TILING)
    inputs = bfloat16_inputs(rng, (48, 128, 260), options)
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    of_rows = ("labels", "where", "weights")
    specs = {
        "hidden": jax.P("data", None),
        "kernel": jax.P(None, "model"),
        "bias": jax.P("model"),
        "class_mask": jax.P("model"),
        "class_weights": jax.P("model"),
        **{name: jax.P("data") for name in of_rows},
    }
    specs = {name: specs.get(name, jax.P()) for name in inputs}
    # The interpreter of kernels does not do the types that `check_vma` asks for.
    sharded = jax.shard_map(
        lambda arrays: LOSS(**arrays, class_axis_name="model"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=jax.P("data"),
        check_vma=False,
    )
    moving, rest = parts_of(inputs)
    weights = jnp.cos(jnp.arange(48, dtype=jnp.float32))

    def total(moving):
        return jnp.sum(sharded(moving | rest) * weights)

    assert_right(inputs, jax.jit(jax.value_and_grad(total))(moving))
    assert set(programs) == {"gradients", "results"}


def test_an_undefined_row_is_nan_alone(use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (40, 128, 200), ("label_smoothing",))
    inputs["labels"][3] = 200
    moving, rest = parts_of(inputs)
    losses, pull = jax.vjp(jax.jit(lambda m: LOSS(**m, **rest)), moving)
    others = np.arange(40) != 3
    assert (np.isfinite(np.asarray(losses)) == others).all()
    gradients = pull(jnp.asarray(others, jnp.float32))[0]
    assert np.isnan(np.asarray(gradients["kernel"], np.float32)).all()
    finite = np.isfinite(np.asarray(gradients["hidden"], np.float32)).all(axis=1)
    assert (finite == others).all()


def test_whatever_a_dropped_row_holds(use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (70, 128, 200), ("where",))
    # Whose exponential overflows relative to a logit of 0.
    inputs["bias"] = np.full(200, 100, np.float32)
    hidden = np.where(inputs["where"][:, None], inputs["hidden"], np.nan)
    result = value_and_gradients(inputs | {"hidden": hidden.astype(jnp.bfloat16)})
    assert_right(inputs, result)


def test_label_of_a_dropped_class(use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (8, 128, 200), ("class_mask",))
    inputs["labels"][2] = 199
    value, gradients = value_and_gradients(inputs)
    assert np.isinf(value)
    assert np.isfinite(np.asarray(gradients["hidden"], np.float32)).all()
    assert (np.asarray(gradients["kernel"][:, 150:], np.float32) == 0).all()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"softcap": 30.0}, set()),
        ({"temperature": 2.0}, set()),
        ({"with_statistics": True}, set()),
        ({"hidden": np.float32}, set()),
        ({"hidden": np.float16}, set()),
        ({"kernel": np.float16}, set()),
        ({"features": 120}, set()),
        ({"moving": "class_weights"}, {"results"}),
        ({"moving": "bias", "frozen": ("hidden", "kernel")}, {"results"}),
        ({"switch": "0"}, set()),
    ],
    ids=str,
)
def test_what_takes_the_other_form(change, wanted, use, rng, monkeypatch):
    programs = use(TILING)
    inputs = bfloat16_inputs(rng, (8, change.get("features", 128), 40))
    for name in ("hidden", "kernel"):
        inputs[name] = inputs[name].astype(change.get(name, inputs[name].dtype))
    for name in ("softcap", "temperature", "with_statistics"):
        if name in change:
            inputs[name] = change[name]
    if "switch" in change:
        monkeypatch.setenv("XENT_JAX_TPU_KERNELS", change["switch"])
    by = [n for n in ("hidden", "kernel") if n not in change.get("frozen", ())]
    if "moving" in change:
        inputs[change["moving"]] = np.ones(40, np.float32)
        by.append(change["moving"])
    moving = {name: inputs.pop(name) for name in by}
    function = jax.value_and_grad(
        lambda m: jax.tree.leaves(LOSS(**m, **inputs))[0].sum()
    )
    jax.jit(function).lower(moving)
    assert set(programs) == wanted


def transformed(moving, rest):
    """Returns derivatives of every kind, each as a function of no arguments."""

    def loss(moving):
        return weighted_sum(moving, rest)

    def of_direction(moving):
        return jax.jvp(jax.grad(loss), (moving,), (moving,))[1]

    def in_a_loop(moving):
        def step(carry, scale):
            scaled = jax.tree.map(lambda a: a * scale.astype(a.dtype), moving)
            return carry + jax.checkpoint(loss)(scaled), None

        return jax.lax.scan(step, 0.0, jnp.linspace(0.5, 1, 2))[0]

    several = jax.tree.map(lambda array: jnp.stack([array, array / 2]), moving)
    return {
        "vmap of grad": lambda: jax.vmap(jax.grad(loss))(several),
        "jvp": lambda: jax.jvp(loss, (moving,), (moving,)),
        "forward over reverse": lambda: of_direction(moving),
        "reverse over forward": lambda: jax.grad(
            lambda m: jax.jvp(loss, (m,), (moving,))[1]
        )(moving),
        "reverse over reverse": lambda: jax.vjp(jax.grad(loss), moving)[1](moving),
        "loop": lambda: jax.grad(in_a_loop)(moving),
        "linearize": lambda: jax.linearize(loss, moving)[1](moving),
    }


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vmap of grad", set()),
        ("jvp", {"results"}),
        ("forward over reverse", {"results"}),
        ("reverse over forward", {"results", "gradients"}),
        # Of the results that the derivative is made of, by the rule once more.
        ("reverse over reverse", {"results", "gradients"}),
        ("loop", {"results", "gradients"}),
        ("linearize", {"results"}),
    ],
)
def test_transformations(name, wanted, use, rng):
    inputs = bfloat16_inputs(rng, (33, 128, 140), ("bias", "where"))
    arguments = parts_of(inputs)
    programs = use(TILING)
    ours = jax.jit(transformed(*arguments)[name])()
    assert set(programs) <= wanted
    use(None)
    others = jax.jit(transformed(*arguments)[name])()

    def assert_near(left: Any, right: Any) -> None:
        left, right = (np.asarray(array, np.float64) for array in (left, right))
        difference = np.linalg.norm(left - right)
        assert difference <= 1e-2 * max(np.linalg.norm(right), 1e-3)

    jax.tree.map(assert_near, ours, others)


@pytest.mark.parametrize("sizes_of", [tiling_of_results, tiling_of_gradients])
@pytest.mark.parametrize("chip", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_sizes_of_tiles(chip, sizes_of):
    for rows, features, classes in [(1, 128, 1), (8519, 768, 50257), (40, 2048, 9088)]:
        for itemsize in (2, 4):
            tiling = sizes_of(rows, features, classes, chip, itemsize)
            assert tiling.rows % tiling.row_chunk == 0
            assert tiling.classes % 128 == 0
            assert tiling.memory < 128 * 2**20
            # As XLA lays such a kernel out.
            assert tiling.by_class == (classes % 128 > 0)


def test_what_would_be_slower_or_does_not_fit():
    assert tiling_of_gradients(8192, 6144, 128256, "TPU7x") is None
    assert tiling_of_results(8192, 6144, 128256, "TPU7x") is not None
    assert tiling_of_gradients(8192, 2048, 128256, "TPU v4") is None


def test_verify_runs_the_kernels_of_a_loss_a_row(use):
    """So that it checks them on a TPU, too."""
    assert_verify_takes("head, per row", use(TILING))
