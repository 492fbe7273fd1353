"""The accuracy that the package promises, against float64 or 50 digits.

An ulp is a unit in the last place of the result's dtype at the true value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import xent_jax

pytestmark = pytest.mark.once

INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels
UNIT_ROUNDOFF = 2.0**-24


def rows_with_margins(rng, rows, classes, scale, offset, margins):
    """Logits whose label is ahead of its best rival by the margins given."""
    logits = scale * rng.standard_normal((rows, classes))
    ids = rng.integers(0, classes, rows)
    hit = np.arange(classes) == ids[:, None]
    rivals = np.where(hit, -np.inf, logits).max(-1)
    return np.where(hit, (rivals + margins)[:, None], logits) + offset, ids, hit


def value_and_gradient(loss, logits, labels):
    def total(logits):
        losses = loss(logits, labels)
        return losses.sum(), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    return np.asarray(losses), np.asarray(gradient)


# Widths on both sides of where the reduction is folded, a prime, and very wide.
@pytest.mark.parametrize("classes", [2, 3, 10, 127, 1000, 2048, 2053, 32768, 1_000_000])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_integer_labels_float32(classes, offset, scale, rng):
    rows = int(np.clip(200_000 // classes, 4, 400))
    margins = np.linspace(-60, 80, rows)
    logits, ids, hit = rows_with_margins(rng, rows, classes, scale, offset, margins)
    logits = jnp.asarray(logits, jnp.float32)
    losses, gradient = value_and_gradient(INTEGER, logits, ids)
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
    assert oracle.ulp_error(losses, truth.value, "float32").max() <= 4
    label_error = oracle.ulp_error(gradient[hit], truth.gradient[hit], "float32")
    assert label_error.max() <= 4
    # Probabilities below the smallest normal float32 are flushed to 0 by XLA:CPU.
    tolerance = 4 * 2.0**-23 * np.abs(truth.gradient).max(-1, keepdims=True) + 1e-37
    assert np.all(np.abs(gradient - truth.gradient) <= tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("classes", [2, 10, 1000, 32768])
def test_integer_labels_narrow(dtype, classes, rng):
    # A float16 gradient holds e⁻¹⁴ at least; every other part is computed in float32.
    highest = 8 if dtype == "float16" else 60
    rows = int(np.clip(100_000 // classes, 4, 400))
    margins = np.linspace(-60, highest, rows)
    logits, ids, _ = rows_with_margins(rng, rows, classes, 1.0, 3.0, margins)
    logits = jnp.asarray(logits, dtype)
    losses, gradient = value_and_gradient(INTEGER, logits, ids)
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
    assert losses.dtype == np.float32
    assert oracle.ulp_error(losses, truth.value, "float32").max() <= 4
    normal = np.abs(truth.gradient) > (6.2e-5 if dtype == "float16" else 1e-36)
    error = oracle.ulp_error(gradient, truth.gradient, dtype)
    assert error[normal].max() <= 0.52


@pytest.mark.parametrize("classes", [3, 100])
def test_integer_labels_float64(classes, rng, x64):
    margins = np.linspace(-60, 80, 30)
    logits, ids, hit = rows_with_margins(rng, 30, classes, 1.0, 5.0, margins)
    losses, gradient = value_and_gradient(INTEGER, jnp.asarray(logits), ids)
    value, slope = oracle.exact_softmax_cross_entropy(logits, ids)
    assert oracle.ulp_error(losses, value, "float64").max() <= 4
    assert oracle.ulp_error(gradient[hit], slope[hit], "float64").max() <= 4


@pytest.mark.parametrize(
    "row",
    [
        [3e38, 3e38, -3e38],
        [3.4e38, 3.4e38, 3.4e38],
        [-3.4e38, -3.4e38, -3.4e38],
        [1e30, -1e30, 0.0],
        [2e4, -2e4, 2e4],
    ],
)
@pytest.mark.parametrize("label", [0, 1, 2])
def test_huge_logits(row, label):
    logits = jnp.asarray([row], jnp.float32)
    losses, gradient = value_and_gradient(INTEGER, logits, np.array([label]))
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, np.array([label]))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(losses, truth.value.astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(gradient, truth.gradient, rtol=1e-6)


@pytest.mark.parametrize("classes", [10, 1000, 2048])
def test_one_hot_targets(classes, rng):
    margins = np.linspace(-60, 80, 300)
    logits, ids, hit = rows_with_margins(rng, 300, classes, 1.0, 0.0, margins)
    logits = jnp.asarray(logits, jnp.float32)
    targets = hit.astype(np.float32)
    losses, gradient = value_and_gradient(
        xent_jax.softmax_cross_entropy, logits, targets
    )
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
    bound = (np.maximum(margins, 0) + 10) * UNIT_ROUNDOFF
    assert np.all(np.abs(losses / truth.value - 1) <= bound)
    assert np.all(np.abs(gradient[hit] / truth.gradient[hit] - 1) <= bound)


@pytest.mark.parametrize("classes", [10, 1000, 4096])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_soft_targets(classes, offset, rng):
    logits = 3 * rng.standard_normal((100, classes)) + offset
    logits = jnp.asarray(logits, jnp.float32)
    soft = rng.dirichlet(np.ones(classes), 100).astype(np.float32)
    # At its minimum, targets = softmax(logits), a loss is hardest to get right.
    at_minimum = oracle.softmax(logits).astype(np.float32)
    for targets in (soft, at_minimum, 2 * soft):
        losses, gradient = value_and_gradient(
            xent_jax.softmax_cross_entropy, logits, targets
        )
        truth = oracle.softmax_cross_entropy(logits, targets)
        # 4e-7 with the tree sums of today's XLA:CPU, a tenth more with jax 0.7.2's.
        np.testing.assert_allclose(losses, truth.value, rtol=5e-7)
        atol = 3e-7 * targets.sum(-1).max()
        np.testing.assert_allclose(gradient, truth.gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.9])
@pytest.mark.parametrize("classes", [10, 100_000])
def test_smoothing(smoothing, classes, rng):
    rows = 40 if classes == 10 else 4
    margins = np.linspace(-60, 80, rows)
    logits, ids, _ = rows_with_margins(rng, rows, classes, 1.0, 1e3, margins)
    logits = jnp.asarray(logits, jnp.float32)
    loss = functools.partial(INTEGER, label_smoothing=smoothing)
    losses, gradient = value_and_gradient(loss, logits, ids)
    truth = oracle.softmax_cross_entropy_with_integer_labels(
        logits, ids, label_smoothing=np.float64(np.float32(smoothing))
    )
    np.testing.assert_allclose(losses, truth.value, rtol=6e-7)
    np.testing.assert_allclose(gradient, truth.gradient, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sigmoid(dtype, rng):
    extent = 9 if dtype == "float16" else 80
    logits = jnp.asarray(np.linspace(-extent, extent, 20_001), dtype)
    for label in (0.0, 1.0):
        labels = np.full(logits.shape, label, np.float32)
        losses, gradient = value_and_gradient(
            xent_jax.sigmoid_binary_cross_entropy, logits, labels
        )
        truth = oracle.sigmoid_binary_cross_entropy(logits, labels)
        assert oracle.ulp_error(losses, truth.value, "float32").max() <= 3
        error = oracle.ulp_error(gradient, truth.gradient, dtype)
        assert error.max() <= (4 if dtype == "float32" else 0.52)


def test_sigmoid_soft_labels(rng):
    logits = jnp.asarray(3 * rng.standard_normal(20_000), jnp.float32)
    labels = rng.random(20_000).astype(np.float32)
    losses, gradient = value_and_gradient(
        xent_jax.sigmoid_binary_cross_entropy, logits, labels
    )
    truth = oracle.sigmoid_binary_cross_entropy(logits, labels)
    assert oracle.ulp_error(losses, truth.value, "float32").max() <= 3
    np.testing.assert_allclose(gradient, truth.gradient, rtol=0, atol=2.4e-7)


def test_rows_of_gradients_sum_to_zero_for_confident_rows(rng):
    # In peers the label of a confident row has no pull, while its rivals are pushed.
    margins = np.linspace(0, 60, 50)
    logits, ids, _ = rows_with_margins(rng, 50, 100, 1.0, 0.0, margins)
    _, gradient = value_and_gradient(INTEGER, jnp.asarray(logits, jnp.float32), ids)
    sums = gradient.astype(np.float64).sum(-1)
    assert np.all(np.abs(sums) <= 1e-6 * np.abs(gradient).max(-1))


# Logits that are computed under the same jit: XLA computes them anew for every sum, and
# contracts a product and a difference to one rounding in some of them only.
COMPUTED = {
    "divided": lambda x: x / 0.07,
    "scaled": lambda x: 3.3 * x,
    "capped": lambda x: 3 * jnp.tanh(x / 3),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("classes", [2, 10, 24, 100, 1000, 2048])
def test_logits_computed_on_the_way(name, classes, rng):
    compute = COMPUTED[name]
    values = rng.standard_normal((64, classes)).astype(np.float32)
    ids, keep = rng.integers(0, classes, 64), rng.random(64) < 0.7
    one_hot = np.eye(classes, dtype=np.float32)[ids]
    logits = np.asarray(compute(jnp.asarray(values)), np.float64)
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids, where=keep)

    @jax.jit
    def losses(values, keep):
        return (
            INTEGER(compute(values), ids, where=keep),
            xent_jax.softmax_cross_entropy(compute(values), one_hot, where=keep),
        )

    for loss in losses(values, keep):
        # A logit's own rounding is an ulp of it.
        np.testing.assert_allclose(
            loss, truth.value, rtol=1e-5, atol=1e-6 * np.abs(logits).max()
        )


@pytest.mark.parametrize("reduction", ["sum", None])
def test_capped_head_with_blocks_that_do_not_divide(reduction, rng):
    hidden = rng.standard_normal((16, 6)).astype(np.float32)
    kernel = rng.standard_normal((6, 24)).astype(np.float32)
    ids = rng.integers(0, 24, 16)
    options = {"softcap": 3.0, "reduction": reduction}
    truth = oracle.linear_softmax_cross_entropy(hidden, kernel, ids, **options)
    block = {"row_block": 5} if reduction else {"class_block": 7}
    loss = jax.jit(
        lambda h, k: xent_jax.linear_softmax_cross_entropy(
            h, k, ids, **options, **block
        )
    )(hidden, kernel)
    np.testing.assert_allclose(loss, truth.value, rtol=1e-5)
