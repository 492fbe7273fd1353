"""The cross-entropy with Sinkhorn targets, and the surrogate that codes train on."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from differences import differences

from xent_jax import (
    linearized_softmax_cross_entropy,
    sinkhorn_cross_entropy,
    sinkhorn_targets,
    softmax_cross_entropy,
)

EPSILON = np.float32(0.1)


def views(rng, samples=40, prototypes=7):
    logits, scores = rng.standard_normal((2, samples, prototypes)).astype(np.float32)
    return logits, scores / 2


@pytest.mark.parametrize("temperature", [1.0, np.float32(0.1)])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients(masked, temperature, rng):
    logits, scores = views(rng)
    keep = np.arange(40) % 3 > 0 if masked else None
    if masked:
        logits[0], logits[3], scores[6] = np.nan, np.inf, np.nan
    options = {"epsilon": EPSILON, "num_iters": 4, "where": keep}

    def total(logits, scores):
        loss = sinkhorn_cross_entropy(
            logits, scores, temperature=temperature, **options
        )
        return loss.sum(), loss

    slope = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (gradient, by_scores), loss = slope(logits, scores)
    truth = oracle.sinkhorn_cross_entropy(
        logits, scores, temperature=temperature, **options
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, truth.value, rtol=2e-6, atol=1e-6)
    scale = 1 / float(temperature)
    np.testing.assert_allclose(gradient, truth.gradient, atol=1e-6 * scale)
    assert not np.any(by_scores)
    if masked:
        assert not np.any(loss[~keep])
        assert not np.any(gradient[~keep])


def test_equals_the_dense_loss_of_the_targets(rng):
    logits, scores = views(rng)
    loss = sinkhorn_cross_entropy(logits, scores, tol=0.1, num_iters=20)
    targets = sinkhorn_targets(scores, tol=0.1, num_iters=20)
    np.testing.assert_array_equal(loss, softmax_cross_entropy(logits, targets))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_an_offset_of_the_logits_costs_no_digits(offset, rng):
    logits, scores = views(rng)
    logits = np.round(logits * 16) / 16 + np.float32(offset)  # exact with the offset
    loss = sinkhorn_cross_entropy(logits, scores, temperature=np.float32(0.07))
    truth = oracle.sinkhorn_cross_entropy(
        logits, scores, temperature=np.float32(0.07), epsilon=np.float32(0.05)
    )
    np.testing.assert_allclose(loss, truth.value, rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype, rng):
    logits, scores = (jnp.asarray(array, dtype) for array in views(rng))
    loss, gradient = jax.value_and_grad(
        lambda x: sinkhorn_cross_entropy(x, scores, temperature=0.1).sum()
    )(logits)
    wide = [array.astype(jnp.float32) for array in (logits, scores)]
    exact, slope = jax.value_and_grad(
        lambda x: sinkhorn_cross_entropy(x, wide[1], temperature=0.1).sum()
    )(wide[0])
    assert loss.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(loss, exact)
    np.testing.assert_array_equal(gradient, slope.astype(dtype))


def test_float64_and_mixed_dtypes(rng, x64):
    logits, scores = (array.astype(np.float64) for array in views(rng))
    truth = oracle.sinkhorn_cross_entropy(logits, scores, temperature=0.1)
    loss = sinkhorn_cross_entropy(logits, scores, temperature=0.1)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, truth.value, rtol=1e-13)
    narrow = jnp.asarray(logits, jnp.float32)
    mixed = sinkhorn_cross_entropy(narrow, scores, temperature=0.1)
    assert mixed.dtype == jnp.float64
    gradient = jax.grad(lambda x: sinkhorn_cross_entropy(x, scores).sum())(narrow)
    assert gradient.dtype == jnp.float32
    assert sinkhorn_cross_entropy(narrow, narrow).dtype == jnp.float32


def test_derivative_by_the_temperature(rng, x64):
    logits, scores = (array.astype(np.float64) for array in views(rng, 6, 4))
    scores[:, 1] -= 40  # so that a forbidden logit is no target
    truth = differences(
        lambda t: oracle.sinkhorn_cross_entropy(logits, scores, temperature=t).value,
        0.3,
    )
    for mode in (jax.jacfwd, jax.jacrev):
        slope = mode(lambda t: sinkhorn_cross_entropy(logits, scores, temperature=t))
        np.testing.assert_allclose(slope(0.3), truth, rtol=1e-8)
        forbidden = jnp.asarray(logits).at[2, 3].set(-jnp.inf)
        targets = jnp.full((6, 4), -jnp.inf).at[:, :3].set(0.0)
        targets = targets.at[0, 3].set(0.0)
        slope = mode(
            lambda t, x=forbidden, s=targets: sinkhorn_cross_entropy(
                x, s, temperature=t
            )
        )
        assert np.all(np.isfinite(slope(0.3)))


def test_special_logits(rng):
    logits, scores = views(rng, 5, 4)
    logits[1, 2], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
    logits[4, 1] = -np.inf
    loss = sinkhorn_cross_entropy(logits, scores, temperature=0.5, epsilon=1.0)
    assert np.isfinite(loss[0])
    assert np.all(np.isnan(loss[1:4]))
    # A target on a logit of −inf.
    assert loss[4] == np.inf


def test_reverse_mode_keeps_the_targets_once(rng):
    logits, scores = (jnp.asarray(array) for array in views(rng, 64, 32))
    for temperature in (1.0, 0.1):
        pullback = jax.vjp(
            lambda x, s, t=temperature: sinkhorn_cross_entropy(x, s, temperature=t),
            logits,
            scores,
        )[1]
        kept = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "size")]
        large = {id(leaf) for leaf in kept if leaf.size >= logits.size}
        assert len(large) == 2  # the (scaled) logits, and the targets


def trial(rng, steepness=1.0):
    """Logits and targets of the experiment that made the surrogate known."""
    logits = rng.random((128, 64)) ** 4
    logits = steepness * logits / logits.sum(1, keepdims=True)
    costs = rng.random((128, 64)) ** 1.5
    targets = sinkhorn_targets(
        jnp.asarray(-costs, jnp.float32), epsilon=0.5, num_iters=10
    )
    return jnp.asarray(logits, jnp.float32), targets


def bilinear(logits, targets):
    """The surrogate as it is usually written, without stop_gradient."""
    return ((jax.nn.softmax(logits) - targets) * logits).sum(-1).mean()


def test_the_two_losses_of_twenty_trials_lie_on_a_line(rng):
    pairs = [trial(rng) for _ in range(20)]
    first = np.array([softmax_cross_entropy(*pair).mean() for pair in pairs])
    second = np.array([bilinear(*pair) for pair in pairs])
    assert 4.1585 < first.min() < first.max() < 4.1596
    assert np.corrcoef(first, second)[0, 1] > 0.998
    assert 0.9 < np.polyfit(first, second, 1)[0] < 1.1


@pytest.mark.parametrize("steepness", [1.0, 100.0])
def test_their_difference_is_an_entropy(steepness, rng):
    logits, targets = trial(rng, steepness)
    first = softmax_cross_entropy(logits, targets)
    second = linearized_softmax_cross_entropy(logits, targets)
    x = np.asarray(logits, np.float64)
    log_p = x - x.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(1)
    np.testing.assert_allclose(first - second, entropy, atol=2e-6)


@pytest.mark.parametrize("steepness", [1.0, 100.0])
def test_the_gradients_agree_only_with_stop_gradient(steepness, rng):
    """P·(a − E_P a) adds up to 0 over the classes; its elements are not 0."""
    logits, targets = trial(rng, steepness)
    law = (jax.nn.softmax(logits) - targets) / 128
    stopped = jax.grad(lambda a: linearized_softmax_cross_entropy(a, targets).mean())
    np.testing.assert_allclose(stopped(logits), law, atol=2e-9)
    extra = jax.grad(bilinear)(logits, targets) - law
    p = jax.nn.softmax(logits)
    expected = p * (logits - (p * logits).sum(-1, keepdims=True)) / 128
    np.testing.assert_allclose(extra, expected, atol=2e-8)
    assert np.abs(extra.sum(-1)).max() < 1e-7
    largest = 0.02 if steepness == 1 else 0.3
    assert jnp.abs(extra).max() > largest * jnp.abs(law).max()
