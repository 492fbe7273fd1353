"""K class ids a row with probabilities: a sum of losses of class ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened

import xent_jax

SPARSE = xent_jax.softmax_cross_entropy_with_sparse_targets
IDS = xent_jax.softmax_cross_entropy_with_integer_labels
HEAD = xent_jax.linear_softmax_cross_entropy


def targets(rng, rows, classes, count):
    """Returns ids, some of them padding and some repeated, and probabilities."""
    indices = rng.integers(-1, classes, (rows, count))
    indices[: rows // 2] = indices[: rows // 2, :1]
    probs = rng.dirichlet(np.ones(count), rows)
    return indices, np.where(indices < 0, 0, probs)


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(
    ("classes", "count", "rows"),
    shortened(
        [(2, 1, 3), (2, 5, 4), (37, 8, 5), (257, 33, 6), (4001, 64, 3), (9, 2, 0)],
        kept=[(2, 5, 4), (37, 8, 5), (9, 2, 0)],
    ),
)
def test_equals_the_oracle(classes, count, rows, dtype, rng):
    logits = jnp.asarray(3 * rng.standard_normal((rows, classes)), dtype)
    indices, probs = targets(rng, rows, classes, count)
    exact = np.asarray(logits).astype(np.float64)
    probs = probs.astype(np.float32)
    weights = rng.uniform(0.5, 2, classes).astype(np.float32)
    keep = {
        "all": None,
        "rows": rng.random(rows) < 0.6,
        "classes": rng.random((rows, classes)) < 0.8,
    }
    for where in keep.values():
        for options in ({}, {"label_smoothing": 0.1, "class_weights": weights}):
            truth = oracle.softmax_cross_entropy_with_sparse_targets(
                exact, indices, probs, where=where, **options
            )
            run = functools.partial(SPARSE, where=where, **options)
            loss = jax.jit(run)(logits, indices, probs)
            assert loss.dtype == jnp.float32
            np.testing.assert_allclose(loss, truth.value, rtol=3e-6, atol=1e-6)
            gradients = jax.jit(
                jax.grad(lambda x, p, run=run: run(x, indices, p).sum(), (0, 1))
            )(logits, probs)
            assert gradients[0].dtype == logits.dtype
            rounding = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                np.asarray(gradients[0], np.float64),
                truth.gradient,
                rtol=max(0.52 * rounding, 1e-5),
                atol=1e-6,
            )
            np.testing.assert_allclose(
                gradients[1], truth.label_gradient, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("margin", [-60.0, 0.0, 20.0, 80.0])
def test_one_certain_id_is_that_id(margin, padding, rng):
    """Bit for bit, in a confident row too, whose gradient keeps its digits."""
    logits = rng.standard_normal((5, 11)).astype(np.float32)
    labels = rng.integers(0, 11, 5)
    logits[np.arange(5), labels] += np.float32(margin)
    indices = np.full((5, 1 + padding), -1)
    probs = np.zeros((5, 1 + padding), np.float32)
    indices[:, padding], probs[:, padding] = labels, 1
    sparse = jax.value_and_grad(lambda x: SPARSE(x, indices, probs).sum())
    ids = jax.value_and_grad(lambda x: IDS(x, labels).sum())
    for one, other in zip(sparse(logits), ids(logits), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_largest_logit_need_not_be_the_most_probable(rng):
    """A target that wins without being left out of the normalizer."""
    logits = np.zeros((1, 7), np.float32)
    logits[0, 3] = 25
    indices, probs = np.array([[2, 3]]), np.array([[0.6, 0.4]], np.float32)
    loss, gradient = jax.value_and_grad(lambda x: SPARSE(x, indices, probs).sum())(
        logits
    )
    truth = oracle.softmax_cross_entropy_with_sparse_targets(logits, indices, probs)
    np.testing.assert_allclose(loss, truth.value.sum(), rtol=2e-7)
    np.testing.assert_allclose(gradient, truth.gradient, rtol=1e-6)


def test_special_values():
    inf, nan = np.inf, np.nan
    logits = np.array(
        [[0, 1, -inf], [0, 1, -inf], [0, nan, 1], [0, inf, 1], [-inf] * 3, [0, 1, 2]]
    )
    logits = jnp.asarray(logits, jnp.float32)
    indices = jnp.array([[0, 2], [2, 2], [0, 2], [0, 1], [0, 1], [0, 5]])
    probs = jnp.array(
        [[1, 0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    )
    loss = SPARSE(logits, indices, probs)
    np.testing.assert_array_equal(
        np.isnan(loss), [False, False, True, True, True, True]
    )
    assert np.isfinite(loss[0])
    assert loss[1] == inf
    gradient = jax.jacrev(lambda x: SPARSE(x, indices, probs))(logits)
    rows = np.asarray(gradient)[np.arange(6), np.arange(6)]
    assert np.all(np.isfinite(rows[:2]))
    assert np.all(np.isnan(rows[2:]))
    # A dropped row is 0 whatever it holds, its ids included.
    keep = np.array([True, False, False, False, False, False])
    value, (by_logits, by_probs) = jax.value_and_grad(
        lambda x, p: SPARSE(x, indices, p, where=keep).sum(), (0, 1)
    )(logits, probs)
    assert np.isfinite(value)
    assert not np.any(by_logits[1:])
    assert not np.any(by_probs[1:])


def test_the_mass_of_a_dropped_class_does_not_count(rng):
    logits = rng.standard_normal((1, 4)).astype(np.float32)
    where = np.array([[True, True, False, True]])
    loss = SPARSE(logits, np.array([[0, 2]]), np.array([[0.5, 0.5]]), where=where)
    half = IDS(logits, np.array([0]), where=where) / 2
    np.testing.assert_allclose(loss, half, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, (0, 2)])
def test_axes(axis, rng):
    logits = rng.standard_normal((3, 4, 5)).astype(np.float32)
    axes = (axis,) if isinstance(axis, int) else axis
    batch = [k for k in range(3) if k not in axes]
    last = logits.transpose((*batch, *axes)).reshape(
        *(logits.shape[k] for k in batch), -1
    )
    shape = (*last.shape[:-1], 2)
    indices = rng.integers(0, last.shape[-1], shape)
    probs = rng.random(shape).astype(np.float32)
    loss = SPARSE(logits, indices, probs, axis=axis)
    np.testing.assert_allclose(loss, SPARSE(last, indices, probs), rtol=1e-6)


@pytest.mark.parametrize("reduction", shortened([None, "mean", "sum"], kept=["mean"]))
@pytest.mark.parametrize("count", shortened([1, 5, 40], kept=[5]))
def test_heads_equal_given_logits(count, reduction, rng, unoptimized):
    hidden = rng.standard_normal((7, 6)).astype(np.float32)
    kernel = rng.standard_normal((6, 53)).astype(np.float32)
    indices, probs = targets(rng, 7, 53, count)
    probs, rows = probs.astype(np.float32), rng.random(7).astype(np.float32)
    mask = np.arange(53) < 50
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    options["class_weights"] = rng.uniform(0.5, 2, 53).astype(np.float32)
    block = {"class_block": 16} if reduction is None else {"row_block": 3}

    def head(hidden, kernel, probs):
        return HEAD(
            hidden,
            kernel,
            indices,
            label_probs=probs,
            weights=rows,
            class_mask=mask,
            reduction=reduction,
            **options,
            **block,
        )

    def given(hidden, kernel, probs):
        where = np.broadcast_to(mask, (7, 53))
        loss = rows * SPARSE(hidden @ kernel, indices, probs, where=where, **options)
        if reduction == "mean":
            return loss.sum() / rows.sum()
        return loss if reduction is None else loss.sum()

    arguments = hidden, kernel, probs
    np.testing.assert_allclose(head(*arguments), given(*arguments), rtol=1e-5)
    by_all = (0, 1, 2)
    gradients = [
        jax.jit(jax.grad(lambda *all_, f=f: f(*all_).sum(), by_all))(*arguments)
        for f in (head, given)
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_reverse_mode_keeps_no_targets_of_the_logits_size(rng):
    """Neither the value nor the gradient has an array of targets."""
    logits = jnp.zeros((64, 4096), jnp.bfloat16)
    indices, probs = jnp.zeros((64, 8), jnp.int32), jnp.ones((64, 8))
    run = jax.jit(jax.value_and_grad(lambda x: SPARSE(x, indices, probs).sum()))
    memory = run.lower(logits).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * logits.nbytes
