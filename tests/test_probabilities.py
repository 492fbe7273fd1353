"""Losses of probabilities: Keras's definition, and a gradient where it clips."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import xent_jax

CATEGORICAL = xent_jax.categorical_cross_entropy
BINARY = xent_jax.binary_cross_entropy


@pytest.mark.parametrize("epsilon", [1e-7, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_categorical_renormalizes_and_clips(epsilon, scale, rng):
    probs = (scale * rng.dirichlet(np.ones(6), 20)).astype(np.float32)
    probs[0] = [0, 0, 1, 0, 0, 0]
    labels = rng.dirichlet(np.ones(6), 20).astype(np.float32)
    value = CATEGORICAL(probs, labels, epsilon=epsilon)
    truth = oracle.categorical_cross_entropy(probs, labels, epsilon=epsilon)
    np.testing.assert_allclose(value, truth, rtol=1e-6)


def test_a_label_of_probability_zero_still_learns():
    """Keras's gradient is 0 there: the clip is flat."""
    probs, labels = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda p: CATEGORICAL(p, labels).sum())(probs)
    np.testing.assert_allclose(value, -np.log(1e-7), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1e7, 0]], rtol=1e-6)
    value, gradient = jax.value_and_grad(BINARY)(jnp.float32(0), jnp.float32(1))
    np.testing.assert_allclose(value, -np.log(1e-7), rtol=1e-6)
    np.testing.assert_allclose(gradient, -1e7, rtol=1e-6)
    gradient = jax.grad(BINARY)(jnp.float32(1), jnp.float32(0))
    np.testing.assert_allclose(gradient, 1 / 2.0**-23, rtol=0.2)


@pytest.mark.parametrize("held", [np.nan, np.inf, -1.0, 0.0])
def test_dropped_rows_and_classes(held, rng):
    probs = rng.dirichlet(np.ones(4), 3).astype(np.float32)
    labels = rng.dirichlet(np.ones(4), 3).astype(np.float32)
    probs[0], labels[0] = held, np.nan
    keep = np.array([False, True, True])

    def total(p, where):
        return CATEGORICAL(p, jnp.asarray(labels), where=where).sum()

    value = CATEGORICAL(probs, labels, where=keep)
    assert value[0] == 0
    np.testing.assert_allclose(value[1:], CATEGORICAL(probs[1:], labels[1:]), rtol=1e-6)
    gradient = jax.grad(total)(jnp.asarray(probs), keep)
    assert not np.any(gradient[0])
    assert np.isfinite(gradient).all()
    classes = (
        np.broadcast_to(np.array([True, False, True, True]), (3, 4)) & keep[:, None]
    )
    probs[1:, 1] = held
    value = CATEGORICAL(probs, labels, where=classes)
    kept = np.array([0, 2, 3])
    expected = CATEGORICAL(probs[1:, kept], labels[1:, kept])
    np.testing.assert_allclose(value, np.append(0, expected), rtol=1e-6)
    gradient = jax.grad(total)(jnp.asarray(probs), classes)
    assert not np.any(np.asarray(gradient)[~classes])
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("held", [np.nan, np.inf, -np.inf])
def test_dropped_elements_of_the_binary_loss(held):
    probs, labels = jnp.array([held, 0.3]), jnp.array([held, 1.0])
    keep = jnp.array([False, True])
    value, pullback = jax.vjp(lambda p, y: BINARY(p, y, keep), probs, labels)
    np.testing.assert_allclose(value, [0, -np.log(0.3)], rtol=1e-6)
    by_probs, by_labels = pullback(jnp.ones(2))
    np.testing.assert_allclose(by_probs, [0, -1 / 0.3], rtol=1e-6)
    np.testing.assert_allclose(by_labels, [0, np.log(0.7 / 0.3)], rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-12, np.float64(1e-30)])
def test_an_epsilon_below_the_resolution_is_still_a_clip(epsilon):
    probs, labels = jnp.array([1.0, 0.0, 1.0, 7.0]), jnp.array([1.0, 0.0, 0.0, 0.0])
    value, gradient = jax.value_and_grad(
        lambda p: BINARY(p, labels, epsilon=epsilon).sum()
    )(probs)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[2:], 2.0**24, rtol=1e-6)


def test_a_row_without_mass_is_nan():
    value = CATEGORICAL(np.zeros((1, 3)), np.eye(3)[:1])
    assert np.isnan(value).all()


def test_labels_may_be_integers():
    value = CATEGORICAL([[0.25, 0.75]], [[0, 1]])
    np.testing.assert_allclose(value, [-np.log(0.75)], rtol=1e-6)
    np.testing.assert_allclose(BINARY([0.25], [1]), [-np.log(0.25)], rtol=1e-6)
