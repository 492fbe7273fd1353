"""Laws that hold for any input, with examples that hypothesis looks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xent_jax

pytestmark = pytest.mark.once

INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels
DENSE = xent_jax.softmax_cross_entropy
SIGMOID = xent_jax.sigmoid_binary_cross_entropy
ROWS, CLASSES = 3, 5

# Quarters, so that sums and shifts of logits are exact and a law is not blurred.
quarters = st.integers(-160, 160).map(lambda n: n / 4)
logits_of_rows = hnp.arrays(np.float32, (ROWS, CLASSES), elements=quarters)
ids_of_rows = hnp.arrays(np.int32, ROWS, elements=st.integers(0, CLASSES - 1))
eighths = st.integers(0, 16).map(lambda n: n / 8)
targets_of_rows = hnp.arrays(np.float32, (ROWS, CLASSES), elements=eighths)
masks = hnp.arrays(np.bool_, ROWS)


@jax.jit
def integer(logits, labels):
    value, pullback = jax.vjp(lambda x: INTEGER(x, labels), logits)
    return value, pullback(jnp.ones_like(value))[0]


@jax.jit
def dense(logits, labels):
    value, pullback = jax.vjp(lambda x: DENSE(x, labels), logits)
    return value, pullback(jnp.ones_like(value))[0]


@given(logits_of_rows, ids_of_rows, st.integers(-400, 400).map(lambda n: n / 4))
def test_shift_invariance(logits, ids, shift):
    for got, expected in zip(
        integer(logits + np.float32(shift), ids), integer(logits, ids), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@given(logits_of_rows, targets_of_rows, st.integers(-400, 400).map(lambda n: n / 4))
def test_shift_invariance_of_dense_targets(logits, targets, shift):
    for got, expected in zip(
        dense(logits + np.float32(shift), targets), dense(logits, targets), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@given(logits_of_rows, ids_of_rows, st.permutations(range(CLASSES)))
def test_permutation_equivariance(logits, ids, order):
    order = np.array(order)
    value, gradient = integer(logits, ids)
    moved_value, moved_gradient = integer(logits[:, order], np.argsort(order)[ids])
    np.testing.assert_allclose(moved_value, value, rtol=1e-6)
    np.testing.assert_allclose(moved_gradient, gradient[:, order], rtol=1e-6)


@given(logits_of_rows, ids_of_rows)
def test_gradient_rows_sum_to_zero(logits, ids):
    gradient = np.asarray(integer(logits, ids)[1], np.float64)
    largest = np.abs(gradient).max(-1)
    assert np.all(np.abs(gradient.sum(-1)) <= 1e-6 * largest + 1e-37)


@given(logits_of_rows, targets_of_rows)
def test_gradient_rows_of_any_targets_sum_to_zero(logits, targets):
    gradient = np.asarray(dense(logits, targets)[1], np.float64)
    scale = targets.sum(-1) + 1
    assert np.all(np.abs(gradient.sum(-1)) <= 1e-6 * scale)


@given(logits_of_rows, ids_of_rows)
def test_one_hot_targets_are_class_ids(logits, ids):
    one_hot = np.eye(CLASSES, dtype=np.float32)[ids]
    pairs = zip(dense(logits, one_hot), integer(logits, ids), strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-37)


@given(logits_of_rows, ids_of_rows, st.sampled_from([0.1, 0.5]))
def test_one_hot_targets_are_class_ids_with_options(logits, ids, smoothing):
    one_hot = np.eye(CLASSES, dtype=np.float32)[ids]
    weights = np.arange(1, CLASSES + 1, dtype=np.float32)
    options = {"label_smoothing": smoothing, "class_weights": weights, "z_loss": 0.1}
    np.testing.assert_allclose(
        DENSE(logits, one_hot, **options), INTEGER(logits, ids, **options), rtol=1e-5
    )


@given(hnp.arrays(np.float32, (ROWS, 2), elements=quarters), masks)
def test_two_classes_are_a_sigmoid(logits, answer):
    value = INTEGER(logits, answer.astype(np.int32))
    margin = logits[:, 1] - logits[:, 0]
    np.testing.assert_allclose(
        value, SIGMOID(margin, answer.astype(np.float32)), rtol=1e-6, atol=1e-37
    )


@given(logits_of_rows, ids_of_rows, masks)
def test_where_is_deleting_the_row(logits, ids, keep):
    value = INTEGER(logits, ids, where=keep)
    np.testing.assert_allclose(value[keep], INTEGER(logits[keep], ids[keep]), rtol=1e-6)
    assert not np.any(value[~keep])
    mean = xent_jax.weighted_mean(value, keep)
    truth = np.asarray(value)[keep].mean() if keep.any() else 0
    np.testing.assert_allclose(mean, truth, rtol=1e-6)


@given(logits_of_rows, ids_of_rows)
def test_jit_is_eager(logits, ids):
    np.testing.assert_allclose(
        jax.jit(INTEGER)(logits, ids), INTEGER(logits, ids), rtol=3e-7, atol=1e-37
    )


@given(logits_of_rows, targets_of_rows)
def test_vmap_is_a_batch(logits, targets):
    batch, mapped = DENSE(logits, targets), jax.vmap(DENSE)(logits, targets)
    np.testing.assert_allclose(mapped, batch, rtol=1e-6, atol=1e-37)


@given(logits_of_rows, targets_of_rows, st.integers(1, 8))
def test_the_loss_is_linear_in_the_targets(logits, targets, factor):
    value, gradient = dense(logits, targets)
    scaled = dense(logits, targets * np.float32(factor))
    np.testing.assert_allclose(scaled[0], value * factor, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scaled[1], gradient * factor, rtol=1e-5, atol=1e-6)


@given(logits_of_rows, ids_of_rows)
def test_nll_of_log_softmax(logits, ids):
    value = xent_jax.nll_loss(jax.nn.log_softmax(logits), ids)
    np.testing.assert_allclose(value, INTEGER(logits, ids), rtol=1e-5, atol=1e-5)


@given(logits_of_rows)
def test_minimum_is_at_the_softmax(logits):
    targets = np.asarray(jax.nn.softmax(logits))
    _, gradient = dense(logits, targets)
    np.testing.assert_allclose(gradient, 0, atol=5e-7)


@pytest.mark.parametrize("classes", [2, 10, 1024])
def test_equal_logits_give_the_logarithm_of_the_number_of_classes(classes):
    value, gradient = integer(np.full((1, classes), 7.0, np.float32), np.array([1]))
    np.testing.assert_allclose(value, np.log(classes), rtol=2e-7)
    uniform = np.full(classes, 1 / classes)
    uniform[1] -= 1
    np.testing.assert_allclose(gradient[0], uniform, rtol=2e-7)
