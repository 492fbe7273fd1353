"""Masks, weights of 0, bad ids and what is not finite, in the linear head."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from heads import (
    FORMS,
    LOSS,
    OF_ROWS,
    OPTIONS,
    STATISTICS,
    assert_close,
    assert_equals_the_oracle,
    cast,
    head_inputs,
    value_and_gradients,
)

pytestmark = pytest.mark.once

INF, NAN = np.inf, np.nan
BLOCKS = {None: {"class_block": 3}, "mean": {"row_block": 2}, "sum": {"row_block": 2}}
HELD = {"NaN": NAN, "inf": INF, "-inf": -INF, "huge": 3e38}


@pytest.fixture(autouse=True)
def unoptimized(request):
    """Compiles in half of the time; sizes and accuracy are tested optimised.

    Half-precision products are compiled by what is left out here.
    """
    half = "float16" in request.node.name
    jax.config.update("jax_disable_most_optimizations", not half)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


forms = pytest.mark.parametrize("reduction", [None, "mean"])


def call(inputs, reduction, **options):
    return value_and_gradients(
        inputs, reduction=reduction, **BLOCKS[reduction], **options
    )


def problem(rng, options=()):
    return cast(head_inputs(rng, (5,), 3, 7, options), "float32")


def without_row(inputs, row):
    """Returns the inputs without one of the rows."""
    return {k: np.delete(v, row, 0) if k in OF_ROWS else v for k, v in inputs.items()}


@forms
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dropped_by", ["where", "weights"])
def test_a_dropped_row_adds_exactly_nothing(dropped_by, held, reduction, rng):
    inputs = problem(rng, OPTIONS)
    inputs["where"], inputs["weights"][:] = np.ones(5, bool), 1.5
    inputs[dropped_by][2] = 0
    inputs["hidden"][2] = HELD[held]
    if held != "huge":
        inputs["labels"][2] = 100
    if dropped_by == "where":
        inputs["weights"][2] = HELD[held]
    value, gradients = call(inputs, reduction)
    alone, expected = call(without_row(inputs, 2), reduction)
    if reduction is None:
        assert value[2] == 0
        value = np.delete(value, 2)
    np.testing.assert_allclose(value, alone, rtol=2e-6)
    for name, gradient in gradients.items():
        if name in ("hidden", "weights"):
            assert not gradient[2].any()
            gradient = np.delete(gradient, 2, 0)
        assert_close(gradient, expected[name], 5e-6, name)


@forms
def test_the_gradient_of_a_weight_of_zero_is_the_loss_of_its_row(reduction, rng):
    inputs = problem(rng, ("weights", "bias"))
    inputs["weights"] = np.array([0, 1, 0, 2, 0.5], np.float32)
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **BLOCKS[reduction])
    _, gradients = call(inputs, "sum")
    plain = {k: v for k, v in inputs.items() if k != "weights"}
    np.testing.assert_allclose(gradients["weights"], LOSS(**plain), rtol=1e-5)


@forms
@pytest.mark.parametrize("bad", [7, 8, -1, -100, 2**31 - 1, -(2**31)])
def test_bad_ids(bad, reduction, rng):
    inputs = problem(rng, ("bias", "label_smoothing"))
    healthy = call(inputs, "sum")[1]["hidden"]
    inputs["labels"] = inputs["labels"].astype(np.int32)
    inputs["labels"][3] = bad
    value, gradients = call(inputs, reduction)
    if reduction is None:
        np.testing.assert_array_equal(np.isnan(value), np.arange(5) == 3)
    else:
        assert np.isnan(value)
    hidden = gradients["hidden"]
    assert np.isnan(hidden[3]).all()
    if reduction == "mean":
        healthy = healthy / 5
    np.testing.assert_allclose(
        np.delete(hidden, 3, 0), np.delete(healthy, 3, 0), rtol=1e-5, atol=1e-7
    )
    # Dropped, it does not exist.
    inputs["where"] = np.arange(5) != 3
    value, gradients = call(inputs, reduction)
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert not gradients["hidden"][3].any()


@forms
@pytest.mark.parametrize("held", [NAN, INF])
def test_a_row_that_is_not_finite_poisons_its_own_gradient(held, reduction, rng):
    inputs = problem(rng, ("softcap",)) if held is NAN else problem(rng)
    inputs["hidden"][1, 0] = held
    value, gradients = call(inputs, reduction)
    alone = call(without_row(inputs, 1), reduction)[1]["hidden"]
    if reduction is None:
        np.testing.assert_array_equal(np.isnan(value), np.arange(5) == 1)
    else:
        assert np.isnan(value)
    hidden = gradients["hidden"]
    assert np.isnan(hidden[1]).all()
    if reduction == "mean":
        alone = alone * 4 / 5
    np.testing.assert_allclose(np.delete(hidden, 1, 0), alone, rtol=1e-5, atol=1e-7)


@forms
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("capped", [False, True])
def test_padded_classes_may_hold_anything(capped, held, reduction, rng):
    """The kernel a finite number. The mask comes after the cap: −inf is no −softcap."""
    options = ("bias", "class_mask", "label_smoothing", "class_weights", "z_loss")
    inputs = problem(rng, (*options, "softcap") if capped else options)
    mask = inputs["class_mask"]
    fewer = {k: v for k, v in inputs.items() if k != "class_mask"}
    for name in ("kernel", "bias", "class_weights"):
        fewer[name] = inputs[name][..., mask]
    inputs["kernel"][:, ~mask], inputs["bias"][~mask] = 1e30, HELD[held]
    value, gradients = call(inputs, reduction)
    alone, expected = call(fewer, reduction)
    np.testing.assert_allclose(value, alone, rtol=2e-6)
    for name, gradient in gradients.items():
        if name in ("kernel", "bias", "class_weights"):
            assert not gradient[..., ~mask].any()
            gradient = gradient[..., mask]
        assert_close(gradient, expected[name], 5e-6, name)


@forms
def test_nothing_kept(reduction, rng):
    inputs = problem(rng, OPTIONS)
    inputs["hidden"][0, 0], inputs["labels"][1] = NAN, -5
    for drop in (
        {"where": np.zeros(5, bool)},
        {"class_mask": np.zeros(7, bool)},
    ):
        value, gradients = call(inputs | drop, reduction)
        assert not np.any(value)
        for name, gradient in gradients.items():
            assert not gradient.any(), name
    inputs = problem(rng, ("weights", "bias"))
    inputs["weights"][:] = 0
    value, gradients = call(inputs, reduction)
    assert not np.any(value)
    for name in ("hidden", "kernel", "bias"):
        assert not gradients[name].any()


@forms
def test_a_label_on_a_padded_class(reduction, rng):
    inputs = problem(rng, ("class_mask", "bias"))
    inputs["labels"] = np.array([0, 6, 2, 1, 3])
    value, gradients = call(inputs, reduction)
    if reduction is None:
        np.testing.assert_array_equal(np.isposinf(value), inputs["labels"] == 6)
    else:
        assert np.isposinf(value)
    truth = oracle.linear_softmax_cross_entropy(**inputs, reduction="sum")
    scale = 5 if reduction == "mean" else 1
    np.testing.assert_allclose(
        gradients["hidden"], truth.hidden / scale, rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(gradients["kernel"]).all()


@forms
def test_a_bias_of_minus_infinity_is_a_class_of_probability_0(reduction, rng):
    inputs = problem(rng, ("bias",))
    inputs["bias"][2], inputs["labels"] = -INF, np.array([0, 1, 3, 4, 5])
    value, gradients = call(inputs, reduction)
    kept = np.arange(7) != 2
    fewer = {
        "hidden": inputs["hidden"],
        "kernel": inputs["kernel"][:, kept],
        "bias": inputs["bias"][kept],
        "labels": np.arange(5),
    }
    alone, expected = call(fewer, reduction)
    np.testing.assert_allclose(value, alone, rtol=2e-6)
    assert_close(gradients["hidden"], expected["hidden"], 5e-6)
    assert_close(gradients["kernel"][:, kept], expected["kernel"], 5e-6)
    assert not gradients["kernel"][:, 2].any()
    assert not gradients["bias"][2]


@forms
@pytest.mark.parametrize("held", [NAN, INF])
def test_a_kept_class_that_is_not_finite_is_not_hidden(held, reduction, rng):
    inputs = problem(rng, ("bias",))
    inputs["bias"][6] = held
    value, _ = call(inputs, reduction)
    assert np.isnan(value).all()


@forms
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32"])
def test_narrow_ids_do_not_wrap(dtype, reduction, rng):
    """300 classes: an 8-bit comparison would find class 5 twice."""
    inputs = cast(head_inputs(rng, (4,), 3, 300), "float32")
    inputs["labels"] = np.array([5, 44, 100, 127]).astype(dtype)
    block = {None: {"class_block": 70}}.get(reduction, {"row_block": 3})
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **block)


@forms
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_wide_ids_do_not_wrap(dtype, reduction):
    """2³² + 1 is no class, though its low 32 bits are; NumPy ids without x64 too."""
    hidden, kernel = np.ones((2, 1), np.float32), np.zeros((1, 3), np.float32)
    ids = np.array([1, 2**32 + 1], dtype)
    value = LOSS(hidden, kernel, ids, reduction=reduction)
    assert np.isnan(value).any()
    kept = LOSS(hidden, kernel, ids, where=[True, False], reduction="sum")
    np.testing.assert_allclose(kept, np.log(3), rtol=1e-6)


@forms
def test_float64_is_float64_throughout(reduction, rng, x64):
    """A confident row among them: its loss is below the roundoff of float32."""
    inputs = head_inputs(rng, (3,), 2, 4, ("bias", "z_loss"))
    inputs["hidden"][0] = [40, 0]
    inputs["kernel"][0] = [1, 0, 0, 0]
    inputs["labels"][0] = 0
    value, gradients = call(inputs, reduction)
    truth = oracle.linear_softmax_cross_entropy(**inputs, reduction=reduction)
    np.testing.assert_allclose(value, truth.value, rtol=1e-14)
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float64
        assert_close(gradient, getattr(truth, name), 1e-14, name)


@forms
@pytest.mark.parametrize(
    ("hidden", "kernel"),
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float16", "float16"),
        ("float16", "float32"),
    ],
)
def test_gradients_leave_in_the_dtype_of_their_primal(hidden, kernel, reduction, rng):
    """Of mixed dtypes the features' is that of the matmuls; float32 accumulates."""
    # jaxlib 0.7.2 cannot compile some half-precision products of fewer numbers.
    inputs = head_inputs(rng, (8,), 8, 9, ("bias", "weights"))
    inputs = cast(inputs, hidden, "float32")
    inputs["kernel"] = inputs["kernel"].astype(jnp.dtype(kernel))
    value, gradients = call(inputs, reduction)
    assert value.dtype == np.float32
    for name, gradient in gradients.items():
        assert gradient.dtype == np.asarray(inputs[name]).dtype, name
    # What the matmuls see.
    seen = inputs | {"kernel": inputs["kernel"].astype(jnp.dtype(hidden))}
    truth = oracle.linear_softmax_cross_entropy(**seen, reduction=reduction)
    np.testing.assert_allclose(value, truth.value, rtol=3e-6)
    narrow = max(float(jnp.finfo(d).eps) for d in (hidden, kernel))
    for name, gradient in gradients.items():
        assert_close(gradient, getattr(truth, name), max(2 * narrow, 2e-6), name)


@forms
def test_float32_stays_float32_with_x64_enabled(reduction, rng, x64):
    inputs = problem(rng, OPTIONS)
    value, gradients = call(inputs, reduction)
    assert value.dtype == np.float32
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("margin", [10.0, 17.0, 30.0, 60.0, 80.0])
@forms
def test_confident_rows_keep_loss_and_gradient(margin, reduction):
    """log p and p − 1 of a winning label would be exactly 0 from a margin of 17 on."""
    kernel = np.eye(5, dtype=np.float32)
    inputs = {
        "hidden": np.float32([[margin, 0, 1, 0, -1]]),
        "kernel": kernel,
        "labels": np.array([0]),
    }
    value, gradients = call(inputs, reduction)
    truth = oracle.linear_softmax_cross_entropy(**inputs, reduction=reduction)
    np.testing.assert_allclose(value, truth.value, rtol=1e-6)
    np.testing.assert_allclose(gradients["hidden"], truth.hidden, rtol=2e-6)
    found = STATISTICS(**inputs, class_block=2)
    expected = oracle.linear_softmax_statistics(**inputs)
    np.testing.assert_allclose(found.entropy, expected.entropy, rtol=2e-6)
    np.testing.assert_allclose(found.log_prob, -truth.value.ravel(), rtol=1e-6)


def test_special_values_of_the_statistics():
    kernel = np.eye(4, dtype=np.float32)
    hidden = np.float32([[0, 1, 2, 0], [NAN, 1, 0, 0], [1, 2, 3, 4], [0, 1, 2, 0]])
    labels = np.array([1, 0, 9, 5])
    where = np.array([True, True, False, True])
    for size in (1, 3, 4):
        found = STATISTICS(hidden, kernel, labels, where=where, class_block=size)
        for array in found[:3]:
            assert array[2] == 0
            assert np.isnan(array[1])
        np.testing.assert_array_equal(found.prediction[:3], [2, -1, -1])
        assert np.isnan(found.log_prob[3])
        nothing = STATISTICS(
            hidden, kernel, labels, class_mask=np.zeros(4, bool), class_block=size
        )
        np.testing.assert_array_equal(nothing.prediction, [-1] * 4)
        assert not np.any(nothing[:3])
        # −inf in every class: no arg max.
        row = STATISTICS(
            hidden[:1], kernel, labels[:1], bias=np.full(4, -INF), class_block=size
        )
        np.testing.assert_array_equal(row.prediction, [-1])
        assert np.isnan(row.log_prob).all()


def test_one_class_has_no_loss_and_no_gradient(rng):
    inputs = cast(head_inputs(rng, (3,), 2, 1, ("bias",)), "float32")
    for reduction in FORMS:
        value, gradients = call(inputs, reduction)
        assert not np.any(value)
        assert not np.signbit(value).any()
        assert not any(gradient.any() for gradient in gradients.values())


@forms
def test_a_tangent_of_a_dropped_row_may_hold_anything(reduction, rng):
    inputs = problem(rng, ("where",))
    hidden, inputs["where"] = inputs.pop("hidden"), np.arange(5) != 2
    broken, clean = np.ones((2, 5, 3), np.float32)
    broken[2], clean[2] = NAN, 0

    def along(tangent):
        def loss(hidden):
            return LOSS(hidden, reduction=reduction, **inputs, **BLOCKS[reduction])

        return jax.jvp(loss, (jnp.asarray(hidden),), (jnp.asarray(tangent),))[1]

    np.testing.assert_array_equal(along(broken), along(clean))


@pytest.mark.parametrize("reduction", FORMS)
def test_no_features(reduction):
    hidden, kernel = np.zeros((2, 3, 0), np.float32), np.zeros((0, 4), np.float32)
    labels = np.zeros((2, 3), int)

    def loss(hidden, kernel):
        return jnp.mean(LOSS(hidden, kernel, labels, reduction=reduction))

    value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    rows = 6 if reduction == "sum" else 1
    np.testing.assert_allclose(value, rows * np.log(4), rtol=1e-6)
    assert [gradient.shape for gradient in gradients] == [(2, 3, 0), (0, 4)]


def test_second_derivatives_beside_dropped_rows_and_classes(rng):
    inputs = problem(rng, ("bias", "where", "class_mask"))
    inputs["where"] = np.array([True, False, True, True, True])
    inputs["hidden"][1], inputs["kernel"][:, 6], inputs["bias"][6] = NAN, 1e30, NAN
    rest = {k: v for k, v in inputs.items() if k != "hidden"}
    for reduction in (None, "sum"):

        def total(hidden, reduction=reduction):
            options = {**rest, "reduction": reduction, **BLOCKS[reduction]}
            return LOSS(hidden, **options).sum()

        tangent = jnp.ones_like(inputs["hidden"]).at[1].set(NAN)
        hvp = jax.jit(lambda x, t=total, v=tangent: jax.jvp(jax.grad(t), (x,), (v,))[1])
        found = hvp(jnp.asarray(inputs["hidden"]))
        assert np.isfinite(found).all()
        assert not np.any(found[1])
        assert np.any(found[0])
