"""Every message: function, argument, what was expected, what came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xent_jax

pytestmark = pytest.mark.once

INTEGER = "softmax_cross_entropy_with_integer_labels"
DENSE = "softmax_cross_entropy"
SIGMOID = "sigmoid_binary_cross_entropy"
LINEARIZED = "linearized_softmax_cross_entropy"
SINKHORN = "sinkhorn_targets"
SINKHORN_LOSS = "sinkhorn_cross_entropy"
LOGITS = np.zeros((5, 3), np.float32)
IDS = np.zeros(5, np.int32)
SAME = "labels must have shape (5, 3) (that of logits), got "
IDS_GO_TO = "; softmax_cross_entropy_with_integer_labels takes class ids."
DENSE_TAKES = "; softmax_cross_entropy takes a target for every class."

SHAPES = [
    (INTEGER, [LOGITS, IDS[:1]], {}, "labels must have shape (5,) (logits without "
     "axis 1), got (1,)."),
    (INTEGER, [LOGITS, IDS[:, None]], {}, "labels must have shape (5,) (logits without "
     "axis 1), got (5, 1); take the axis of size 1 off with jnp.squeeze(labels, 1)."),
    (INTEGER, [LOGITS, LOGITS.astype(int)], {}, "labels must have shape (5,) (logits "
     "without axis 1), got (5, 3)" + DENSE_TAKES),
    ("nll_loss", [LOGITS, LOGITS.astype(int)], {}, "labels must have shape (5,) "
     "(log_probs without axis 1), got (5, 3)" + DENSE_TAKES),
    ("nll_loss", [LOGITS, IDS[:3, None].T, 0], {}, "labels must have shape (3,) "
     "(log_probs without axis 0), got (1, 3); take the axis of size 1 off with "
     "jnp.squeeze(labels, 0)."),
    (INTEGER, [LOGITS, IDS[:1, None], (0, 1)], {}, "labels must have shape () (logits "
     "without axes 0, 1), got (1, 1); take the axis of size 1 off with "
     "jnp.squeeze(labels, (0, 1))."),
    (INTEGER, [LOGITS, IDS, 0], {}, "labels must have shape (3,) (logits without "
     "axis 0), got (5,)."),
    (INTEGER, [LOGITS, IDS, (0, 1)], {}, "labels must have shape () (logits without "
     "axes 0, 1), got (5,)."),
    (INTEGER, [LOGITS[:1], IDS], {}, "labels must have shape (1,) (logits without "
     "axis 1), got (5,)."),
    (DENSE, [LOGITS, LOGITS[0]], {}, SAME + "(3,)."),
    (DENSE, [LOGITS, LOGITS[:1]], {}, SAME + "(1, 3)."),
    (DENSE, [LOGITS, IDS], {}, SAME + "(5,)" + IDS_GO_TO),
    (DENSE, [LOGITS, IDS[:, None]], {}, SAME + "(5, 1)" + IDS_GO_TO),
    (DENSE, [LOGITS, LOGITS[None]], {}, SAME + "(1, 5, 3)."),
    (LINEARIZED, [LOGITS, IDS], {}, SAME + "(5,)" + IDS_GO_TO),
    (SIGMOID, [LOGITS[:, :1], LOGITS[:, 0]], {}, "labels must have shape (5, 1) (that "
     "of logits), got (5,)."),
    ("nll_loss", [LOGITS, IDS[:2]], {}, "labels must have shape (5,) (log_probs "
     "without axis 1), got (2,)."),
    ("categorical_cross_entropy", [LOGITS, IDS], {}, "labels must have shape (5, 3) "
     "(that of probs), got (5,); nll_loss of jnp.log(probs) takes class ids."),
    ("binary_cross_entropy", [LOGITS, IDS], {}, "labels must have shape (5, 3) "
     "(that of probs), got (5,)."),
    (INTEGER, [np.ones((2, 5, 6, 7)), np.zeros((2, 6, 7), int)], {}, "labels must have "
     "shape (2, 5, 6) (logits without axis 3), got (2, 6, 7); for classes on axis 1 "
     "give axis=1."),
    ("weighted_mean", [IDS.astype(np.float32), np.ones((5, 1))], {}, "weights must "
     "have shape (5,) (that of values), got (5, 1)."),
    (INTEGER, [LOGITS, IDS], {"where": np.ones((5, 1), bool)}, "where must have shape "
     "(5,) (logits without axis 1) or (5, 3) (that of logits), got (5, 1); "
     "give jnp.broadcast_to(where, logits.shape)."),
    (DENSE, [LOGITS, LOGITS], {"where": np.ones(3, bool)}, "where must have shape "
     "(5,) (logits without axis 1) or (5, 3) (that of logits), got (3,); "
     "give jnp.broadcast_to(where, logits.shape)."),
    (SIGMOID, [LOGITS, LOGITS], {"where": np.ones(5, bool)}, "where must have shape "
     "(5, 3) (that of logits), got (5,)."),
    ("binary_cross_entropy", [LOGITS, LOGITS], {"where": np.ones(5, bool)}, "where "
     "must have shape (5, 3) (that of probs), got (5,)."),
    (INTEGER, [LOGITS, IDS], {"class_weights": np.ones(5)}, "class_weights must have "
     "shape (3,) (one number a class), got (5,)."),
    (DENSE, [LOGITS, LOGITS], {"class_weights": np.ones((1, 3))}, "class_weights must "
     "have shape (3,) (one number a class), got (1, 3)."),
    (SIGMOID, [LOGITS, LOGITS], {"pos_weight": np.ones(5)}, "pos_weight must have "
     "a shape that broadcasts to (5, 3) (that of logits), got (5,)."),
    (SIGMOID, [LOGITS[0], LOGITS[0]], {"pos_weight": np.ones((1, 3))}, "pos_weight "
     "must have a shape that broadcasts to (3,) (that of logits), got (1, 3)."),
    (SIGMOID, [LOGITS[:, :1], LOGITS[:, :1]], {"pos_weight": np.ones(3)}, "pos_weight "
     "must have a shape that broadcasts to (5, 1) (that of logits), got (3,)."),
    (INTEGER, [np.zeros((2, 0), np.float32), IDS[:2]], {}, "logits must have at least "
     "one class, got (2, 0)."),
    (DENSE, [np.zeros((0, 2), np.float32), np.zeros((0, 2)), 0], {}, "logits must have "
     "at least one class, got (0, 2)."),
]  # fmt: skip

VALUES = [
    (INTEGER, [LOGITS, IDS, 2], {}, "axis must name different axes of a 2-dimensional "
     "array, got 2."),
    (INTEGER, [LOGITS, IDS, -3], {}, "axis must name different axes of a 2-dimensional "
     "array, got -3."),
    (DENSE, [LOGITS, LOGITS, (1, -1)], {}, "axis must name different axes of a "
     "2-dimensional array, got (1, -1)."),
    (DENSE, [LOGITS, LOGITS, ()], {}, "axis must name different axes of a "
     "2-dimensional array, got ()."),
    (INTEGER, [np.float32(1), np.int32(0)], {}, "logits must have a class axis, got "
     "()."),
    (DENSE, [np.float32(1), np.float32(1), None], {}, "logits must have a class axis, "
     "got ()."),
    (LINEARIZED, [np.float32(1), 1.0], {}, "logits must have a class axis, got ()."),
    ("nll_loss", [np.float32(1), 0], {}, "log_probs must have a class axis, got ()."),
    ("categorical_cross_entropy", [np.float32(1), 1.0], {}, "probs must have a class "
     "axis, got ()."),
    (INTEGER, [LOGITS, IDS], {"z_loss": 1e39}, "z_loss must lie in [0, inf) as a "
     "normal number of float32, got 1e+39."),
    (DENSE, [LOGITS.astype(jnp.bfloat16), LOGITS], {"z_loss": 2**128}, "z_loss must "
     "lie in [0, inf) as a normal number of float32, got " + f"{2**128}."),
    ("categorical_cross_entropy", [LOGITS, LOGITS], {"epsilon": 1e-46}, "epsilon must "
     "lie in (0, 0.5) as a normal number of float32, got 1e-46."),
    ("binary_cross_entropy", [LOGITS, LOGITS], {"epsilon": 1e-40}, "epsilon must lie "
     "in (0, 0.5) as a normal number of float32, got 1e-40."),
    ("binary_cross_entropy", [LOGITS, LOGITS], {"epsilon": 0.499999999}, "epsilon must "
     "lie in (0, 0.5) as a normal number of float32, got 0.499999999."),
    (SINKHORN, [LOGITS], {"epsilon": 1e39}, "epsilon must lie in (0, inf) as a normal "
     "number of float32, got 1e+39."),
    (SINKHORN, [LOGITS], {"epsilon": 1e-46}, "epsilon must lie in (0, inf) as a normal "
     "number of float32, got 1e-46."),
    (SINKHORN, [LOGITS], {"tol": 1e39}, "tol must lie in [0, inf) as a normal number "
     "of float32, got 1e+39."),
    (SINKHORN, [LOGITS], {"prior": [1, 1e-46, 2]}, "prior must be positive and finite "
     "as normal numbers of float32, got 1e-46."),
    (SINKHORN, [LOGITS], {"prior": [1, 1e39, 2]}, "prior must be positive and finite "
     "as normal numbers of float32, got 1e+39."),
    (SINKHORN, [LOGITS], {"prior": [1e-30, 1e30, 1.0]}, "prior must have shares of its "
     "sum that are normal numbers of float32, got 1e-30."),
    (SINKHORN_LOSS, [LOGITS, LOGITS], {"temperature": 1e-46}, "temperature must lie in "
     "(0, inf) as a normal number of float32, got 1e-46."),
    (SINKHORN_LOSS, [LOGITS, LOGITS], {"temperature": 1e39}, "temperature must lie in "
     "(0, inf) as a normal number of float32, got 1e+39."),
    (SINKHORN_LOSS, [LOGITS, LOGITS], {"epsilon": 1e-40}, "epsilon must lie in (0, "
     "inf) as a normal number of float32, got 1e-40."),
    (INTEGER, [LOGITS, IDS], {"label_smoothing": 1.5}, "label_smoothing must lie in "
     "[0, 1], got 1.5."),
    (INTEGER, [LOGITS, IDS], {"label_smoothing": float("nan")}, "label_smoothing must "
     "lie in [0, 1], got nan."),
    (SIGMOID, [LOGITS, LOGITS], {"label_smoothing": -0.1}, "label_smoothing must lie "
     "in [0, 1], got -0.1."),
    (DENSE, [LOGITS, LOGITS], {"z_loss": -1}, "z_loss must lie in [0, inf), got -1."),
    (DENSE, [LOGITS, LOGITS], {"z_loss": jnp.ones(2)}, "z_loss must be a scalar, got "
     "shape (2,)."),
    ("categorical_cross_entropy", [LOGITS, LOGITS], {"epsilon": 0.5}, "epsilon must "
     "lie in (0, 0.5), got 0.5."),
    ("binary_cross_entropy", [LOGITS, LOGITS], {"epsilon": 0}, "epsilon must lie in "
     "(0, 0.5), got 0."),
    (SINKHORN, [LOGITS], {"epsilon": 0.0}, "epsilon must lie in (0, inf), got 0.0."),
    (SINKHORN, [LOGITS], {"epsilon": -0.05}, "epsilon must lie in (0, inf), got "
     "-0.05."),
    (SINKHORN, [LOGITS], {"epsilon": float("nan")}, "epsilon must lie in (0, inf), got "
     "nan."),
    (SINKHORN, [LOGITS], {"num_iters": 0}, "num_iters must be at least 1, got 0."),
    (SINKHORN, [LOGITS], {"num_iters": -3}, "num_iters must be at least 1, got -3."),
    (SINKHORN, [LOGITS], {"tol": -1e-3}, "tol must lie in [0, inf), got -0.001."),
    (SINKHORN, [LOGITS], {"prior": np.array([1, 0, 2])}, "prior must be positive and "
     "finite, got 0.0."),
    (SINKHORN, [LOGITS], {"prior": [1.0, 2.0, -1.0]}, "prior must be positive and "
     "finite, got -1.0."),
    (SINKHORN, [LOGITS], {"prior": np.array([1, np.inf, 2])}, "prior must be positive "
     "and finite, got inf."),
    (SINKHORN, [LOGITS], {"prior": jnp.array([1, jnp.nan, 2])}, "prior must be "
     "positive and finite, got nan."),
    (SINKHORN_LOSS, [LOGITS, LOGITS], {"temperature": 0}, "temperature must lie in (0, "
     "inf), got 0."),
    (SINKHORN_LOSS, [LOGITS, LOGITS], {"temperature": -1.0}, "temperature must lie in "
     "(0, inf), got -1.0."),
    (SINKHORN_LOSS, [LOGITS, LOGITS], {"epsilon": 0}, "epsilon must lie in (0, inf), "
     "got 0."),
]  # fmt: skip

TYPES = [
    (INTEGER, [IDS[:, None], IDS], {}, "logits must have a floating dtype, got int32."),
    (DENSE, [IDS[:, None] > 0, LOGITS], {}, "logits must have a floating dtype, got "
     "bool."),
    (SIGMOID, [IDS, IDS], {}, "logits must have a floating dtype, got int32."),
    ("nll_loss", [IDS[:, None], IDS], {}, "log_probs must have a floating dtype, got "
     "int32."),
    ("categorical_cross_entropy", [IDS[:, None], LOGITS], {}, "probs must have a "
     "floating dtype, got int32."),
    ("binary_cross_entropy", [IDS, IDS], {}, "probs must have a floating dtype, got "
     "int32."),
    ("weighted_mean", [LOGITS * 1j], {}, "values must have a real dtype, got "
     "complex64."),
    ("weighted_mean", [LOGITS], {"where": LOGITS}, "where must have dtype bool, got "
     f"{LOGITS.dtype}; give where != 0."),
    ("weighted_mean", [LOGITS, LOGITS * 1j], {}, "weights must have a real dtype, got "
     "complex64."),
    (INTEGER, [LOGITS, IDS.astype(np.float32)], {}, "labels must have an integer dtype "
     "(class ids), got float32; convert class ids with labels.astype(int32)."),
    (INTEGER, [LOGITS, LOGITS], {}, "labels must have an integer dtype (class ids), "
     "got float32" + DENSE_TAKES),
    (INTEGER, [LOGITS, LOGITS > 0], {}, "labels must have an integer dtype (class "
     "ids), got bool" + DENSE_TAKES),
    (INTEGER, [LOGITS, IDS > 0], {}, "labels must have an integer dtype (class ids), "
     "got "
     "bool; convert class ids with labels.astype(int32)."),
    ("nll_loss", [LOGITS, IDS.astype(np.float32)], {}, "labels must have an integer "
     "dtype (class ids), got float32; convert class ids with labels.astype(int32)."),
    (DENSE, [LOGITS, LOGITS * 1j], {}, "labels must have a real dtype, got complex64."),
    (INTEGER, [LOGITS, IDS], {"where": IDS}, "where must have dtype bool, got int32; "
     "give where != 0."),
    (SIGMOID, [LOGITS, LOGITS], {"where": LOGITS}, "where must have dtype bool, got "
     "float32; give where != 0."),
    (INTEGER, [LOGITS, IDS, 1.0], {}, "axis must be an integer or a tuple of integers, "
     "got 1.0."),
    (INTEGER, [LOGITS, IDS, True], {}, "axis must be an integer or a tuple of "
     "integers, got True."),
    (DENSE, [LOGITS, LOGITS, (0, True)], {}, "axis must be an integer or a tuple of "
     "integers, got (0, True)."),
    (LINEARIZED, [LOGITS, LOGITS, False], {}, "axis must be an integer or a tuple of "
     "integers, got False."),
    ("nll_loss", [LOGITS, IDS, np.True_], {}, "axis must be an integer or a tuple of "
     "integers, got np.True_."),
    (INTEGER, [LOGITS, IDS], {"label_smoothing": "0.1"}, "label_smoothing must be a "
     "real number, got '0.1'."),
    (INTEGER, [LOGITS, IDS], {"z_loss": None}, "z_loss must be a real number, got "
     "None."),
    (INTEGER, [LOGITS, IDS], {"class_weights": np.ones(3) * 1j}, "class_weights must "
     "have a real dtype, got complex64."),
    (SIGMOID, [LOGITS, LOGITS], {"pos_weight": np.ones(3) * 1j}, "pos_weight must have "
     "a real dtype, got complex64."),
    (SINKHORN, [LOGITS], {"num_iters": 2.0}, "num_iters must be an integer, got 2.0."),
    (SINKHORN, [LOGITS], {"num_iters": True}, "num_iters must be an integer, got "
     "True."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "options", "message"), SHAPES + VALUES)
def test_value_errors(name, arguments, options, message):
    check(ValueError, name, arguments, options, message)


@pytest.mark.parametrize(("name", "arguments", "options", "message"), TYPES)
def test_type_errors(name, arguments, options, message):
    check(TypeError, name, arguments, options, message)


def check(kind, name, arguments, options, message):
    loss = getattr(xent_jax, name)
    with pytest.raises(kind) as raised:
        loss(*arguments, **options)
    assert str(raised.value) == f"{name}: {message}"
    if all(isinstance(argument, np.ndarray) for argument in arguments):
        # The same at trace time.
        with pytest.raises(kind) as raised:
            jax.jit(functools.partial(loss, **options))(*arguments)
        assert str(raised.value) == f"{name}: {message}"


def test_options_are_keywords():
    for name in (INTEGER, DENSE):
        with pytest.raises(TypeError, match="positional"):
            getattr(xent_jax, name)(LOGITS, IDS, -1, None, 0.1)


@pytest.mark.parametrize("name", [INTEGER, DENSE])
def test_traced_options_are_used_as_they_are(name):
    """A schedule may pass a traced coefficient; its range cannot be checked."""
    loss = getattr(xent_jax, name)
    labels = IDS if name == INTEGER else np.eye(3, dtype=np.float32)[IDS]
    logits = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)

    @jax.jit
    def traced(smoothing, z_loss):
        return loss(logits, labels, label_smoothing=smoothing, z_loss=z_loss)

    for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.01), (1.0, 1.0)):
        np.testing.assert_allclose(
            traced(smoothing, z_loss),
            loss(logits, labels, label_smoothing=smoothing, z_loss=z_loss),
            rtol=1e-6,
        )
    assert np.isfinite(traced(2.0, -1.0)).all()


def test_swapped_arguments_are_refused():
    """Peers return a plausible number for (labels, logits)."""
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        xent_jax.softmax_cross_entropy_with_integer_labels(LOGITS, LOGITS[:, 0])
    with pytest.raises(TypeError, match="logits must have a floating dtype"):
        xent_jax.softmax_cross_entropy_with_integer_labels(IDS, LOGITS)


def test_python_numbers_and_numpy_arrays_are_accepted():
    expected = np.float32(np.log(np.exp([0.0, 1.0, 2.0]).sum()) - 2)
    loss = xent_jax.softmax_cross_entropy_with_integer_labels
    for logits, labels in (
        ([[0.0, 1.0, 2.0]], [2]),
        (np.array([[0.0, 1.0, 2.0]]), np.array([2])),
        (np.array([[0.0, 1.0, 2.0]], np.float16), np.array([2], np.int8)),
    ):
        np.testing.assert_allclose(loss(logits, labels), [expected], rtol=1e-6)
    one_hot = xent_jax.softmax_cross_entropy([[0.0, 1.0, 2.0]], [[0, 0, 1]])
    np.testing.assert_allclose(one_hot, [expected], rtol=1e-6)
    truth = np.array([[False, False, True]])
    mask = xent_jax.softmax_cross_entropy([[0.0, 1.0, 2.0]], truth)
    np.testing.assert_allclose(mask, [expected], rtol=1e-6)
