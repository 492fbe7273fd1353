"""The TPU kernels of the head, interpreted on a CPU, against a float64 oracle.

The calls are those of users: the one thing that differs from a TPU is that the sizes of
blocks are given, for a chip that has none.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import shortened
from heads import LOSS, parted, relative_error, truth_of
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

from xent_jax._forms import row_blocks
from xent_jax._forms.tpu import choice, total
from xent_jax._forms.tpu.tiling import Tiling, tiling_of_sum

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("unoptimized")]
LARGE = pytest.mark.exhaustive

# Rows, features and classes; tiles of 128 classes and blocks of 32 rows.
SHAPES = [
    (1, 128, 1),
    (3, 128, 2),
    (16, 256, 128),
    (40, 128, 129),
    (33, 256, 384),
    (64, 128, 700),
]
# Every option with a shape, and every shape with two options; those of several options
# and none by default.
PAIRS = [
    pytest.param(
        SHAPES[i % len(SHAPES)], options, marks=LARGE if len(options) == 1 else ()
    )
    for i, options in enumerate(EACH)
]


@pytest.fixture
def use(monkeypatch):
    """Makes programs of the test take the kernels, and counts those that do."""
    programs = []

    def with_tiling(tiling: Tiling | None) -> list[Any]:
        def sizes(*arguments: Any) -> Tiling | None:
            programs.append(arguments)
            return tiling

        monkeypatch.setattr(choice, "tiling_of_sum", sizes)
        return programs

    return with_tiling


def value_and_gradients(inputs, reduction="mean"):
    """Returns the loss and its gradients, from a program that is compiled anew."""
    moving, rest = parts_of(inputs)
    function = jax.value_and_grad(lambda m: LOSS(**m, **rest, reduction=reduction))
    return jax.jit(function)(moving)


def assert_right(inputs, result, reduction="mean", rtol=6e-3):
    """Asserts value and gradients, these to the digits of half-precision numbers."""
    (value, gradients), truth = result, truth_of(inputs, reduction)
    np.testing.assert_allclose(float(value), truth.value, rtol=2e-6, atol=1e-6)
    assert_gradients(inputs, gradients, truth, rtol)


@pytest.mark.parametrize(("shape", "options"), PAIRS, ids=str)
def test_equals_the_oracle(shape, options, use, rng):
    programs = use(TILING)
    inputs = bfloat16_inputs(rng, shape, options)
    assert_right(inputs, value_and_gradients(inputs))
    assert len(programs) == 1


@pytest.mark.parametrize(
    "shape", [(16, 128, 200), pytest.param((70, 128, 300), marks=LARGE)], ids=str
)
def test_gradient_of_a_float32_kernel_is_not_rounded(shape, use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, shape, ("bias",), "float32")
    result = value_and_gradients(inputs, "sum")
    assert_right(inputs, result, "sum")
    gradient = result[1]["kernel"]
    rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(gradient != rounded)) > 0.9


@pytest.mark.parametrize(
    ("rows", "kernel"),
    shortened(
        itertools.product([128, 160], ["bfloat16", "float32"]),
        kept=[(128, "float32"), (160, "bfloat16")],
    ),
)
def test_block_with_as_many_rows_as_features_or_more(rows, kernel, use, rng):
    # Then the kernel's gradient does not leave over what is kept.
    use(TILING._replace(rows=rows, row_chunk=rows // 2))
    inputs = bfloat16_inputs(rng, (300, 128, 300), (), kernel)
    assert_right(inputs, value_and_gradients(inputs))


def test_more_tiles_than_lanes(use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (5, 128, 128 * 130 + 3), ("label_smoothing",))
    assert_right(inputs, value_and_gradients(inputs))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((7, 128, 100), ("bias", "where")),
        ((70, 128, 300), ("label_smoothing", "class_weights", "class_mask")),
    ],
    ids=str,
)
def test_as_a_tpu_would_run_it(shape, options, monkeypatch, rng):
    # Memory holds NaN until it is written to, and copies are apart from computation.
    tiling = TILING._replace(interpret=pltpu.InterpretParams())
    # This interpreter has effects, which what is traced in a lowering cannot have.
    kernels = functools.partial(total.value_and_gradients, tiling)
    monkeypatch.setattr(row_blocks, "_by_place", kernels)
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
    value, gradients = value_and_gradients(inputs)
    truth = truth_of(inputs, "mean")
    assert 0 < truth.value < 1e-3
    np.testing.assert_allclose(float(value), truth.value, rtol=1e-4)
    for name, gradient in gradients.items():
        assert relative_error(gradient, getattr(truth, name)) < 6e-3


@pytest.mark.parametrize("margin", shortened([-5.0, 3.0, 30.0], kept=[3.0]))
def test_errors_are_those_of_the_other_form(margin, use, rng):
    inputs = bfloat16_inputs(rng, (256, 128, 700), margin=margin)
    truth = truth_of(inputs, "mean")
    use(TILING)
    _, ours = value_and_gradients(inputs)
    use(None)
    _, others = value_and_gradients(inputs)
    for name, gradient in ours.items():
        wanted = getattr(truth, name)
        largest = 1.1 * relative_error(others[name], wanted)
        assert relative_error(gradient, wanted) <= largest


@pytest.mark.parametrize(
    "kept", [(1, 3), *(pytest.param(k, marks=LARGE) for k in [(), (0, 4)])], ids=str
)
def test_blocks_without_a_kept_row_are_left_out(kept, use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (150, 128, 200), ("bias",))
    blocks = np.arange(150) // TILING.rows
    inputs["where"] = np.isin(blocks, kept) & (np.arange(150) % 3 > 0)
    # Whatever a dropped row holds.
    inputs["hidden"] = np.where(inputs["where"][:, None], inputs["hidden"], np.nan)
    inputs["hidden"] = inputs["hidden"].astype(jnp.bfloat16)
    result = value_and_gradients(inputs, "sum")
    finite = np.nan_to_num(inputs["hidden"].astype(np.float32)).astype(jnp.bfloat16)
    assert_right(inputs | {"hidden": finite}, result, "sum")


def test_an_undefined_row_is_nan_alone(use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (40, 128, 200))
    inputs["labels"][3] = 200
    value, gradients = value_and_gradients(inputs)
    assert np.isnan(value)
    assert np.isnan(gradients["kernel"]).all()
    finite = np.isfinite(np.asarray(gradients["hidden"], np.float32)).all(axis=1)
    assert (finite == (np.arange(40) != 3)).all()


def test_label_of_a_dropped_class(use, rng):
    use(TILING)
    inputs = bfloat16_inputs(rng, (8, 128, 200), ("class_mask",))
    inputs["labels"][2] = 199
    value, gradients = value_and_gradients(inputs)
    assert value == np.inf
    assert np.isfinite(np.asarray(gradients["hidden"], np.float32)).all()
    assert (np.asarray(gradients["kernel"][:, 150:], np.float32) == 0).all()


@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all options"])
def test_sharded_rows_and_classes(options, use, rng):
    use(TILING)
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
    names = {"class_axis_name": "model", "batch_axis_name": "data"}

    def loss(arrays):
        return LOSS(**arrays, **names, reduction="mean")

    # The interpreter of kernels does not do the types that `check_vma` asks for.
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(specs,), out_specs=jax.P(), check_vma=False
    )
    moving, rest = parted(inputs)
    if "class_weights" in moving:
        rest["class_weights"] = moving.pop("class_weights")
    function = jax.value_and_grad(lambda moving: sharded(moving | rest))
    assert_right(inputs, jax.jit(function)(jax.tree.map(jnp.asarray, moving)))


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 30.0},
        {"temperature": 2.0},
        {"with_statistics": True},
        {"hidden": np.float32},
        {"hidden": np.float16},
        {"kernel": np.float16},
        {"reduction": None},
        {"features": 120},
        {"frozen": "kernel"},
        {"frozen": "hidden"},
        {"moving": "class_weights"},
        {"switch": "0"},
    ],
    ids=str,
)
def test_what_takes_the_other_form(change, use, rng, monkeypatch):
    programs = use(TILING)
    inputs = bfloat16_inputs(rng, (8, change.get("features", 128), 40))
    for name in ("hidden", "kernel"):
        inputs[name] = inputs[name].astype(change.get(name, inputs[name].dtype))
    for name in ("softcap", "temperature", "with_statistics"):
        if name in change:
            inputs[name] = change[name]
    if "switch" in change:
        monkeypatch.setenv("XENT_JAX_TPU_KERNELS", change["switch"])
    by = [n for n in ("hidden", "kernel") if n != change.get("frozen")]
    if "moving" in change:
        inputs["class_weights"] = np.ones(40, np.float32)
        by.append("class_weights")
    moving = {name: inputs.pop(name) for name in by}
    reduction = change.get("reduction", "mean")

    def loss(moving):
        return jax.tree.leaves(LOSS(**moving, **inputs, reduction=reduction))[0].sum()

    jax.jit(jax.grad(loss)).lower(moving)
    assert not programs


def test_transformations_take_the_other_form(use, rng):
    programs = use(TILING)
    inputs = bfloat16_inputs(rng, (8, 128, 40))
    moving, rest = parted(inputs)

    def loss(moving):
        return LOSS(**moving, **rest, reduction="mean")

    def of_direction(moving):
        return jax.jvp(jax.grad(loss), (moving,), (moving,))[1]

    several = jax.tree.map(lambda array: np.stack([array] * 3), moving)
    jax.jit(jax.vmap(jax.grad(loss))).lower(several)
    jax.jit(of_direction).lower(moving)
    assert not programs
    jax.jit(jax.grad(loss)).lower(moving)
    assert len(programs) == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_sizes_of_tiles(chip, itemsize):
    for rows, features, classes in [(1, 128, 1), (8519, 768, 50257), (40, 2048, 9000)]:
        tiling = tiling_of_sum(rows, features, classes, chip, itemsize)
        blocks = -(-rows // tiling.rows)
        assert tiling.rows % tiling.row_chunk == 0
        assert blocks * tiling.rows - rows < 16 * blocks * (1 + tiling.rows // 512)
        assert tiling.classes % 128 == 0
        assert tiling.memory < 128 * 2**20


@pytest.mark.parametrize(
    ("sizes", "chip"),
    [
        ((8, 128, 10), "TPU v4"),
        ((8, 128, 10), "cpu"),
        ((8192, 65536, 1024), "TPU v6 lite"),
    ],
    ids=str,
)
def test_what_does_not_fit(sizes, chip):
    assert tiling_of_sum(*sizes, chip) is None


def test_verify_runs_the_kernels(use):
    """So that it checks them on a TPU, too."""
    assert_verify_takes("head, by kernel", use(TILING))
