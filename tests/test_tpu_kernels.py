"""The TPU kernels of the head, interpreted on a CPU, against a float64 oracle."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import relative_error
from jax.experimental.pallas import tpu as pltpu

import xent_jax
from xent_jax import _tpu_sum
from xent_jax._class_axis import ClassAxis
from xent_jax._label_terms import Coefficients
from xent_jax._tpu_sum import Head
from xent_jax._tpu_tiling import Tiling, fits, tiling_of

# Rows, features and classes; tiles of 128 classes and blocks of 32 rows.
SHAPES = [
    (1, 128, 1),
    (3, 128, 2),
    (16, 256, 128),
    (40, 128, 129),
    (33, 256, 384),
    (64, 128, 700),
]
TILING = Tiling(32, 16, 128, 0, interpret=True)
OPTIONS = [
    (),
    ("bias",),
    ("keep",),
    ("class_mask",),
    ("scale",),
    ("spread",),
    ("square",),
    ("spread", "class_weights"),
    ("spread", "class_mask"),
    ("spread", "class_mask", "class_weights", "keep"),
    ("bias", "keep", "scale", "spread", "square"),
    ("bias", "class_mask", "scale", "spread", "square", "class_weights", "keep"),
]


def head_of(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    options: tuple[str, ...] = (),
    dtype: Any = jnp.bfloat16,
    margin: float = 0.0,
) -> Head:
    """Returns arguments whose labels are ahead of all rivals by about a margin."""
    rows, features, classes = shape
    kept = max(1, classes - classes // 4)
    labels = rng.integers(0, kept if "class_mask" in options else classes, (rows, 1))
    kernel = 2 * rng.standard_normal((features, classes)) / np.sqrt(features)
    hidden = rng.standard_normal((rows, features))
    columns = kernel[:, labels[:, 0]].T
    hidden += margin * columns / np.sum(columns**2, axis=1, keepdims=True)
    numbers = {
        "keep": jnp.asarray(rng.random((rows, 1)) < 0.7),
        "scale": jnp.asarray(rng.uniform(0.5, 2.0, (rows, 1)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal((1, classes)), jnp.float32),
        "class_mask": jnp.arange(classes)[None] < kept,
        "class_weights": jnp.asarray(rng.uniform(0.5, 2, (1, classes)), jnp.float32),
    }
    coefficients = Coefficients(
        *(
            jnp.asarray(size * rng.uniform(0.5, 1, (rows, 1)), jnp.float32)
            if wanted
            else None
            for size, wanted in (
                (1 / rows, True),
                (0.1 / rows / classes, "spread" in options),
                (0.05 / rows, "square" in options),
            )
        )
    )
    return Head(
        jnp.asarray(hidden, jnp.bfloat16),
        jnp.asarray(kernel, dtype),
        jnp.asarray(labels, jnp.int32),
        *(numbers[name] if name in options else None for name in Head._fields[3:8]),
        coefficients,
    )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(tiling: Tiling, head: Head) -> Any:
    return _tpu_sum.value_and_gradients(tiling, head, ClassAxis(-1))


def truth_of(head: Head) -> tuple[float, list[np.ndarray]]:
    """Returns the sum, and its gradients by features, kernel and bias, in float64."""
    kernel = head.kernel.astype(jnp.bfloat16)
    head = jax.tree.map(lambda a: np.asarray(a, np.float64), head)
    kernel = np.asarray(kernel, np.float64)
    rows, classes = head.labels.shape[0], kernel.shape[1]
    scale = np.ones((rows, 1)) if head.scale is None else head.scale
    bias = 0 if head.bias is None else head.bias
    ones = np.ones((1, classes))
    weights = ones if head.class_weights is None else head.class_weights
    mask = ones if head.class_mask is None else head.class_mask
    keep = np.ones((rows, 1)) if head.keep is None else head.keep
    loss, spread, square = (0 if c is None else c * keep for c in head.coefficients)
    hidden = np.where(keep > 0, head.hidden, 0)
    plain = scale * (hidden @ kernel + bias)
    logits = np.where(mask > 0, plain, -np.inf)
    top = logits.max(axis=1, keepdims=True)
    normalizer = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    softmax = np.exp(logits - normalizer)
    hit = np.arange(classes)[None] == head.labels
    own = np.where(hit, plain, 0).sum(axis=1, keepdims=True)
    weights = weights * mask
    terms = (
        loss * np.log1p(np.where(hit, 0, np.exp(logits - own)).sum(1, keepdims=True))
        + spread * (weights * (normalizer - plain)).sum(axis=1, keepdims=True)
        + square * normalizer**2
    )
    # At the label p − 1 is minus the sum of the others, which float64 has digits for.
    rivals = np.where(hit, 0, softmax)
    centred = np.where(hit, -rivals.sum(axis=1, keepdims=True), rivals)
    slope = loss * centred + 2 * square * normalizer * softmax
    slope = scale * (slope + spread * (weights.sum() * softmax - weights))
    gradients = [slope @ kernel.T, hidden.T @ slope, slope.sum(axis=0, keepdims=True)]
    return float(terms.sum()), gradients


def assert_right(head: Head, result: Any, rtol: float = 6e-3) -> None:
    """Asserts value and gradients, these to the digits of half-precision numbers."""
    total, gradients = result
    truth, expected = truth_of(head)
    np.testing.assert_allclose(float(total), truth, rtol=2e-6, atol=1e-6)
    dtypes = head.hidden.dtype, head.kernel.dtype, jnp.float32
    for array, wanted, dtype in zip(gradients, expected, dtypes, strict=True):
        if array is None:
            assert head.bias is None
            continue
        assert array.dtype == dtype
        assert array.shape == wanted.shape
        size = max(np.linalg.norm(wanted), 1e-4)
        error = np.linalg.norm(np.asarray(array, np.float64) - wanted)
        assert error <= rtol * size


# Every option with two shapes, and every shape with four options.
PAIRS = [
    (SHAPES[(index + shift) % len(SHAPES)], options)
    for index, options in enumerate(OPTIONS)
    for shift in (0, 3)
]


@pytest.mark.parametrize(("shape", "options"), PAIRS, ids=str)
def test_equals_the_oracle(shape, options, rng):
    head = head_of(rng, shape, options)
    assert_right(head, value_and_gradients(TILING, head))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("shape", [(16, 128, 200), (70, 128, 300)], ids=str)
def test_gradient_has_the_dtype_of_the_kernel(shape, dtype, rng):
    head = head_of(rng, shape, ("bias",), dtype)
    assert_right(head, value_and_gradients(TILING, head))


def test_block_with_more_rows_than_features(rng):
    # Then the kernel's gradient does not leave over what is kept.
    tiling = TILING._replace(rows=160, row_chunk=80)
    head = head_of(rng, (300, 128, 300))
    assert_right(head, value_and_gradients(tiling, head))


def test_more_tiles_than_lanes(rng):
    head = head_of(rng, (5, 128, 128 * 130 + 3), ("spread",))
    assert_right(head, value_and_gradients(TILING, head))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((7, 128, 100), ("bias", "keep")),
        ((40, 128, 256), ("spread", "class_weights", "class_mask")),
        ((70, 128, 300), ()),
    ],
    ids=str,
)
def test_as_a_tpu_would_run_it(shape, options, rng):
    # Memory holds NaN until it is written to, and copies are apart from computation.
    tiling = TILING._replace(interpret=pltpu.InterpretParams())
    head = head_of(rng, shape, options)
    assert_right(head, value_and_gradients(tiling, head))


@pytest.mark.parametrize("margin", [20.0, 60.0, 80.0])
def test_confident_rows_keep_their_digits(margin, rng):
    head = head_of(rng, (40, 128, 300), margin=margin)
    total, (by_hidden, by_kernel, _) = value_and_gradients(TILING, head)
    truth, (hidden, kernel, _) = truth_of(head)
    assert 0 < truth < 1e-3
    np.testing.assert_allclose(float(total), truth, rtol=1e-4)
    assert relative_error(by_hidden, hidden) < 6e-3
    assert relative_error(by_kernel, kernel) < 6e-3


@pytest.mark.parametrize("margin", [-5.0, 0.0, 3.0, 30.0])
@pytest.mark.parametrize("shape", [(64, 128, 700), (256, 128, 130)], ids=str)
def test_errors_are_those_of_the_other_form(shape, margin, rng):
    head = head_of(rng, shape, margin=margin)
    weights = head.coefficients.loss[:, 0]
    labels = head.labels[:, 0]

    def loss(hidden, kernel):
        return xent_jax.linear_softmax_cross_entropy(
            hidden, kernel, labels, weights=weights, reduction="sum"
        )

    others = jax.grad(loss, (0, 1))(head.hidden, head.kernel)
    _, gradients = value_and_gradients(TILING, head)
    _, truth = truth_of(head)
    for ours, other, wanted in zip(gradients[:2], others, truth[:2], strict=True):
        assert relative_error(ours, wanted) <= 1.1 * relative_error(other, wanted)


def test_an_undefined_row_is_nan_alone(rng):
    head = head_of(rng, (40, 128, 200))
    head = head._replace(labels=head.labels.at[3].set(-1))
    total, (by_hidden, by_kernel, _) = value_and_gradients(TILING, head)
    assert np.isnan(total)
    assert np.isnan(by_kernel).all()
    finite = np.isfinite(np.asarray(by_hidden, np.float32)).all(axis=1)
    assert (finite == (np.arange(40) != 3)).all()
    keep = jnp.arange(40)[:, None] != 3
    dropped = head._replace(keep=keep)
    assert_right(dropped, value_and_gradients(TILING, dropped))


def test_label_of_a_dropped_class(rng):
    head = head_of(rng, (8, 128, 200), ("class_mask",))
    head = head._replace(labels=head.labels.at[2].set(199))
    total, (by_hidden, by_kernel, _) = value_and_gradients(TILING, head)
    assert total == np.inf
    assert np.isfinite(np.asarray(by_hidden, np.float32)).all()
    assert (np.asarray(by_kernel[:, 150:], np.float32) == 0).all()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_sizes_of_tiles(chip, itemsize):
    for rows, features, classes in [(1, 128, 1), (8519, 768, 50257), (40, 2048, 9000)]:
        tiling = tiling_of(rows, features, classes, chip, itemsize)
        blocks = -(-rows // tiling.rows)
        assert tiling.rows % tiling.row_chunk == 0
        assert blocks * tiling.rows - rows < 16 * blocks * (1 + tiling.rows // 512)
        assert tiling.classes % 128 == 0
        assert tiling.memory < 128 * 2**20
        assert fits(rows, features, classes, chip, itemsize)


@pytest.mark.parametrize(
    ("sizes", "chip"),
    [
        ((8, 128, 10), "TPU v4"),
        ((8, 128, 10), "cpu"),
        ((8, 100, 10), "TPU v6 lite"),
        ((0, 128, 10), "TPU v6 lite"),
        ((8, 128, 0), "TPU v6 lite"),
        ((8192, 65536, 1024), "TPU v6 lite"),
    ],
    ids=str,
)
def test_what_does_not_fit(sizes, chip):
    assert not fits(*sizes, chip)
