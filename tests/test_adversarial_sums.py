"""Rows that are made to round badly: the promise of 4 ulp holds for them too.

Widths are just below, at and just above every width at which the sum over the classes
changes its form on a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import xent_jax

WIDTHS = [2, 3, 10, 31, 32, 33, 47, 48, 49, 100, 128, 223, 224, 225, 255, 256, 257]
WIDTHS += [500, 640, 895, 896, 897, 1000, 1500, 1791, 1792, 1793, 2000, 3583, 3584]
WIDTHS += [3585, 4096, 7182, 7183, 14335, 14336, 14337, 32768, 50257]


def rivals_of(kind, classes, rng):
    """Returns rows of the logits of rivals, the best of which is 0."""
    rows = 24 if classes < 10_000 else 6
    place = np.arange(classes)
    low = rng.uniform(-20, 0, (rows, 1))
    rivals = {
        "one above equal": np.where(place == 1, 0.0, low * np.ones(classes)),
        "one above their sum": np.where(place == 1, 0.0, low / 4 - np.log(classes)),
        "equal": np.broadcast_to(low * 1e-3, (rows, classes)),
        "geometric": -place * rng.uniform(0, 2, (rows, 1)) * 30 / classes,
        "alternating": np.where(place % 2 == 0, 0.0, low) + rng.uniform(-1e-3, 0),
        "ties": np.where(rng.random((rows, classes)) < 0.3, 0.0, low),
        "normal": rng.standard_normal((rows, classes)),
        "wide": 6 * rng.standard_normal((rows, classes)),
        "ascending": np.sort(-rng.exponential(2.0, (rows, classes))),
        "descending": np.sort(-rng.exponential(2.0, (rows, classes)))[:, ::-1],
    }[kind]
    return rivals - rivals[:, 1:].max(-1, keepdims=True)


KINDS = [
    "one above equal",
    "one above their sum",
    "equal",
    "geometric",
    "alternating",
    "ties",
    "normal",
    "wide",
    "ascending",
    "descending",
]


@jax.jit
def value_and_gradient(logits, ids):
    def total(logits):
        losses = xent_jax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return losses, gradient[:, 0]


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("bfloat16", marks=pytest.mark.once),
        pytest.param("float16", marks=pytest.mark.once),
    ],
)
def test_the_loss_is_right_to_4_ulp(classes, dtype, rng):
    worst = {}
    for kind in KINDS:
        rivals = rivals_of(kind, classes, rng)
        leads = np.linspace(-8, 60 if dtype == "float32" else 8, len(rivals))
        logits = rivals.copy()
        logits[:, 0] = leads
        logits = jnp.asarray(logits, dtype)
        ids = jnp.zeros(len(rivals), jnp.int32)
        losses, slopes = value_and_gradient(logits, ids)
        truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
        error = oracle.ulp_error(losses, truth.value, "float32").max()
        slope = oracle.ulp_error(slopes, truth.gradient[:, 0], dtype).max()
        worst[kind] = error, slope / (4 if dtype == "float32" else 0.52)
    assert max(error for error, _ in worst.values()) <= 4, worst
    assert max(slope for _, slope in worst.values()) <= 1, worst


def test_the_row_that_was_13_ulp_off():
    logits = np.full((1, 640), -6.2374916, np.float32)
    logits[0, :2] = 5, 0
    losses, slopes = value_and_gradient(jnp.asarray(logits), jnp.zeros(1, jnp.int32))
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, np.zeros(1, int))
    assert oracle.ulp_error(losses, truth.value, "float32") <= 2
    assert oracle.ulp_error(slopes, truth.gradient[:, 0], "float32") <= 2
