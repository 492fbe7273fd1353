"""The weighted mean."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import xent_jax

MEAN = xent_jax.weighted_mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(7,), (2, 3), ()])
def test_equals_the_oracle(dtype, shape, rng):
    values = jnp.asarray(rng.random(shape), dtype)
    weights = rng.random(shape).astype(np.float32)
    mean = MEAN(values, weights)
    assert mean.dtype == jnp.float32
    exact = np.asarray(values).astype(np.float64)
    np.testing.assert_allclose(mean, oracle.weighted_mean(exact, weights), rtol=1e-6)
    np.testing.assert_allclose(MEAN(values), exact.mean(), rtol=1e-6)


def test_gradients(rng):
    values, weights = rng.random((2, 5)).astype(np.float32)
    by_values, by_weights = jax.grad(MEAN, argnums=(0, 1))(values, weights)
    total = weights.sum()
    mean = (weights * values).sum() / total
    np.testing.assert_allclose(by_values, weights / total, rtol=1e-6)
    np.testing.assert_allclose(by_weights, (values - mean) / total, rtol=1e-4)


def test_the_gradient_by_a_weight_of_zero_is_true():
    by_weights = jax.grad(MEAN, argnums=1)(jnp.array([1.0, 3.0]), jnp.array([2.0, 0.0]))
    np.testing.assert_allclose(by_weights, [0, 1])


@pytest.mark.parametrize("weights", [[0, 0, 0], [False, False, False], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [np.nan, np.inf, 1.0]])
def test_nothing_kept_is_zero(weights, values):
    weights = jnp.asarray(weights)
    mean, gradient = jax.value_and_grad(MEAN)(jnp.asarray(values), weights)
    assert mean == 0
    assert not np.any(gradient)


def test_empty_is_zero():
    assert MEAN(jnp.zeros(0)) == 0
    assert jax.grad(MEAN)(jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("held", [np.nan, np.inf, -np.inf])
def test_weight_zero_keeps_out_what_is_not_finite(held):
    values = jnp.array([1.0, held, 3.0])
    for weights in (jnp.array([1, 0, 1]), jnp.array([True, False, True])):
        mean, gradient = jax.value_and_grad(MEAN)(values, weights)
        assert mean == 2
        np.testing.assert_array_equal(gradient, [0.5, 0, 0.5])


def test_a_weighed_nan_is_not_hidden():
    assert np.isnan(MEAN(jnp.array([1.0, np.nan]), jnp.array([1.0, 1e-30])))


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8", "float32"])
@pytest.mark.parametrize("axis", [None, -1, 0, (0, 2), (1,)])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_and_axes(dtype, axis, masked, rng):
    values = rng.integers(0, 2, (2, 3, 5)).astype(dtype)
    weights = rng.integers(0, 3, values.shape)
    keep = rng.random(values.shape) < 0.4 if masked else np.ones(values.shape, bool)
    for weigh in (None, weights, weights > 0):
        mean = MEAN(values, weigh, where=keep, axis=axis)
        assert mean.dtype == jnp.float32
        truth = oracle.weighted_mean(values, weigh, keep, axis)
        np.testing.assert_allclose(mean, truth, rtol=1e-6)


@pytest.mark.parametrize("held", [np.nan, np.inf])
def test_where_drops_whatever_an_entry_and_its_weight_hold(held):
    values, weights = jnp.array([1.0, held, 3.0]), jnp.array([1.0, held, 1.0])
    keep = jnp.array([True, False, True])
    for weigh in (None, weights):
        mean, gradient = jax.value_and_grad(MEAN)(values, weigh, where=keep)
        assert mean == 2
        np.testing.assert_array_equal(gradient, [0.5, 0, 0.5])
    by_weights = jax.grad(MEAN, argnums=1)(values, weights, where=keep)
    np.testing.assert_array_equal(by_weights, [-0.5, 0, 0.5])


def test_the_mean_of_torch_is_that_of_plain_losses_under_class_weights(rng):
    logits = rng.standard_normal((6, 4)).astype(np.float32)
    labels, w = np.array([0, 1, -100, 3, 2, -100]), jnp.array([1.0, 2.0, 3.0, 4.0])
    keep = labels != -100
    own = w[jnp.where(keep, labels, 0)]
    loss = xent_jax.softmax_cross_entropy_with_integer_labels
    weighted = loss(logits, labels, where=keep, class_weights=w)
    np.testing.assert_allclose(
        MEAN(loss(logits, labels, where=keep), own, where=keep),
        weighted.sum() / jnp.where(keep, own, 0).sum(),
        rtol=1e-6,
    )


def test_the_mean_of_torch_under_class_weights(rng):
    """The recipe of the docstring: the denominator is Σ w[label] over kept rows."""
    logits = rng.standard_normal((6, 4)).astype(np.float32)
    labels = np.array([0, 1, -100, 3, 2, -100])
    w = jnp.array([1.0, 2.0, 3.0, 4.0])
    keep = labels != -100
    loss = xent_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=keep, class_weights=w
    )
    mean = loss.sum() / jnp.where(keep, w[jnp.where(keep, labels, 0)], 0).sum()
    surprise = -np.log(oracle.softmax(logits))[keep, labels[keep]]
    weights = np.asarray(w)[labels[keep]]
    truth = (weights * surprise).sum() / weights.sum()
    np.testing.assert_allclose(mean, truth, rtol=1e-6)
