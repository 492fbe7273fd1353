"""Any number of rows of few classes, which a CPU computes on two axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened

import xent_jax
from xent_jax._reductions import vectors

ids_loss, dense_loss = (
    xent_jax.softmax_cross_entropy_with_integer_labels,
    xent_jax.softmax_cross_entropy,
)


def mean_of_ids(logits, ids):
    return ids_loss(logits, ids).mean()


@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("rows", [4096, 4161, 4099])
def test_no_loop_with_an_exponential_asks_whether_a_row_exists(rows, classes):
    """4161 is 3 · 19 · 73, and 4099 is prime."""
    logits = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = jax.jit(jax.value_and_grad(mean_of_ids)).lower(logits, ids)
    text = program.compile().as_text()
    found = re.findall(r"f32\[([\d,]+)\]\S* (?:exponential|log|log-plus-one)\(", text)
    shapes = {tuple(map(int, shape.split(","))) for shape in found}
    slices = {shape for shape in shapes if shape[-1] == 1}
    assert slices
    inner = {shape[-2] for shape in slices}
    assert max(inner) <= vectors._MOST_INNER
    # Lanes and gradients have an inner loop over classes.
    assert all(len(shape) == 2 for shape in shapes - slices)


@pytest.mark.parametrize("shape", [(8, 64, 64), (2, 4099)])
def test_rows_that_are_on_two_axes_keep_them(shape):
    """XLA:CPU does not fuse over a change of shape."""
    logits = jax.ShapeDtypeStruct((*shape, 21), jnp.float32)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    program = jax.jit(jax.value_and_grad(mean_of_ids)).lower(logits, ids)
    logits_type = re.escape(f"tensor<{'x'.join(map(str, logits.shape))}xf32>")
    assert not re.search(rf"reshape .*\({logits_type}\)", program.as_text())


@pytest.mark.parametrize(
    ("shape", "classes"),
    shortened(
        [((4096,), 3), ((4099,), 10), ((6, 691), 2), ((4099, 1), 40)],
        kept=[((6, 691), 2)],
    ),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_on_two_axes_equal_the_oracle(shape, classes, dtype, rng):
    logits = (3 * rng.standard_normal((*shape, classes))).astype(jnp.dtype(dtype))
    ids = rng.integers(0, classes, shape)
    keep = rng.random(shape) < 0.7
    weights = rng.random(classes).astype(np.float32)
    options = {"where": keep, "class_weights": weights, "label_smoothing": 0.1}
    targets = rng.random((*shape, classes)).astype(np.float32)
    for name, labels, given in (
        ("softmax_cross_entropy_with_integer_labels", ids, options),
        ("softmax_cross_entropy_with_integer_labels", ids, {}),
        ("softmax_cross_entropy", targets, options),
    ):
        loss, true_loss = getattr(xent_jax, name), getattr(oracle, name)

        @jax.jit
        def both(logits, loss=loss, labels=labels, given=given):
            losses, pull = jax.vjp(lambda x: loss(x, labels, **given), logits)
            return losses, pull(jnp.ones_like(losses))[0]

        truth = true_loss(logits, labels, **given)
        losses, slopes = both(logits)
        np.testing.assert_allclose(losses, truth.value, rtol=2e-6, atol=1e-6)
        rounding = 1e-6 if dtype == "float32" else 2.0**-8
        np.testing.assert_allclose(
            np.asarray(slopes, np.float64), truth.gradient, rtol=rounding, atol=2e-6
        )


def test_few_rows_are_left_as_they_are():
    """Also a number of rows that is not known."""
    few = jnp.zeros((4095, 3))
    assert vectors.in_vectors(lambda x: x + 1, few).shape == (4095, 3)
    (rows,) = jax.export.symbolic_shape("rows")
    logits = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    exported = jax.export.export(jax.jit(mean_of_ids))(logits, ids)
    value = exported.call(jnp.zeros((4099, 3)), jnp.zeros(4099, jnp.int32))
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
