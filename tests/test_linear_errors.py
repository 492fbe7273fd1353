"""Every message of the linear head: function, argument, expected, got."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import LOSS, STATISTICS

pytestmark = pytest.mark.once

HIDDEN = np.zeros((2, 3, 4), np.float32)
KERNEL = np.zeros((4, 5), np.float32)
LABELS = np.zeros((2, 3), np.int32)
BATCH = "(2, 3) (hidden without axis 2)"
CLASSES = "(5,) (one value a class, as the kernel's columns)"

# Of both functions.
VALUES = [
    ({"hidden": np.float32(1)}, "hidden must have a last axis, got ()."),
    ({"kernel": KERNEL[:3]}, "kernel must have shape (4, V) (features of hidden, "
     "classes), got (3, 5)."),
    ({"kernel": KERNEL.T}, "kernel must have shape (4, V) (features of hidden, "
     "classes), got (5, 4); give kernel.T."),
    ({"labels": np.zeros((2, 3, 4), int)}, "labels must have shape (2, 3) (hidden "
     "without axis 2), got (2, 3, 4); several ids a row need label_probs."),
    ({"kernel": KERNEL[0]}, "kernel must have shape (4, V) (features of hidden, "
     "classes), got (5,)."),
    ({"kernel": KERNEL[None]}, "kernel must have shape (4, V) (features of hidden, "
     "classes), got (1, 4, 5)."),
    ({"kernel": KERNEL[:, :0]}, "kernel must have at least one class, got (4, 0)."),
    ({"labels": LABELS[0]}, f"labels must have shape {BATCH}, got (3,)."),
    ({"labels": LABELS[:, :1]}, f"labels must have shape {BATCH}, got (2, 1)."),
    ({"labels": LABELS[..., None]}, f"labels must have shape {BATCH}, got (2, 3, 1); "
     "take the axis of size 1 off with jnp.squeeze(labels, 2)."),
    ({"labels": np.zeros((2, 3, 5), int)}, f"labels must have shape {BATCH}, got "
     "(2, 3, 5); softmax_cross_entropy takes a target for every class."),
    ({"where": np.ones(3, bool)}, f"where must have shape {BATCH}, got (3,)."),
    ({"where": np.ones((2, 3, 5), bool)}, f"where must have shape {BATCH}, got "
     "(2, 3, 5)."),
    ({"where": np.bool_(True)}, f"where must have shape {BATCH}, got ()."),
    ({"class_mask": np.ones(4, bool)}, f"class_mask must have shape {CLASSES}, got "
     "(4,)."),
    ({"class_mask": np.ones((2, 3, 5), bool)}, f"class_mask must have shape {CLASSES}, "
     "got (2, 3, 5)."),
    ({"bias": np.zeros(4, np.float32)}, f"bias must have shape {CLASSES}, got (4,)."),
    ({"bias": np.zeros((1, 5), np.float32)}, f"bias must have shape {CLASSES}, got "
     "(1, 5)."),
    ({"bias": 0.0}, f"bias must have shape {CLASSES}, got ()."),
    ({"softcap": 0}, "softcap must lie in (0, inf), got 0."),
    ({"softcap": -30.0}, "softcap must lie in (0, inf), got -30.0."),
    ({"softcap": float("inf")}, "softcap must lie in (0, inf), got inf."),
    ({"softcap": float("nan")}, "softcap must lie in (0, inf), got nan."),
    ({"softcap": 1e39}, "softcap must lie in (0, inf) as a normal number of float32, "
     "got 1e+39."),
    ({"softcap": 1e-40}, "softcap must lie in (0, inf) as a normal number of float32, "
     "got 1e-40."),
    ({"softcap": 1e-36}, "softcap must be at least 9.9e-32 for float32, got 1e-36."),
    ({"softcap": jnp.ones(5)}, "softcap must be a scalar, got shape (5,)."),
    ({"class_block": 0}, "class_block must be at least 1, got 0."),
    ({"class_block": -1}, "class_block must be at least 1, got -1."),
]  # fmt: skip

TYPES = [
    ({"hidden": LABELS}, "hidden must have a floating dtype, got int32."),
    ({"hidden": HIDDEN * 1j}, "hidden must have a floating dtype, got complex64."),
    ({"kernel": LABELS}, "kernel must have a floating dtype, got int32."),
    ({"labels": LABELS.astype(np.float32)}, "labels must have an integer dtype (class "
     "ids), got float32; convert class ids with labels.astype(int32)."),
    ({"labels": np.zeros((2, 3, 5), np.float32)}, "labels must have an integer dtype "
     "(class ids), got float32; softmax_cross_entropy takes a target for every "
     "class."),
    ({"labels": LABELS > 0}, "labels must have an integer dtype (class ids), got "
     "bool; convert class ids with labels.astype(int32)."),
    ({"where": LABELS}, "where must have dtype bool, got int32; give "
     "where != 0."),
    ({"class_mask": np.ones(5, np.float32)}, "class_mask must have dtype bool, got "
     "float32; give class_mask != 0."),
    ({"bias": np.zeros(5, np.complex64)}, "bias must have a real dtype, got "
     "complex64."),
    ({"softcap": "30"}, "softcap must be a real number, got '30'."),
    ({"softcap": True}, "softcap must be a real number, got True."),
    ({"class_block": 2.0}, "class_block must be an integer, got 2.0."),
    ({"class_block": True}, "class_block must be an integer, got True."),
    ({"class_block": "8"}, "class_block must be an integer, got '8'."),
]  # fmt: skip

# Of the loss alone.
LOSS_VALUES = [
    ({"weights": np.ones(3, np.float32)}, f"weights must have shape {BATCH}, got "
     "(3,)."),
    ({"weights": 1.0}, f"weights must have shape {BATCH}, got ()."),
    ({"class_weights": np.ones(4, np.float32)}, f"class_weights must have shape "
     f"{CLASSES}, got (4,)."),
    ({"reduction": "none"}, "reduction must be None, 'mean' or 'sum', got 'none'."),
    ({"reduction": "avg"}, "reduction must be None, 'mean' or 'sum', got 'avg'."),
    ({"reduction": True}, "reduction must be None, 'mean' or 'sum', got True."),
    ({"label_smoothing": 1.1}, "label_smoothing must lie in [0, 1], got 1.1."),
    ({"label_smoothing": -0.1}, "label_smoothing must lie in [0, 1], got -0.1."),
    ({"label_smoothing": jnp.ones(2)}, "label_smoothing must be a scalar, got shape "
     "(2,)."),
    ({"z_loss": -1e-4}, "z_loss must lie in [0, inf), got -0.0001."),
    ({"z_loss": 1e39}, "z_loss must lie in [0, inf) as a normal number of float32, got "
     "1e+39."),
    ({"z_loss": float("nan")}, "z_loss must lie in [0, inf), got nan."),
    ({"row_block": 8}, "row_block must be None with reduction=None, which is blocked "
     "by class_block, got 8."),
    ({"reduction": "mean", "class_block": 8}, "class_block must be None with "
     "reduction='mean', which is blocked by row_block, got 8."),
    ({"reduction": "sum", "class_block": 8}, "class_block must be None with "
     "reduction='sum', which is blocked by row_block, got 8."),
    ({"reduction": "sum", "row_block": 0}, "row_block must be at least 1, got 0."),
]  # fmt: skip

LOSS_TYPES = [
    ({"weights": np.ones((2, 3), np.complex64)}, "weights must have a real dtype, got "
     "complex64."),
    ({"class_weights": np.ones(5, np.complex64)}, "class_weights must have a real "
     "dtype, got complex64."),
    ({"label_smoothing": "0.1"}, "label_smoothing must be a real number, got '0.1'."),
    ({"z_loss": None}, "z_loss must be a real number, got None."),
    ({"reduction": "mean", "row_block": 2.5}, "row_block must be an integer, got 2.5."),
    ({"reduction": "mean", "row_block": np.float32(2)}, "row_block must be an integer, "
     "got np.float32(2.0)."),
]  # fmt: skip

CASES = [
    *((LOSS, ValueError, *case) for case in VALUES + LOSS_VALUES),
    *((LOSS, TypeError, *case) for case in TYPES + LOSS_TYPES),
    *((STATISTICS, ValueError, *case) for case in VALUES),
    *((STATISTICS, TypeError, *case) for case in TYPES),
]


@pytest.mark.parametrize(("function", "kind", "changed", "message"), CASES)
def test_messages(function, kind, changed, message):
    arguments = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS} | changed
    expected = f"{function.__name__}: {message}"
    with pytest.raises(kind) as raised:
        function(**arguments)
    assert str(raised.value) == expected
    # The same at trace time.
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in arguments.items() if k not in arrays}
    with pytest.raises(kind) as raised:
        jax.eval_shape(functools.partial(function, **static), **arrays)
    assert str(raised.value) == expected


@pytest.mark.parametrize("function", [LOSS, STATISTICS])
def test_options_are_keywords(function):
    with pytest.raises(TypeError, match="positional"):
        function(HIDDEN, KERNEL, LABELS, np.zeros(5, np.float32))


def test_the_statistics_take_no_option_of_a_loss():
    for name in ("weights", "reduction", "label_smoothing", "z_loss", "row_block"):
        with pytest.raises(TypeError, match=name):
            STATISTICS(HIDDEN, KERNEL, LABELS, **{name: None})


def test_a_transposed_kernel_of_a_square_head_is_the_callers_affair():
    """[D, V] with D = V cannot be told from its transpose."""
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert LOSS(HIDDEN, square, LABELS).shape == (2, 3)


def test_lists_and_numpy_arrays_are_accepted():
    expected = np.log1p(np.e) - 1
    for hidden, kernel, labels in (
        ([[1.0]], [[0.0, 1.0]], [1]),
        (np.ones((1, 1)), np.array([[0.0, 1.0]]), np.array([1])),
        (np.ones((1, 1), np.float16), np.array([[0, 1]], np.float16), np.uint8([1])),
    ):
        for reduction in (None, "mean", "sum"):
            loss = LOSS(
                hidden, kernel, labels, bias=[0, 0], weights=[1], where=[True],
                class_weights=[1, 1], class_mask=[True, True], reduction=reduction,
            )  # fmt: skip
            assert loss.dtype == jnp.float32
            np.testing.assert_allclose(loss, np.reshape(expected, loss.shape), 1e-6)


def test_integer_row_weights_and_boolean_ones(rng):
    hidden = rng.standard_normal((3, 2)).astype(np.float32)
    kernel, labels = KERNEL[:2] + 1, np.array([0, 1, 2])
    for weights in (np.array([0, 1, 1]), np.array([False, True, True])):
        total = LOSS(hidden, kernel, labels, weights=weights, reduction="sum")
        np.testing.assert_allclose(total, 2 * np.log(5), rtol=1e-6)


def test_blocks_larger_than_the_input_are_cut():
    plain = LOSS(HIDDEN, KERNEL, LABELS)
    np.testing.assert_array_equal(
        plain, LOSS(HIDDEN, KERNEL, LABELS, class_block=10**9)
    )
    total = LOSS(HIDDEN, KERNEL, LABELS, reduction="sum", row_block=10**9)
    np.testing.assert_allclose(total, plain.sum(), rtol=1e-6)


def test_blocks_may_be_numpy_integers():
    for size in (np.int32(2), np.uint8(2)):
        by_rows = LOSS(HIDDEN, KERNEL, LABELS, reduction="sum", row_block=size)
        by_classes = LOSS(HIDDEN, KERNEL, LABELS, class_block=size)
        np.testing.assert_allclose(by_rows, by_classes.sum(), rtol=1e-6)


def test_a_layer_is_not_its_kernel():
    class Linear:
        kernel = KERNEL

    with pytest.raises(TypeError, match=r"got Linear \(.*\); give its kernel\.$"):
        LOSS(HIDDEN, Linear(), LABELS)
