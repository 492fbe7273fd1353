"""The linear head equals its float64 oracle: sizes, blocks, options, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened
from heads import (
    FORMS,
    LOSS,
    OF_STATISTICS,
    OPTIONS,
    SINGLES,
    STATISTICS,
    TRIPLES,
    assert_close,
    assert_equals_the_oracle,
    cast,
    head_inputs,
)

pytestmark = pytest.mark.once

# Blocks that divide neither the rows nor the classes, so that the last is ragged.
BLOCKS = {
    None: {"class_block": 4},
    "mean": {"row_block": 4},
    "sum": {"row_block": 4},
}


def name_of(options):
    return "+".join(options) or "plain"


EACH = [
    *(pytest.param(options, marks=pytest.mark.exhaustive) for options in SINGLES),
    *shortened([(triple,) for triple in TRIPLES], kept=[(t,) for t in TRIPLES[::2]]),
]


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("options", EACH, ids=name_of)
def test_every_option_and_every_three(options, reduction, rng, x64, unoptimized):
    """In float64, where a wrong term cannot hide behind rounding."""
    inputs = head_inputs(rng, (2, 5), 3, 11, options)
    assert_equals_the_oracle(inputs, 1e-12, reduction=reduction, **BLOCKS[reduction])


@pytest.mark.parametrize("reduction", [None, "sum"])
@pytest.mark.parametrize("batch", [(), (9,), (2, 1, 3)], ids=str)
def test_all_options_over_any_batch_shape(batch, reduction, rng, x64, unoptimized):
    inputs = head_inputs(rng, batch, 3, 10, OPTIONS)
    if batch == ():
        inputs |= {"where": np.bool_(True), "weights": np.float64(1.5)}
    assert_equals_the_oracle(inputs, 1e-12, reduction=reduction, **BLOCKS[reduction])


SIZES = [
    *((5, classes) for classes in (1, 2, 7, 127, 128, 1000, 4001)),
    *((rows, 127) for rows in (0, 1, 128, 513)),
]


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize(("rows", "classes"), shortened(SIZES, kept=SIZES[::3]))
def test_sizes(rows, classes, reduction, rng):
    """float32 and an odd number of features; 50 divides no size."""
    inputs = cast(head_inputs(rng, (rows,), 17, classes, OF_STATISTICS), "float32")
    block = "class_block" if reduction is None else "row_block"
    assert_equals_the_oracle(inputs, 2e-5, reduction=reduction, **{block: 50})


@pytest.mark.parametrize("reduction", shortened([None, "mean"], kept=["mean"]))
def test_default_blocks(reduction, rng):
    """Several blocks: the budget is 64 MiB of rows, or 32 MiB of classes."""
    rows, classes = (700, 25_003) if reduction else (4100, 3001)
    inputs = cast(head_inputs(rng, (rows,), 3, classes, ("bias", "where")), "float32")
    assert_equals_the_oracle(inputs, 5e-5, reduction=reduction)


@pytest.mark.parametrize("size", [1, 4, 7, 11, 100])
def test_every_class_in_every_block(size, rng, unoptimized):
    """The last block of classes overlaps the one before it: no class counts twice."""
    inputs = head_inputs(rng, (11,), 5, 11, ("label_smoothing", "class_weights"))
    inputs = cast(inputs, "float32") | {"labels": np.arange(11)}
    assert_equals_the_oracle(inputs, 1e-5, class_block=size)
    statistics = STATISTICS(
        inputs["hidden"], inputs["kernel"], inputs["labels"], class_block=size
    )
    plain = {name: inputs[name] for name in ("hidden", "kernel", "labels")}
    truth = oracle.linear_softmax_statistics(**plain)
    for name, computed in statistics._asdict().items():
        assert_close(computed, getattr(truth, name), 1e-5, name)


@pytest.mark.parametrize(
    ("size", "where"), [(1, False), (3, False), (5, True), (12, True), (100, False)]
)
def test_every_row_in_every_block(size, where, rng, unoptimized):
    options = ("where", "weights") if where else ()
    inputs = cast(head_inputs(rng, (12,), 5, 9, options), "float32")
    assert_equals_the_oracle(inputs, 1e-5, reduction="sum", row_block=size)


@pytest.mark.parametrize("reduction", [None, "mean"])
def test_eagerly(reduction, rng):
    inputs = cast(head_inputs(rng, (2, 3), 3, 7, ("where", "weights")), "float32")
    assert_equals_the_oracle(
        inputs, 1e-5, eager=True, reduction=reduction, **BLOCKS[reduction]
    )


@pytest.mark.parametrize("reduction", shortened([None, "mean"], kept=["mean"]))
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap"])
def test_gradients_by_scalar_options(name, reduction, rng, x64, unoptimized):
    """They may be traced, as a schedule or a trained softcap is."""
    inputs = head_inputs(rng, (6,), 3, 7, OPTIONS)
    point = inputs.pop(name)

    def total(value):
        loss = LOSS(**inputs, **{name: value}, reduction=reduction, **BLOCKS[reduction])
        return loss.sum()

    def true(value):
        options = {**inputs, name: value, "reduction": reduction}
        return oracle.linear_softmax_cross_entropy(**options).value.sum()

    step = 1e-4
    near, far = (true(point + k * step) - true(point - k * step) for k in (1, 2))
    gradient = jax.jit(jax.grad(total))(jnp.asarray(point))
    np.testing.assert_allclose(gradient, (8 * near - far) / (12 * step), rtol=1e-8)


def test_zero_coefficients_that_are_traced_change_nothing(rng):
    """A traced 0 keeps the code path that a Python 0 leaves out."""
    inputs = cast(head_inputs(rng, (6,), 3, 7), "float32")
    for reduction in FORMS:
        plain = LOSS(**inputs, reduction=reduction)
        traced = jax.jit(
            lambda smoothing, z_loss, r=reduction: LOSS(
                **inputs, label_smoothing=smoothing, z_loss=z_loss, reduction=r
            )
        )(0.0, 0.0)
        np.testing.assert_allclose(plain, traced, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        *(((o,), (2, 3)) for o in OF_STATISTICS),
        ((), (7,)),
        (OF_STATISTICS, (9,)),
        (("bias", "softcap"), ()),
    ],
)
def test_statistics(options, batch, rng, x64, unoptimized):
    inputs = head_inputs(rng, batch, 3, 11, options)
    factors = (0.3, 0.8, -1.7)

    @jax.jit
    def both(moving, rest):
        def total(moving):
            found = STATISTICS(**moving, **rest, class_block=4)
            pairs = zip(factors, found[:3], strict=True)
            return sum((factor * array).sum() for factor, array in pairs), found

        return jax.grad(total, has_aux=True)(moving)

    moving = {k: v for k, v in inputs.items() if k in ("hidden", "kernel", "bias")}
    rest = {k: v for k, v in inputs.items() if k not in moving}
    gradients, found = both(moving, rest)
    truth = oracle.linear_softmax_statistics(**inputs, factors=factors)
    for name, computed in found._asdict().items():
        assert computed.shape == batch
        assert_close(computed, getattr(truth, name), 1e-12, name)
    assert found.prediction.dtype == jnp.int32
    for name, gradient in gradients.items():
        assert_close(gradient, getattr(truth, name), 1e-12, name)


@pytest.mark.parametrize("classes", [1, 2, 127, 4001])
@pytest.mark.parametrize("rows", [0, 5])
def test_sizes_of_statistics(rows, classes, rng):
    inputs = cast(head_inputs(rng, (rows,), 17, classes, OF_STATISTICS), "float32")
    found = jax.jit(lambda x: STATISTICS(**x, class_block=50))(inputs)
    truth = oracle.linear_softmax_statistics(**inputs)
    for name, computed in found._asdict().items():
        assert_close(computed, getattr(truth, name), 1e-5, name)


def test_the_loss_and_the_statistics_agree(rng):
    inputs = cast(head_inputs(rng, (6,), 5, 40, ("bias", "softcap")), "float32")
    found = STATISTICS(**inputs, class_block=16)
    np.testing.assert_allclose(
        LOSS(**inputs, class_block=16), -found.log_prob, rtol=1e-7
    )
    squared = LOSS(**inputs, z_loss=0.5, class_block=16) + found.log_prob
    np.testing.assert_allclose(squared, 0.5 * found.log_normalizer**2, rtol=1e-5)
    # Evenly spread targets: the mean of the log-probabilities of every class.
    every = {"labels": np.tile(np.arange(40), (6, 1))}
    every["hidden"] = np.repeat(inputs["hidden"][:, None], 40, 1)
    single = STATISTICS(**inputs | every).log_prob
    spread = LOSS(**inputs, label_smoothing=1.0, class_block=16)
    np.testing.assert_allclose(spread, -np.mean(single, 1), rtol=1e-5)


def test_the_first_of_equal_logits_is_predicted():
    hidden, labels = np.ones((2, 1), np.float32), np.array([0, 0])
    kernel = np.array([[1.0, 3.0, 2.0, 3.0, 3.0]], np.float32)
    for size in (1, 2, 3, 5):
        found = STATISTICS(hidden, kernel, labels, class_block=size)
        np.testing.assert_array_equal(found.prediction, [1, 1])
        found = STATISTICS(-hidden, kernel, labels, class_block=size)
        np.testing.assert_array_equal(found.prediction, [0, 0])


def test_mean_is_the_sum_over_the_mass(rng):
    inputs = cast(head_inputs(rng, (9,), 3, 7, OPTIONS), "float32")
    kept = inputs["where"]
    mass = np.sum((inputs["weights"] * inputs["class_weights"][inputs["labels"]])[kept])
    per_row = LOSS(**inputs)
    total, mean = (LOSS(**inputs, reduction=r) for r in ("sum", "mean"))
    np.testing.assert_allclose(total, per_row.sum(), rtol=1e-5)
    np.testing.assert_allclose(mean, total / mass, rtol=1e-6)
