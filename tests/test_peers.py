"""Beside optax, PyTorch, TensorFlow, Keras and ONNX: where they are right, and not.

`test_agrees_with_*` compare value and gradient where the peer is right: moderate
logits, valid labels. The other tests hold the reasons for this package: each shows that
a peer still has a defect, and the loss of this package at the same point. One that
fails says that the peer has mended it, which can happen only where a version that the
extra `peers` names exactly is raised.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from xent_jax import (
    binary_cross_entropy,
    categorical_cross_entropy,
    nll_loss,
    sigmoid_binary_cross_entropy,
    sinkhorn_targets,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    weighted_mean,
)

# Read when TensorFlow and Keras are imported, which the fixtures below do.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")

pytestmark = pytest.mark.once

INF, NAN = np.inf, np.nan
RNG = np.random.default_rng(20240229)

LOGITS = 2 * RNG.normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([3, 0, 4, 1, 1, 2])
IGNORED = np.array([3, -100, 4, 1, -100, 2])
DENSE = RNG.dirichlet(np.ones(5), 6).astype(np.float32)
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.25, 3.0], np.float32)
IMAGES = 2 * RNG.normal(size=(2, 5, 3, 4)).astype(np.float32)
IMAGE_LABELS = RNG.integers(0, 5, (2, 3, 4))
IMAGE_IGNORED = np.where(RNG.random((2, 3, 4)) < 0.3, -100, IMAGE_LABELS)
IMAGE_DENSE = np.moveaxis(RNG.dirichlet(np.ones(5), (2, 3, 4)), -1, 1).astype("float32")
BINARY = RNG.integers(0, 2, (6, 5)).astype(np.float32)
SOFT_BINARY = RNG.random((6, 5), np.float32)
PROBS = RNG.dirichlet(np.ones(5), 6).astype(np.float32)
BINARY_PROBS = RNG.uniform(0.02, 0.98, (6, 5)).astype(np.float32)

CONFIDENT = np.array([[0.0, 25.0, 1.0]], np.float32)
LABEL_1 = np.array([1])
ONE_MASKED = np.array([[0.0, -INF, 1.0]], np.float32)
ONE_BAD_ROW = np.array([[0.0, 1.0, 2.0], [NAN, 1.0, 0.0]], np.float32)


def importable(name: str):
    reason = f"{name} is not installed (extra `peers`)"
    return pytest.importorskip(name, reason=reason, exc_type=ImportError)


@pytest.fixture(scope="module")
def optax():
    return importable("optax")


@pytest.fixture(scope="module")
def torch():
    return importable("torch")


@pytest.fixture(scope="module")
def tf():
    return importable("tensorflow")


@pytest.fixture(scope="module")
def keras():
    module = importable("keras")
    if module.backend.backend() != "jax":
        pytest.skip("the backend of keras is not jax (KERAS_BACKEND)")
    return module


@pytest.fixture
def lenient():
    """JAX as it is out of the box: what optax and keras are written for."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def in_jax(loss, inputs):
    """Returns the value and the gradient of the summed value."""
    value, pullback = jax.vjp(loss, jnp.asarray(inputs))
    return np.asarray(value), np.asarray(pullback(jnp.ones_like(value))[0])


def in_torch(torch, loss, inputs):
    variable = torch.tensor(inputs, requires_grad=True)
    value = loss(variable)
    value.sum().backward()
    return value.detach().numpy(), variable.grad.numpy()


def in_tensorflow(tf, loss, inputs):
    variable = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        value = loss(variable)
    return value.numpy(), tape.gradient(value, variable).numpy()


def assert_agree(ours, theirs, rtol=2e-6, atol=1e-6):
    for mine, peer in zip(ours, theirs, strict=True):
        assert np.isfinite(peer).all()
        np.testing.assert_allclose(mine, peer, rtol=rtol, atol=atol)


def assert_true(ours, logits, labels, **options):
    """Asserts the loss and the gradient of class ids to 4 ulp of float32."""
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, labels, **options)
    for mine, right in zip(ours, truth[:2], strict=True):
        assert oracle.ulp_error(mine, right, "float32").max() <= 4


def for_ids(labels, **options):
    return lambda x: softmax_cross_entropy_with_integer_labels(x, labels, **options)


def for_targets(labels, **options):
    return lambda x: softmax_cross_entropy(x, labels, **options)


def for_binary(labels, **options):
    return lambda x: sigmoid_binary_cross_entropy(x, labels, **options)


def mean_over_label_weights(labels, weights, keep=None, **options):
    """PyTorch's mean under class weights, as the documentation writes it."""
    labels, w = jnp.asarray(labels), jnp.asarray(weights)
    keep = jnp.ones(labels.shape, bool) if keep is None else jnp.asarray(keep)

    def mean(x):
        loss = softmax_cross_entropy_with_integer_labels(
            x, labels, where=keep, class_weights=w, **options
        )
        return loss.sum() / jnp.where(keep, w[jnp.where(keep, labels, 0)], 0).sum()

    return mean


# ------------------------------------------------------------------------------- optax
# name, loss of this package, loss of optax, both of the logits alone
CLASS_MASK = np.eye(5, dtype=bool)[LABELS] | (np.arange(5) % 2 == 0)
ROWS = np.array([True, False, True, True, False, True])
OPTAX_AGREEMENT = {
    "class ids": (
        LOGITS,
        for_ids(LABELS),
        lambda o, x: o.softmax_cross_entropy_with_integer_labels(x, LABELS),
    ),
    "class ids, axis 1 of 4": (
        IMAGES,
        for_ids(IMAGE_LABELS, axis=1),
        lambda o, x: o.softmax_cross_entropy_with_integer_labels(x, IMAGE_LABELS, 1),
    ),
    "class ids, several axes": (
        IMAGES,
        lambda x: softmax_cross_entropy_with_integer_labels(
            x, IMAGE_LABELS[:, :, 0], (3, 1)
        ),
        lambda o, x: o.softmax_cross_entropy_with_integer_labels(
            x, IMAGE_LABELS[:, :, 0], (3, 1)
        ),
    ),
    "class ids, where of the batch": (
        LOGITS,
        for_ids(LABELS, where=ROWS),
        lambda o, x: o.softmax_cross_entropy_with_integer_labels(
            x, LABELS, where=ROWS[:, None]
        ),
    ),
    "class ids, where of the logits": (
        LOGITS,
        for_ids(LABELS, where=CLASS_MASK),
        lambda o, x: o.softmax_cross_entropy_with_integer_labels(
            x, LABELS, where=CLASS_MASK
        ),
    ),
    "targets": (
        LOGITS,
        for_targets(DENSE),
        lambda o, x: o.softmax_cross_entropy(x, DENSE),
    ),
    "targets, axis 1 of 4": (
        IMAGES,
        for_targets(IMAGE_DENSE, axis=1),
        lambda o, x: o.softmax_cross_entropy(x, IMAGE_DENSE, 1),
    ),
    "targets that do not sum to one": (
        LOGITS,
        for_targets(3 * SOFT_BINARY),
        lambda o, x: o.softmax_cross_entropy(x, 3 * SOFT_BINARY),
    ),
    "targets, where of the logits": (
        LOGITS,
        for_targets(DENSE, where=CLASS_MASK),
        lambda o, x: o.softmax_cross_entropy(x, DENSE, where=CLASS_MASK),
    ),
    "smoothed targets": (
        LOGITS,
        for_targets(DENSE, label_smoothing=0.1),
        lambda o, x: o.softmax_cross_entropy(x, o.smooth_labels(DENSE, 0.1)),
    ),
    "smoothed class ids": (
        LOGITS,
        for_ids(LABELS, label_smoothing=0.1),
        lambda o, x: o.softmax_cross_entropy(
            x, o.smooth_labels(jax.nn.one_hot(LABELS, 5), 0.1)
        ),
    ),
    "sigmoid": (
        LOGITS,
        for_binary(SOFT_BINARY),
        lambda o, x: o.sigmoid_binary_cross_entropy(x, SOFT_BINARY),
    ),
}


@pytest.mark.parametrize("case", OPTAX_AGREEMENT)
def test_agrees_with_optax(case, optax, lenient) -> None:
    inputs, ours, theirs = OPTAX_AGREEMENT[case]
    peer = in_jax(lambda x: theirs(optax.losses, x), inputs)
    assert_agree(in_jax(ours, inputs), peer)


def test_agrees_with_the_label_gradient_of_optax(optax, lenient) -> None:
    ours = in_jax(lambda y: softmax_cross_entropy(LOGITS, y), DENSE)
    assert_agree(ours, in_jax(lambda y: optax.softmax_cross_entropy(LOGITS, y), DENSE))


class TestOptaxDefects:
    @pytest.mark.parametrize("dense", [False, True], ids=["class ids", "targets"])
    def test_confident_row_has_no_loss_and_no_pull(self, dense, optax, lenient) -> None:
        if dense:
            labels = np.eye(3, dtype=np.float32)[[1]]
            value, gradient = in_jax(
                lambda x: optax.softmax_cross_entropy(x, labels), CONFIDENT
            )
            ours = in_jax(for_targets(labels), CONFIDENT)
        else:
            value, gradient = in_jax(
                lambda x: optax.softmax_cross_entropy_with_integer_labels(x, LABEL_1),
                CONFIDENT,
            )
            ours = in_jax(for_ids(LABEL_1), CONFIDENT)
        assert value[0] == 0
        assert gradient[0, 1] == 0
        # The rivals are still pushed down, so the row does not sum to zero.
        assert gradient.sum() > 1e-11
        assert_true(ours, CONFIDENT, LABEL_1)

    @pytest.mark.parametrize("margin", [10, 14])
    def test_small_losses_have_few_digits(self, margin, rng, optax, lenient) -> None:
        logits = rng.normal(size=(64, 10)).astype(np.float32)
        labels = np.argmax(logits, axis=-1)
        logits[np.arange(64), labels] += np.float32(margin)
        truth = oracle.softmax_cross_entropy_with_integer_labels(logits, labels)
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        assert np.abs(theirs / truth.value - 1).max() > 5e-4
        ours = softmax_cross_entropy_with_integer_labels(logits, labels)
        assert oracle.ulp_error(ours, truth.value, "float32").max() <= 4

    def test_confident_row_has_no_curvature(self, optax, lenient) -> None:
        def curvature(loss):
            hessian = jax.hessian(lambda x: loss(x, jnp.int32(1)))(CONFIDENT[0])
            return float(hessian[1, 1])

        assert curvature(optax.softmax_cross_entropy_with_integer_labels) == 0
        p = oracle.softmax(CONFIDENT[0])
        ours = curvature(softmax_cross_entropy_with_integer_labels)
        assert ours == pytest.approx(p[1] * (p[0] + p[2]), rel=1e-6)

    def test_minus_one_wraps_to_the_last_class(self, optax, lenient) -> None:
        def optax_loss(label):
            return in_jax(
                lambda x: optax.softmax_cross_entropy_with_integer_labels(x, label),
                LOGITS[:1],
            )

        assert_agree(optax_loss(np.array([-1])), optax_loss(np.array([4])), 0, 0)
        value, gradient = in_jax(for_ids(np.array([-1])), LOGITS[:1])
        assert np.isnan(value).all()
        assert np.isnan(gradient).all()

    @pytest.mark.parametrize("label", [5, 100, -100])
    def test_unknown_label_trains_on(self, label, optax, lenient) -> None:
        labels = np.array([label])
        value, gradient = in_jax(
            lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels),
            LOGITS[:1],
        )
        assert np.isnan(value).all()
        # A gradient that pushes every class down: an optimizer would follow it.
        np.testing.assert_allclose(gradient, oracle.softmax(LOGITS[:1]), rtol=1e-5)
        ours = in_jax(for_ids(labels), LOGITS[:1])
        assert all(np.isnan(array).all() for array in ours)

    def test_zero_times_infinity(self, optax, lenient) -> None:
        labels = np.eye(3, dtype=np.float32)[[0]]
        assert np.isnan(optax.softmax_cross_entropy(ONE_MASKED, labels)).all()
        assert_true(in_jax(for_targets(labels), ONE_MASKED), ONE_MASKED, [0])

    @pytest.mark.parametrize(
        ("offset", "error"), [(1e4, 2e-5), (1e6, 1e-3)], ids=["1e4", "1e6"]
    )
    def test_common_offset_costs_digits(
        self, offset, error, rng, optax, lenient
    ) -> None:
        logits = (offset + 2 * rng.normal(size=(32, 64))).astype(np.float32)
        labels = rng.integers(0, 64, 32)
        truth = oracle.softmax_cross_entropy_with_integer_labels(logits, labels).value
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        assert np.abs(theirs / truth - 1).max() > error
        ours = softmax_cross_entropy_with_integer_labels(logits, labels)
        assert oracle.ulp_error(ours, truth, "float32").max() <= 4

    def test_largest_numbers(self, optax, lenient) -> None:
        logits = np.full((1, 3), np.finfo(np.float32).max)
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, LABEL_1)
        assert theirs == 0
        assert_true(in_jax(for_ids(LABEL_1), logits), logits, LABEL_1)

    def test_label_that_where_drops_has_a_finite_loss(self, optax, lenient) -> None:
        where = np.array([[False, True, True]])
        logits = np.array([[0.0, 1.0, 2.0]], np.float32)
        value, gradient = in_jax(
            lambda x: optax.softmax_cross_entropy_with_integer_labels(
                x, np.array([0]), where=where
            ),
            logits,
        )
        # lse of the kept classes minus a logit that is not among them.
        np.testing.assert_allclose(value, [np.log(np.exp([1, 2]).sum())], rtol=1e-6)
        assert gradient[0, 0] == -1
        ours, slope = in_jax(for_ids(np.array([0]), where=where), logits)
        assert np.isposinf(ours).all()
        np.testing.assert_allclose(slope, [[0, 0.26894143, 0.7310586]], rtol=1e-6)

    def test_dropped_row_leaks_nan_into_the_gradient(self, optax, lenient) -> None:
        keep = np.array([True, False])
        labels = np.array([0, 0])

        def recipe(x):
            loss = optax.softmax_cross_entropy_with_integer_labels(x, labels)
            return jnp.where(keep, loss, 0)

        assert np.isnan(in_jax(recipe, ONE_BAD_ROW)[1]).any()
        ours = in_jax(for_ids(labels, where=keep), ONE_BAD_ROW)
        assert_true(ours, ONE_BAD_ROW, labels, where=keep)
        assert (ours[1][1] == 0).all()

    def test_bfloat16_loss(self, rng, optax, lenient) -> None:
        logits = jnp.asarray(30 + 2 * rng.normal(size=(32, 64)), jnp.bfloat16)
        labels = rng.integers(0, 64, 32)
        rounded = np.asarray(logits).astype(np.float32)
        truth = oracle.softmax_cross_entropy_with_integer_labels(rounded, labels).value
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        assert np.abs(theirs.astype(jnp.float32) / truth - 1).max() > 1e-2
        ours = softmax_cross_entropy_with_integer_labels(logits, labels)
        assert oracle.ulp_error(ours, truth, "float32").max() <= 4

    def test_no_classes(self, optax, lenient) -> None:
        logits, labels = jnp.zeros((2, 0)), jnp.zeros(2, jnp.int32)
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        assert np.isneginf(theirs).all()
        with pytest.raises(ValueError, match="at least one class"):
            softmax_cross_entropy_with_integer_labels(logits, labels)

    def test_sigmoid_at_infinity(self, optax, lenient) -> None:
        logits, labels = np.float32([INF, -INF]), np.float32([1, 0])
        assert np.isnan(optax.sigmoid_binary_cross_entropy(logits, labels)).all()
        ours = in_jax(for_binary(labels), logits)
        assert all((array == 0).all() for array in ours)


# ----------------------------------------------------------------------------- PyTorch
def torch_loss(labels, **options):
    """Returns `torch.nn.functional.cross_entropy` of the logits alone."""

    def loss(torch, x):
        tensors = {
            name: torch.tensor(value) if name == "weight" else value
            for name, value in options.items()
        }
        return torch.nn.functional.cross_entropy(x, torch.tensor(labels), **tensors)

    return loss


def torch_binary(labels, pos_weight=None):
    def loss(torch, x):
        weight = None if pos_weight is None else torch.tensor(pos_weight)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            x, torch.tensor(labels), reduction="none", pos_weight=weight
        )

    return loss


KEEP = IGNORED != -100
IMAGE_KEEP = IMAGE_IGNORED != -100
TORCH_AGREEMENT = {
    "class ids": (
        LOGITS,
        for_ids(LABELS),
        torch_loss(LABELS, reduction="none"),
    ),
    "class ids, mean": (
        LOGITS,
        lambda x: weighted_mean(for_ids(LABELS)(x)),
        torch_loss(LABELS),
    ),
    "class ids, sum": (
        LOGITS,
        lambda x: for_ids(LABELS)(x).sum(),
        torch_loss(LABELS, reduction="sum"),
    ),
    "ignored": (
        LOGITS,
        for_ids(IGNORED, where=KEEP),
        torch_loss(IGNORED, reduction="none"),
    ),
    "ignored, mean": (
        LOGITS,
        lambda x: weighted_mean(for_ids(IGNORED, where=KEEP)(x), KEEP),
        torch_loss(IGNORED),
    ),
    "class weights": (
        LOGITS,
        for_ids(LABELS, class_weights=WEIGHTS),
        torch_loss(LABELS, weight=WEIGHTS, reduction="none"),
    ),
    "class weights, mean": (
        LOGITS,
        mean_over_label_weights(LABELS, WEIGHTS),
        torch_loss(LABELS, weight=WEIGHTS),
    ),
    "class weights, ignored, mean": (
        LOGITS,
        mean_over_label_weights(IGNORED, WEIGHTS, KEEP),
        torch_loss(IGNORED, weight=WEIGHTS),
    ),
    "smoothing": (
        LOGITS,
        for_ids(LABELS, label_smoothing=0.1),
        torch_loss(LABELS, label_smoothing=0.1, reduction="none"),
    ),
    "smoothing of everything": (
        LOGITS,
        for_ids(LABELS, label_smoothing=1.0),
        torch_loss(LABELS, label_smoothing=1.0, reduction="none"),
    ),
    "smoothing, class weights": (
        LOGITS,
        for_ids(LABELS, label_smoothing=0.1, class_weights=WEIGHTS),
        torch_loss(LABELS, label_smoothing=0.1, weight=WEIGHTS, reduction="none"),
    ),
    "smoothing, class weights, ignored, mean": (
        LOGITS,
        mean_over_label_weights(IGNORED, WEIGHTS, KEEP, label_smoothing=0.1),
        torch_loss(IGNORED, label_smoothing=0.1, weight=WEIGHTS),
    ),
    "images": (
        IMAGES,
        for_ids(IMAGE_LABELS, axis=1),
        torch_loss(IMAGE_LABELS, reduction="none"),
    ),
    "images, smoothing, class weights, ignored": (
        IMAGES,
        for_ids(
            IMAGE_IGNORED,
            axis=1,
            where=IMAGE_KEEP,
            class_weights=WEIGHTS,
            label_smoothing=0.1,
        ),
        torch_loss(
            IMAGE_IGNORED, weight=WEIGHTS, label_smoothing=0.1, reduction="none"
        ),
    ),
    "images, class weights, ignored, mean": (
        IMAGES,
        mean_over_label_weights(IMAGE_IGNORED, WEIGHTS, IMAGE_KEEP, axis=1),
        torch_loss(IMAGE_IGNORED, weight=WEIGHTS),
    ),
    "targets": (
        LOGITS,
        for_targets(DENSE),
        torch_loss(DENSE, reduction="none"),
    ),
    "targets, mean": (
        LOGITS,
        lambda x: for_targets(DENSE)(x).mean(),
        torch_loss(DENSE),
    ),
    "targets that do not sum to one": (
        LOGITS,
        for_targets(3 * SOFT_BINARY),
        torch_loss(3 * SOFT_BINARY, reduction="none"),
    ),
    "targets, smoothing, class weights": (
        LOGITS,
        for_targets(DENSE, label_smoothing=0.1, class_weights=WEIGHTS),
        torch_loss(DENSE, label_smoothing=0.1, weight=WEIGHTS, reduction="none"),
    ),
    "image targets, class weights": (
        IMAGES,
        for_targets(IMAGE_DENSE, axis=1, class_weights=WEIGHTS),
        torch_loss(IMAGE_DENSE, weight=WEIGHTS, reduction="none"),
    ),
    "sigmoid": (LOGITS, for_binary(SOFT_BINARY), torch_binary(SOFT_BINARY)),
    "sigmoid, weight of positives": (
        LOGITS,
        for_binary(BINARY, pos_weight=3.0),
        torch_binary(BINARY, np.float32(3)),
    ),
    "sigmoid, weight of each question": (
        LOGITS,
        for_binary(SOFT_BINARY, pos_weight=WEIGHTS),
        torch_binary(SOFT_BINARY, WEIGHTS),
    ),
    "log-probabilities, class weights": (
        LOGITS,
        lambda x: nll_loss(x, LABELS, class_weights=WEIGHTS),
        lambda torch, x: torch.nn.functional.nll_loss(
            x, torch.tensor(LABELS), weight=torch.tensor(WEIGHTS), reduction="none"
        ),
    ),
    "log-probabilities, images, ignored": (
        IMAGES,
        lambda x: nll_loss(x, IMAGE_IGNORED, axis=1, where=IMAGE_KEEP),
        lambda torch, x: torch.nn.functional.nll_loss(
            x, torch.tensor(IMAGE_IGNORED), reduction="none"
        ),
    ),
    "probabilities": (
        BINARY_PROBS,
        lambda p: binary_cross_entropy(p, SOFT_BINARY),
        lambda torch, p: torch.nn.functional.binary_cross_entropy(
            p, torch.tensor(SOFT_BINARY), reduction="none"
        ),
    ),
}


@pytest.mark.parametrize("case", TORCH_AGREEMENT)
def test_agrees_with_torch(case, torch) -> None:
    inputs, ours, theirs = TORCH_AGREEMENT[case]
    peer = in_torch(torch, lambda x: theirs(torch, x), inputs)
    assert_agree(in_jax(ours, inputs), peer)


def test_weighted_mean_is_not_the_mean_of_torch_under_class_weights(torch) -> None:
    peer = torch_loss(LABELS, weight=WEIGHTS)(torch, torch.tensor(LOGITS))
    loss = softmax_cross_entropy_with_integer_labels(
        LOGITS, LABELS, class_weights=WEIGHTS
    )
    assert weighted_mean(loss, WEIGHTS[LABELS]) != pytest.approx(float(peer), rel=1e-2)


class TestTorchDefects:
    def test_confident_row_has_no_loss_and_no_pull(self, torch) -> None:
        value, gradient = in_torch(
            torch,
            lambda x: torch_loss(LABEL_1, reduction="none")(torch, x),
            CONFIDENT,
        )
        assert value[0] == 0
        assert gradient[0, 1] == 0
        assert_true(in_jax(for_ids(LABEL_1), CONFIDENT), CONFIDENT, LABEL_1)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=["nan", "inf", "all -inf"])
    def test_ignored_row_leaks_nan_into_the_gradient(self, bad, torch) -> None:
        logits = ONE_BAD_ROW.copy()
        logits[1] = bad
        labels = np.array([0, -100])
        value, gradient = in_torch(
            torch, lambda x: torch_loss(labels, reduction="none")(torch, x), logits
        )
        assert value[1] == 0
        assert np.isnan(gradient[1]).all()
        ours = in_jax(for_ids(labels, where=labels != -100), logits)
        assert_true(ours, logits, labels, where=labels != -100)
        assert (ours[1][1] == 0).all()

    def test_mean_of_nothing(self, torch) -> None:
        labels = np.full(6, -100)
        assert torch_loss(labels)(torch, torch.tensor(LOGITS)).isnan()
        keep = labels != -100
        ours = in_jax(
            lambda x: weighted_mean(for_ids(labels, where=keep)(x), keep), LOGITS
        )
        assert all((array == 0).all() for array in ours)

    def test_class_weights_of_zero(self, torch) -> None:
        zeros = np.zeros(5, np.float32)
        value, gradient = in_torch(
            torch, lambda x: torch_loss(LABELS, weight=zeros)(torch, x), LOGITS
        )
        assert np.isnan(value)
        assert np.isnan(gradient).all()
        ours = in_jax(for_ids(LABELS, class_weights=zeros), LOGITS)
        assert all((array == 0).all() for array in ours)
        assert weighted_mean(ours[0], zeros[LABELS]) == 0

    def test_weight_zero_times_infinity(self, torch) -> None:
        weights = np.array([1, 0, 1], np.float32)
        peer = torch_loss(LABEL_1, weight=weights, reduction="none")
        assert peer(torch, torch.tensor(ONE_MASKED)).isnan().all()
        ours = in_jax(for_ids(LABEL_1, class_weights=weights), ONE_MASKED)
        assert all((array == 0).all() for array in ours)

    def test_zero_times_infinity(self, torch) -> None:
        labels = np.eye(3, dtype=np.float32)[[0]]
        peer = torch_loss(labels, reduction="none")(torch, torch.tensor(ONE_MASKED))
        assert peer.isnan().all()
        assert_true(in_jax(for_targets(labels), ONE_MASKED), ONE_MASKED, [0])

    def test_smoothing_over_a_masked_class(self, torch) -> None:
        labels = np.array([0])
        value, gradient = in_torch(
            torch,
            lambda x: torch_loss(labels, label_smoothing=0.1, reduction="none")(
                torch, x
            ),
            ONE_MASKED,
        )
        assert np.isposinf(value).all()
        assert gradient[0, 1] < 0
        # Here the class is dropped by name, and the smoothing is over those kept.
        options = {"where": ONE_MASKED > -INF, "label_smoothing": 0.1}
        ours = in_jax(for_ids(labels, **options), ONE_MASKED)
        assert_true(ours, ONE_MASKED, labels, **options)
        assert ours[1][0, 1] == 0

    def test_certain_negatives_cost_nothing(self, torch) -> None:
        logits, labels = np.float32([-20, -40, -80]), np.zeros(3, np.float32)
        assert (torch_binary(labels)(torch, torch.tensor(logits)) == 0).all()
        truth = oracle.sigmoid_binary_cross_entropy(logits, labels).value
        ours = sigmoid_binary_cross_entropy(logits, labels)
        assert oracle.ulp_error(ours, truth, "float32").max() <= 3

    def test_certain_positives_have_no_gradient(self, torch) -> None:
        logits, labels = np.float32([20, 40, 80]), np.ones(3, np.float32)
        _, gradient = in_torch(torch, lambda x: torch_binary(labels)(torch, x), logits)
        assert (gradient == 0).all()
        truth = oracle.sigmoid_binary_cross_entropy(logits, labels).gradient
        ours = in_jax(for_binary(labels), logits)[1]
        assert oracle.ulp_error(ours, truth, "float32").max() <= 4

    def test_sigmoid_at_infinity(self, torch) -> None:
        logits, labels = np.float32([INF, -INF]), np.float32([1, 0])
        assert torch_binary(labels)(torch, torch.tensor(logits)).isnan().all()
        assert (sigmoid_binary_cross_entropy(logits, labels) == 0).all()


# -------------------------------------------------------------------------- TensorFlow
TENSORFLOW_AGREEMENT = {
    "class ids": (
        LOGITS,
        for_ids(LABELS),
        lambda tf, x: tf.nn.sparse_softmax_cross_entropy_with_logits(LABELS, x),
    ),
    "targets": (
        LOGITS,
        for_targets(DENSE),
        lambda tf, x: tf.nn.softmax_cross_entropy_with_logits(DENSE, x),
    ),
    "targets, axis 1 of 4": (
        IMAGES,
        for_targets(IMAGE_DENSE, axis=1),
        lambda tf, x: tf.nn.softmax_cross_entropy_with_logits(IMAGE_DENSE, x, 1),
    ),
    "sigmoid": (
        LOGITS,
        for_binary(SOFT_BINARY),
        lambda tf, x: tf.nn.sigmoid_cross_entropy_with_logits(SOFT_BINARY, x),
    ),
    "sigmoid, weight of positives": (
        LOGITS,
        for_binary(SOFT_BINARY, pos_weight=3.0),
        lambda tf, x: tf.nn.weighted_cross_entropy_with_logits(SOFT_BINARY, x, 3.0),
    ),
}


@pytest.mark.parametrize("case", TENSORFLOW_AGREEMENT)
def test_agrees_with_tensorflow(case, tf) -> None:
    inputs, ours, theirs = TENSORFLOW_AGREEMENT[case]
    peer = in_tensorflow(tf, lambda x: theirs(tf, x), inputs)
    assert_agree(in_jax(ours, inputs), peer)


class TestTensorFlowDefects:
    @pytest.mark.parametrize(
        "labels",
        [[1, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]],
        ids=["two labels", "no label", "label of weight 2"],
    )
    def test_gradient_of_labels_that_do_not_sum_to_one(self, labels, tf) -> None:
        labels = np.array([labels], np.float32)
        logits = np.array([[0.2, 0.7, 0.8, 0.1]], np.float32)
        value, gradient = in_tensorflow(
            tf, lambda x: tf.nn.softmax_cross_entropy_with_logits(labels, x), logits
        )
        truth = oracle.softmax_cross_entropy(logits, labels)
        np.testing.assert_allclose(value, truth.value, rtol=1e-6)
        # softmax − y, whatever the labels sum to: not the derivative of that value.
        wrong = oracle.softmax(logits) - labels
        np.testing.assert_allclose(gradient, wrong, rtol=1e-5)
        assert np.abs(gradient - truth.gradient).max() > 0.3
        ours = in_jax(for_targets(labels), logits)
        assert_agree(ours, truth[:2], rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("sparse", [True, False], ids=["class ids", "targets"])
    def test_confident_row_has_no_loss_and_no_pull(self, sparse, tf) -> None:
        def loss(x):
            if sparse:
                return tf.nn.sparse_softmax_cross_entropy_with_logits(LABEL_1, x)
            one_hot = np.eye(3, dtype=np.float32)[LABEL_1]
            return tf.nn.softmax_cross_entropy_with_logits(one_hot, x)

        value, gradient = in_tensorflow(tf, loss, CONFIDENT)
        assert value[0] == 0
        assert gradient[0, 1] == 0
        assert_true(in_jax(for_ids(LABEL_1), CONFIDENT), CONFIDENT, LABEL_1)

    def test_zero_times_infinity(self, tf) -> None:
        labels = np.eye(3, dtype=np.float32)[[0]]
        peer = tf.nn.softmax_cross_entropy_with_logits(labels, ONE_MASKED)
        assert np.isnan(peer).all()
        assert_true(in_jax(for_targets(labels), ONE_MASKED), ONE_MASKED, [0])

    def test_soft_labels_near_one_cost_digits(self, rng, tf) -> None:
        logits, labels = (
            np.float32(rng.uniform(10, 20, 200)),
            np.float32([0.9999] * 200),
        )
        truth = oracle.sigmoid_binary_cross_entropy(logits, labels).value
        peer = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits).numpy()
        assert np.abs(peer / truth - 1).max() > 1e-4
        ours = sigmoid_binary_cross_entropy(logits, labels)
        assert oracle.ulp_error(ours, truth, "float32").max() <= 3

    def test_sigmoid_at_infinity(self, tf) -> None:
        logits, labels = np.float32([INF, -INF]), np.float32([1, 0])
        peer = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
        assert np.isnan(peer).all()
        assert (sigmoid_binary_cross_entropy(logits, labels) == 0).all()


# ------------------------------------------------------------------------------- Keras
KERAS_AGREEMENT = {
    "class ids": (
        LOGITS,
        for_ids(LABELS),
        lambda k, x: k.sparse_categorical_crossentropy(LABELS, x, from_logits=True),
    ),
    "targets": (
        LOGITS,
        for_targets(DENSE),
        lambda k, x: k.categorical_crossentropy(DENSE, x, from_logits=True),
    ),
    "targets, smoothing": (
        LOGITS,
        for_targets(DENSE, label_smoothing=0.1),
        lambda k, x: k.categorical_crossentropy(
            DENSE, x, from_logits=True, label_smoothing=0.1
        ),
    ),
    "targets of probabilities": (
        PROBS,
        lambda p: categorical_cross_entropy(p, DENSE),
        lambda k, p: k.categorical_crossentropy(DENSE, p),
    ),
    "sigmoid, smoothing": (
        LOGITS,
        lambda x: for_binary(BINARY, label_smoothing=0.1)(x).mean(-1),
        lambda k, x: k.binary_crossentropy(
            BINARY, x, from_logits=True, label_smoothing=0.1
        ),
    ),
    "probabilities": (
        BINARY_PROBS,
        lambda p: binary_cross_entropy(p, SOFT_BINARY).mean(-1),
        lambda k, p: k.binary_crossentropy(SOFT_BINARY, p),
    ),
}


@pytest.mark.parametrize("case", KERAS_AGREEMENT)
def test_agrees_with_keras(case, keras, lenient) -> None:
    inputs, ours, theirs = KERAS_AGREEMENT[case]
    peer = in_jax(lambda x: theirs(keras.losses, x), inputs)
    assert_agree(in_jax(ours, inputs), peer, rtol=4e-6)


def test_agrees_with_the_ignored_class_of_keras(keras, lenient) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-100
    )
    ours = softmax_cross_entropy_with_integer_labels(LOGITS, IGNORED, where=KEEP)
    np.testing.assert_allclose(
        weighted_mean(ours, KEEP), loss(IGNORED, LOGITS), rtol=1e-6
    )


class TestKerasDefects:
    @pytest.mark.parametrize("label", [-1, 3, -100])
    def test_unknown_label_counts_as_right(self, label, keras, lenient) -> None:
        labels = np.array([label])
        peer = in_jax(
            lambda x: keras.losses.sparse_categorical_crossentropy(
                labels, x, from_logits=True
            ),
            ONE_BAD_ROW[:1],
        )
        assert all((array == 0).all() for array in peer)
        ours = in_jax(for_ids(labels), ONE_BAD_ROW[:1])
        assert all(np.isnan(array).all() for array in ours)

    def test_confident_row_has_no_loss_and_no_pull(self, keras, lenient) -> None:
        value, gradient = in_jax(
            lambda x: keras.losses.sparse_categorical_crossentropy(
                LABEL_1, x, from_logits=True
            ),
            CONFIDENT,
        )
        assert value[0] == 0
        assert gradient[0, 1] == 0
        assert_true(in_jax(for_ids(LABEL_1), CONFIDENT), CONFIDENT, LABEL_1)

    def test_probability_zero_does_not_learn(self, keras, lenient) -> None:
        labels, probs = np.float32([[1, 0]]), np.float32([[0, 1]])
        value, gradient = in_jax(
            lambda p: keras.losses.categorical_crossentropy(labels, p), probs
        )
        np.testing.assert_allclose(value, [-np.log(1e-7)], rtol=1e-6)
        assert (gradient == 0).all()
        ours = in_jax(lambda p: categorical_cross_entropy(p, labels), probs)
        np.testing.assert_allclose(ours[0], value, rtol=1e-6)
        np.testing.assert_allclose(ours[1][0, 0], -1e7, rtol=1e-5)

    def test_binary_probability_zero_does_not_learn(self, keras, lenient) -> None:
        labels, probs = np.float32([[1]]), np.float32([[0]])
        value, gradient = in_jax(
            lambda p: keras.losses.binary_crossentropy(labels, p), probs
        )
        assert (gradient == 0).all()
        ours = in_jax(lambda p: binary_cross_entropy(p, labels), probs)
        np.testing.assert_allclose(ours[0][0], value, rtol=1e-6)
        np.testing.assert_allclose(ours[1], [[-1e7]], rtol=1e-5)

    def test_zero_times_infinity(self, keras, lenient) -> None:
        labels = np.eye(3, dtype=np.float32)[[0]]
        peer = keras.losses.categorical_crossentropy(
            labels, ONE_MASKED, from_logits=True
        )
        assert np.isnan(peer).all()
        assert_true(in_jax(for_targets(labels), ONE_MASKED), ONE_MASKED, [0])


# -------------------------------------------------------------------------------- ONNX
def onnx_softmax(scores, labels, weights=None, reduction="mean", ignored=None):
    """SoftmaxCrossEntropyLoss-13 as its specification says it; classes on axis 1."""
    x = np.asarray(scores, np.float64)
    log_prob = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return onnx_nll(log_prob, labels, weights, reduction, ignored)


def onnx_nll(log_prob, labels, weights=None, reduction="mean", ignored=None):
    """NegativeLogLikelihoodLoss-13: l = −w[c]·input[n, c, d], 0 where c is ignored."""
    keep = np.ones(labels.shape, bool) if ignored is None else labels != ignored
    classes = np.where(keep, labels, 0)
    weights = np.ones(log_prob.shape[1]) if weights is None else weights
    weight = np.where(keep, weights[classes], 0)
    picked = np.take_along_axis(log_prob, np.expand_dims(classes, 1), axis=1)
    loss = np.where(keep, -weight * np.squeeze(picked, 1), 0)
    if reduction == "none":
        return loss
    return loss.sum() / weight.sum() if reduction == "mean" else loss.sum()


def reduced(loss, labels, weights, reduction, ignored):
    """Returns the reduction that ONNX names, written with this package."""
    keep = np.ones(labels.shape, bool) if ignored is None else labels != ignored
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    scale = np.ones(5, np.float32) if weights is None else weights
    return loss.sum() / np.where(keep, scale[np.where(keep, labels, 0)], 0).sum()


ONNX_CASES = [
    pytest.param(
        inputs,
        labels,
        weights,
        reduction,
        None if (labels >= 0).all() else -100,
        id=f"{kind}, {'weights' if weights is not None else 'no weights'}, {reduction}",
    )
    for kind, inputs, labels in (
        ("rows", LOGITS, LABELS),
        ("rows with ignored", LOGITS, IGNORED),
        ("images", IMAGES, IMAGE_LABELS),
        ("images with ignored", IMAGES, IMAGE_IGNORED),
    )
    for weights in (None, WEIGHTS)
    for reduction in ("none", "sum", "mean")
]


@pytest.mark.parametrize(
    ("inputs", "labels", "weights", "reduction", "ignored"), ONNX_CASES
)
class TestOnnx:
    def test_definition_of_softmax_cross_entropy_loss(
        self, inputs, labels, weights, reduction, ignored
    ) -> None:
        loss = softmax_cross_entropy_with_integer_labels(
            inputs, labels, 1, labels != -100, class_weights=weights
        )
        ours = reduced(loss, labels, weights, reduction, ignored)
        truth = onnx_softmax(inputs, labels, weights, reduction, ignored)
        np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-7)

    def test_definition_of_negative_log_likelihood_loss(
        self, inputs, labels, weights, reduction, ignored
    ) -> None:
        loss = nll_loss(inputs, labels, 1, labels != -100, class_weights=weights)
        ours = reduced(loss, labels, weights, reduction, ignored)
        truth = onnx_nll(inputs, labels, weights, reduction, ignored)
        np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=2e-6)

    @pytest.mark.parametrize(
        "operator", ["SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"]
    )
    def test_definitions_are_those_of_the_onnx_package(
        self, operator, inputs, labels, weights, reduction, ignored
    ) -> None:
        helper = importable("onnx.helper")
        reference = importable("onnx.reference")
        options = {} if ignored is None else {"ignore_index": ignored}
        names = ["input", "labels", "weights"][: 2 if weights is None else 3]
        node = helper.make_node(
            operator, names, ["loss"], reduction=reduction, **options
        )
        feed = {"input": inputs, "labels": labels, "weights": weights}
        feed = {name: feed[name] for name in names}
        kinds = {
            name: helper.np_dtype_to_tensor_dtype(feed[name].dtype) for name in names
        }
        graph = helper.make_graph(
            [node],
            "loss",
            [
                helper.make_tensor_value_info(name, kinds[name], feed[name].shape)
                for name in names
            ],
            [helper.make_tensor_value_info("loss", kinds["input"], None)],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
        )
        (value,) = reference.ReferenceEvaluator(model).run(None, feed)
        softmax = operator == "SoftmaxCrossEntropyLoss"
        definition = onnx_softmax if softmax else onnx_nll
        ours = definition(inputs, labels, weights, reduction, ignored)
        np.testing.assert_allclose(value, ours, rtol=1e-5, atol=2e-6)


class TestOtt:
    """Optimal transport to convergence: there the two must be the same plan."""

    @pytest.mark.parametrize("epsilon", [0.5, 0.05])
    @pytest.mark.parametrize("uniform", [True, False])
    def test_converged_plan(self, epsilon, uniform) -> None:
        geometry = importable("ott.geometry.geometry")
        linear = importable("ott.solvers.linear")
        rng = np.random.default_rng(5)
        costs = rng.random((64, 16)).astype(np.float32) ** 1.5
        prior = np.ones(16) if uniform else rng.uniform(0.5, 2, 16)
        prior = (prior / prior.sum()).astype(np.float32)
        cost_geometry = geometry.Geometry(cost_matrix=costs, epsilon=epsilon)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            plan = linear.solve(
                cost_geometry, b=jnp.asarray(prior), threshold=1e-6, max_iterations=2000
            ).matrix
        targets = sinkhorn_targets(
            -costs, epsilon=epsilon, num_iters=500, tol=1e-6, prior=prior
        )
        np.testing.assert_allclose(targets / 64, plan, atol=1e-6)
