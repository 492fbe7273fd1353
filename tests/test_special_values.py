"""Special values, bad ids, masks and degenerate shapes, the same eagerly and in jit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened

import xent_jax

INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels
DENSE = xent_jax.softmax_cross_entropy
SIGMOID = xent_jax.sigmoid_binary_cross_entropy
INF, NAN = np.inf, np.nan
ROW3 = oracle.softmax(np.array([0.0, 1.0, 2.0]))

both = pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f: f, id="eager", marks=pytest.mark.exhaustive),
        pytest.param(jax.jit, id="jit"),
    ],
)


def evaluate(transform, loss, logits, *rest, **options):
    """Returns losses, and the gradient of their sum by the logits."""
    logits = jnp.asarray(logits, jnp.float32)
    rest = [jnp.asarray(value) for value in rest]
    options = {name: jnp.asarray(value) for name, value in options.items()}

    def losses(logits, rest, options):
        return loss(logits, *rest, **options)

    def total(logits, rest, options):
        return losses(logits, rest, options).sum()

    value = transform(losses)(logits, rest, options)
    gradient = transform(jax.grad(total))(logits, rest, options)
    assert value.dtype == gradient.dtype == jnp.float32
    return np.asarray(value), np.asarray(gradient)


def two(other):
    """Softmax of two finite logits 0 and 1, the third class having probability 0."""
    share = 1 / (1 + np.e)
    return np.insert([share, 1 - share], other, 0.0)


SPECIAL = {
    "-inf on another class": ([0, 1, -INF], 0, np.log1p(np.e), two(2) - [1, 0, 0]),
    "label on -inf": ([0, 1, -INF], 2, INF, two(2) - [0, 0, 1]),
    "only the label finite": ([-INF, 1, -INF], 1, 0.0, [0, 0, 0]),
    "all -inf": ([-INF, -INF, -INF], 0, NAN, [NAN] * 3),
    "+inf at the label": ([INF, 0, 1], 0, NAN, [NAN] * 3),
    "+inf at another": ([0, INF, 1], 0, NAN, [NAN] * 3),
    "NaN at the label": ([NAN, 0, 1], 0, NAN, [NAN] * 3),
    "NaN at another": ([0, NAN, 1], 0, NAN, [NAN] * 3),
    "label at -1e30": ([0, 1, -1e30], 2, 1e30, two(2) - [0, 0, 1]),
    "one far ahead": ([0, 1, 1e30], 2, 0.0, [0, 0, 0]),
}


@both
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_special_logits(transform, name, dense):
    logits, label, value, gradient = SPECIAL[name]
    # A healthy row beside it must not notice.
    rows = np.array([logits, [0.0, 1.0, 2.0]])
    ids = np.array([label, 1])
    labels = np.eye(3, dtype=np.float32)[ids] if dense else ids
    losses, gradients = evaluate(transform, DENSE if dense else INTEGER, rows, labels)
    np.testing.assert_allclose(losses[0], value, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses[1], -np.log(ROW3[1]), rtol=1e-6)
    np.testing.assert_allclose(gradients[1], ROW3 - [0, 1, 0], rtol=1e-5, atol=1e-7)


@both
@pytest.mark.parametrize("name", SPECIAL)
def test_special_logits_agree_with_the_oracle(transform, name):
    logits, label, _, _ = SPECIAL[name]
    rows, ids = np.array([logits], np.float32), np.array([label])
    losses, gradients = evaluate(transform, INTEGER, rows, ids)
    truth = oracle.softmax_cross_entropy_with_integer_labels(rows, ids)
    np.testing.assert_allclose(losses, truth.value, rtol=1e-6)
    np.testing.assert_allclose(gradients, truth.gradient, rtol=1e-5, atol=1e-7)


@both
def test_zero_is_positive_zero(transform):
    for rows, ids in (([[5.0]], [0]), ([[-INF, 1.0, -INF]], [1])):
        losses, gradients = evaluate(transform, INTEGER, rows, np.array(ids))
        assert not np.signbit(losses).any()
        assert not losses.any()
        assert not gradients.any()


@both
@pytest.mark.parametrize("loss", [INTEGER, DENSE], ids=["integer", "dense"])
def test_second_derivatives_are_finite_beside_minus_inf(transform, loss):
    row = jnp.array([0.0, -INF, 1.0])
    label = jnp.array(0) if loss is INTEGER else jnp.array([1.0, 0.0, 0.0])
    p = oracle.softmax(np.array([0.0, 1.0]))[0]
    truth = p * (1 - p) * np.array([[1, 0, -1], [0, 0, 0], [-1, 0, 1]])
    for outer in (jax.jacfwd, jax.jacrev):
        hessian = transform(outer(jax.grad(lambda x: loss(x, label))))(row)
        np.testing.assert_allclose(hessian, truth, atol=1e-7)


@both
def test_soft_target_beside_minus_inf(transform):
    labels = np.array([[0.5, 0.0, 0.5]], np.float32)
    losses, gradients = evaluate(transform, DENSE, [[0.0, -INF, 1.0]], labels)
    np.testing.assert_allclose(losses, [0.8132617], rtol=1e-6)
    truth = oracle.softmax_cross_entropy(np.array([[0.0, -INF, 1.0]]), labels)
    np.testing.assert_allclose(gradients, truth.gradient, atol=1e-7)
    by_labels = transform(
        jax.grad(lambda y: DENSE(jnp.array([[0.0, -INF, 1.0]]), y).sum())
    )(jnp.asarray(labels))
    np.testing.assert_allclose(by_labels, truth.label_gradient, rtol=1e-6)
    assert np.isposinf(by_labels[0, 1])


@both
def test_one_hot_built_inside_equals_one_hot_passed_in(transform):
    rows, ids = jnp.array([[0.0, -INF, 1.0]]), jnp.array([0])
    inside = transform(lambda x, y: DENSE(x, jax.nn.one_hot(y, 3)))(rows, ids)
    passed = transform(DENSE)(rows, jax.nn.one_hot(ids, 3))
    np.testing.assert_array_equal(inside, passed)
    np.testing.assert_allclose(inside, [np.log1p(np.e)], rtol=1e-6)


@both
@pytest.mark.parametrize(
    "targets", [[0, 0, 0], [2, 0, 0], [1, -1, 0.5], [1, 1, 0], [0.2, 0.2, 0.2]]
)
def test_targets_of_any_sum(transform, targets):
    rows, labels = np.array([[0.3, -1.0, 2.0]]), np.array([targets], np.float32)
    losses, gradients = evaluate(transform, DENSE, rows, labels)
    truth = oracle.softmax_cross_entropy(rows.astype(np.float32), labels)
    np.testing.assert_allclose(losses, truth.value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradients, truth.gradient, rtol=1e-5, atol=1e-7)


@both
@pytest.mark.parametrize(
    "bad",
    shortened([3, 100, -4, -1, -100, 2**31 - 1, -(2**31)], kept=[3, -1, -(2**31)]),
)
@pytest.mark.parametrize("loss", [INTEGER, xent_jax.nll_loss], ids=["softmax", "nll"])
def test_bad_ids(transform, loss, bad):
    rows = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    ids = np.array([bad, 1], np.int32)
    losses, gradients = evaluate(transform, loss, rows, ids)
    assert np.isnan(losses[0])
    assert np.isnan(gradients[0]).all()
    alone = evaluate(transform, loss, rows[1:], ids[1:])
    np.testing.assert_array_equal(losses[1:], alone[0])
    np.testing.assert_array_equal(gradients[1:], alone[1])
    dropped = evaluate(transform, loss, rows, ids, where=np.array([False, True]))
    np.testing.assert_array_equal(dropped[0], [0, alone[0][0]])
    np.testing.assert_array_equal(dropped[1], [[0, 0, 0], alone[1][0]])


@pytest.mark.once
@both
@pytest.mark.parametrize(
    "dtype",
    shortened(
        ["int8", "uint8", "int16", "uint16", "int32", "uint32"], kept=["int8", "uint16"]
    ),
)
@pytest.mark.parametrize("loss", [INTEGER, xent_jax.nll_loss], ids=["softmax", "nll"])
def test_narrow_ids_do_not_wrap(transform, loss, dtype, rng):
    """300 classes: an 8-bit iota or comparison would find class 5 twice."""
    logits = rng.standard_normal((4, 300)).astype(np.float32)
    ids = np.array([5, 44, 100, 127]).astype(dtype)
    narrow = evaluate(transform, loss, logits, ids)
    wide = evaluate(transform, loss, logits, ids.astype(np.int32))
    np.testing.assert_array_equal(narrow[0], wide[0])
    np.testing.assert_array_equal(narrow[1], wide[1])


@both
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_wide_ids_do_not_wrap(transform, dtype, x64):
    """2³² + 1 is no class, though its low 32 bits are."""
    ids = np.array([1, 2**32 + 1], dtype)
    losses, gradients = evaluate(transform, INTEGER, np.zeros((2, 3)), ids)
    np.testing.assert_allclose(losses, [np.log(3), NAN], rtol=1e-6)
    assert np.isnan(gradients[1]).all()


HELD = {
    "NaN": [NAN, 0.0, 1.0],
    "inf": [0.0, INF, 1.0],
    "all -inf": [-INF, -INF, -INF],
    "numbers": [3.0, 4.0, 5.0],
}


@both
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("kind", ["integer", "dense", "options", "nll", "sigmoid"])
def test_dropped_rows_are_exactly_zero(transform, held, kind):
    rows = np.array([HELD[held], [0.0, 1.0, 2.0]])
    keep = np.array([False, True])
    labels, options, loss = np.array([7, 1]), {}, INTEGER
    if kind == "nll":
        loss = xent_jax.nll_loss
    elif kind == "dense":
        loss, labels = DENSE, np.array([[NAN, INF, 1], [0, 1, 0]], np.float32)
    elif kind == "sigmoid":
        loss, labels = SIGMOID, np.array([[NAN, INF, 1], [0, 1, 0]], np.float32)
    elif kind == "options":
        options = {
            "label_smoothing": 0.1,
            "class_weights": np.array([1.0, 2.0, 3.0], np.float32),
            "z_loss": 0.01,
        }
    where = np.broadcast_to(keep[:, None], (2, 3)) if kind == "sigmoid" else keep
    losses, gradients = evaluate(transform, loss, rows, labels, where=where, **options)
    np.testing.assert_array_equal(losses[0], 0 * losses[1])
    np.testing.assert_array_equal(gradients[0], [0, 0, 0])
    alone = evaluate(transform, loss, rows[1:], labels[1:], **options)
    np.testing.assert_allclose(losses[1:], alone[0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1:], alone[1], rtol=1e-6)


@both
@pytest.mark.parametrize("held", HELD)
def test_dropped_rows_have_zero_derivatives_of_every_kind(transform, held):
    rows = jnp.asarray([HELD[held], [0.0, 1.0, 2.0]], jnp.float32)
    ids, keep = jnp.array([9, 1]), jnp.array([False, True])

    def total(rows, weights):
        options = {"label_smoothing": 0.1, "class_weights": weights, "z_loss": 0.1}
        return INTEGER(rows, ids, where=keep, **options).sum()

    weights = jnp.array([1.0, 2.0, 3.0])
    by_weights = transform(jax.grad(total, argnums=1))(rows, weights)
    alone = jax.grad(
        lambda w: INTEGER(
            rows[1:], ids[1:], label_smoothing=0.1, class_weights=w, z_loss=0.1
        ).sum()
    )(weights)
    np.testing.assert_allclose(by_weights, alone, rtol=1e-6)
    # A tangent of NaN in a dropped row has no effect either.
    tangent = jnp.array([[NAN, INF, 1.0], [1.0, 2.0, 3.0]])
    slope = transform(lambda x, d: jax.jvp(lambda x: total(x, weights), (x,), (d,))[1])(
        rows, tangent
    )
    assert np.isfinite(slope)
    hessian = transform(jax.hessian(total))(rows, weights)
    assert not np.any(hessian[0])
    assert not np.any(hessian[:, :, 0])
    assert np.isfinite(hessian).all()


@both
@pytest.mark.parametrize("loss", [INTEGER, DENSE], ids=["integer", "dense"])
@pytest.mark.parametrize("held", [NAN, INF, -INF, 3.0])
def test_dropped_classes(transform, loss, held, rng):
    logits = rng.standard_normal((3, 5)).astype(np.float32)
    keep = np.array([True, True, False, True, False])
    rows = np.where(keep, logits, np.float32(held))
    where = np.broadcast_to(keep, rows.shape)
    labels = np.array([0, 1, 3])
    if loss is DENSE:
        labels = rng.random((3, 5)).astype(np.float32)
    losses, gradients = evaluate(
        transform, loss, rows, labels, where=where, label_smoothing=0.2
    )
    assert not gradients[:, ~keep].any()
    fewer = np.array([0, 1, 2]) if loss is INTEGER else labels[:, keep]
    alone = evaluate(transform, loss, logits[:, keep], fewer, label_smoothing=0.2)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-6)
    np.testing.assert_allclose(gradients[:, keep], alone[1], rtol=1e-5, atol=1e-7)


@both
def test_label_on_a_dropped_class(transform):
    keep = np.array([[True, False, True]])
    ids = np.array([1])
    losses, gradients = evaluate(transform, INTEGER, [[0.0, 5.0, 1.0]], ids, where=keep)
    np.testing.assert_array_equal(losses, [INF])
    np.testing.assert_allclose(gradients, [two(1)], rtol=1e-6)
    nll = evaluate(transform, xent_jax.nll_loss, [[0.0, 5.0, 1.0]], ids, where=keep)
    np.testing.assert_array_equal(nll[0], [INF])


@both
@pytest.mark.parametrize("loss", [INTEGER, DENSE], ids=["integer", "dense"])
def test_row_with_nothing_kept(transform, loss):
    rows = np.array([[NAN, 1.0, 2.0], [0.0, 1.0, 2.0]])
    where = np.array([[False] * 3, [True] * 3])
    labels = np.array([1, 1]) if loss is INTEGER else np.eye(3, dtype=np.float32)[:2]
    losses, gradients = evaluate(
        transform, loss, rows, labels, where=where, z_loss=0.1, label_smoothing=0.1
    )
    assert losses[0] == 0
    assert not gradients[0].any()
    assert losses[1] > 0
    hessian = transform(
        jax.hessian(
            lambda x: loss(x, jnp.asarray(labels), where=jnp.asarray(where)).sum()
        )
    )(jnp.asarray(rows, jnp.float32))
    assert np.isfinite(hessian).all()


@both
def test_smoothing_over_a_minus_inf_class(transform):
    rows, ids = np.array([[0.0, 1.0, -INF]]), np.array([0])
    losses, _ = evaluate(transform, INTEGER, rows, ids, label_smoothing=0.1)
    np.testing.assert_array_equal(losses, [INF])
    where = np.array([[True, True, False]])
    masked = evaluate(transform, INTEGER, rows, ids, label_smoothing=0.1, where=where)
    truth = oracle.softmax_cross_entropy_with_integer_labels(
        rows[:, :2], ids, label_smoothing=0.1
    )
    np.testing.assert_allclose(masked[0], truth.value, rtol=1e-6)
    np.testing.assert_allclose(masked[1][:, :2], truth.gradient, rtol=1e-5)


@both
def test_class_weight_zero_drops_an_infinite_loss(transform):
    rows, ids = np.array([[0.0, 1.0, -INF]]), np.array([2])
    weights = np.array([1.0, 1.0, 0.0], np.float32)
    losses, gradients = evaluate(transform, INTEGER, rows, ids, class_weights=weights)
    np.testing.assert_array_equal(losses, [0])
    np.testing.assert_array_equal(gradients, [[0, 0, 0]])


@both
def test_smoothing_with_class_weights_is_the_convention_of_torch(transform):
    rows = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]], np.float32)
    ids, weights = np.array([0, 2]), np.array([1.0, 2.0, 3.0], np.float32)
    losses, _ = evaluate(
        transform, INTEGER, rows, ids, label_smoothing=0.1, class_weights=weights
    )
    surprise = -np.log(oracle.softmax(rows))
    own = weights[ids] * surprise[[0, 1], ids]
    truth = 0.9 * own + 0.1 * (weights * surprise).sum(-1) / 3
    np.testing.assert_allclose(losses, truth, rtol=1e-6)


@both
@pytest.mark.parametrize(
    ("logit", "label", "value", "gradient"),
    [
        (INF, 1.0, 0.0, 0.0),
        (INF, 0.0, INF, 1.0),
        (-INF, 0.0, 0.0, 0.0),
        (-INF, 1.0, INF, -1.0),
        (INF, 0.5, INF, 0.5),
        (NAN, 1.0, NAN, NAN),
        (0.0, 1.0, np.log(2), -0.5),
        (1e4, 1.0, 0.0, 0.0),
        (-1e4, 1.0, 1e4, -1.0),
        (1.0, 2.0, np.log1p(np.e) - 2, 1 / (1 + np.exp(-1)) - 2),
    ],
)
def test_special_values_of_the_sigmoid(transform, logit, label, value, gradient):
    labels = np.array([label], np.float32)
    losses, gradients = evaluate(transform, SIGMOID, [logit], labels)
    np.testing.assert_allclose(losses, [value], rtol=1e-6)
    np.testing.assert_allclose(gradients, [gradient], rtol=1e-6)


@both
@pytest.mark.parametrize("loss", [INTEGER, DENSE, xent_jax.nll_loss])
@pytest.mark.parametrize("classes", [3, 2048])
@pytest.mark.parametrize("batch", [(0,), (3, 0)])
def test_empty_batch(transform, loss, classes, batch):
    logits = np.zeros((*batch, classes))
    labels = logits.astype(np.float32) if loss is DENSE else np.zeros(batch, np.int32)
    losses, gradients = evaluate(transform, loss, logits, labels)
    assert losses.shape == batch
    assert gradients.shape == logits.shape


@both
def test_a_batch_of_no_dimension(transform):
    losses, gradients = evaluate(transform, INTEGER, [0.0, 1.0, 2.0], np.array(1))
    np.testing.assert_allclose(losses, -np.log(ROW3[1]), rtol=1e-6)
    np.testing.assert_allclose(gradients, ROW3 - [0, 1, 0], rtol=1e-6)


@pytest.mark.once
@both
@pytest.mark.parametrize("axis", shortened([0, 1, 2, -1, -2, -3], kept=[1]))
@pytest.mark.parametrize("loss", [INTEGER, DENSE, xent_jax.nll_loss])
def test_any_axis(transform, axis, loss, rng):
    shape = (3, 4, 5)
    logits = rng.standard_normal(shape).astype(np.float32)
    batch = tuple(np.delete(shape, axis))
    labels = rng.integers(0, shape[axis], batch)
    if loss is DENSE:
        labels = rng.random(shape).astype(np.float32)
    keep = rng.random(batch) < 0.7

    def at(logits, labels, keep):
        return loss(logits, labels, axis, keep)

    moved = np.moveaxis(labels, axis, -1) if loss is DENSE else labels
    losses, gradients = evaluate(transform, at, logits, labels, keep)
    last = evaluate(
        transform,
        lambda x, y, k: loss(x, y, where=k),
        np.moveaxis(logits, axis, -1),
        moved,
        keep,
    )
    np.testing.assert_allclose(losses, last[0], rtol=1e-6)
    np.testing.assert_allclose(
        np.moveaxis(gradients, axis, -1), last[1], rtol=1e-5, atol=1e-7
    )


@pytest.mark.once
@both
@pytest.mark.parametrize(
    ("axis", "masked"),
    shortened(
        itertools.product([(2, 3), (3, 2), (0, 2), (-1, 1), (1,), None], [False, True]),
        kept=[((3, 2), True), (None, False)],
    ),
)
def test_several_axes(transform, axis, masked, rng):
    shape = (2, 3, 4, 5)
    logits = rng.standard_normal(shape).astype(np.float32)
    axes = tuple(range(4)) if axis is None else tuple(a % 4 for a in axis)
    batch_axes = tuple(a for a in range(4) if a not in axes)
    batch = tuple(shape[a] for a in batch_axes)
    classes = int(np.prod([shape[a] for a in axes]))
    ids = rng.integers(0, classes, batch)
    weights = rng.random(classes).astype(np.float32)
    flat = logits.transpose(batch_axes + axes).reshape(*batch, classes)
    one_hot = np.arange(classes) == ids[..., None]
    flat_where = one_hot | (rng.random(flat.shape) < 0.8) | (not masked)

    def unflatten(array):
        array = array.reshape([shape[a] for a in batch_axes + axes])
        return array.transpose(np.argsort(batch_axes + axes))

    options = {"class_weights": weights, "label_smoothing": 0.1}
    truth = oracle.softmax_cross_entropy_with_integer_labels(
        flat, ids, where=flat_where, **options
    )
    where, dense = unflatten(flat_where), unflatten(one_hot.astype(np.float32))
    for loss, labels in ((INTEGER, ids), (DENSE, dense)):

        def at(logits, labels, where, loss=loss, **options):
            return loss(logits, labels, axis, where, **options)

        losses, gradients = evaluate(transform, at, logits, labels, where, **options)
        np.testing.assert_allclose(losses, truth.value, rtol=2e-6)
        np.testing.assert_allclose(
            gradients, unflatten(truth.gradient), rtol=1e-5, atol=1e-7
        )


@both
def test_a_factor_of_zero_on_an_impossible_class(transform):
    """0·inf is not formed in the derivatives by labels and weights either."""
    row, one_hot = jnp.array([[0.0, -INF, 1.0]]), jnp.array([[1.0, 0.0, 0.0]])

    def total(labels, weights, smoothing=0.0):
        return DENSE(
            row, labels, class_weights=weights, label_smoothing=smoothing
        ).sum()

    first, last = -np.log(oracle.softmax(np.array([0.0, 1.0])))
    weights = jnp.array([1.0, 0.0, 2.0])
    by_labels, by_weights = transform(jax.grad(total, argnums=(0, 1)))(one_hot, weights)
    np.testing.assert_allclose(by_labels[0], [first, 0, 2 * last], rtol=1e-6)
    np.testing.assert_allclose(by_weights, [first, 0, 0], rtol=1e-6)
    by_weights = transform(jax.grad(total, argnums=1))(one_hot, jnp.ones(3))
    np.testing.assert_allclose(by_weights, [first, 0, 0], rtol=1e-6)

    def answer(label, weight):
        return SIGMOID(jnp.float32(-INF), label, pos_weight=weight)

    by_label = transform(jax.grad(answer))(0.0, 0.0)
    assert by_label == 0


@both
@pytest.mark.parametrize("mask", ["rows", "classes"])
def test_dropped_targets_leak_into_no_derivative(transform, mask):
    """NaN labels where nothing counts, by every other argument."""
    logits = jnp.array([[1.0, 2.0, -0.5], [0.3, -1.0, 2.0]])
    where = jnp.array([True, False])
    labels = jnp.array([[0.2, 0.3, 0.5], [NAN, NAN, INF]])
    if mask == "classes":
        where = jnp.array([[True, True, False], [False, True, True]])
        labels = jnp.array([[0.2, 0.8, NAN], [INF, 0.5, 0.5]])

    def total(logits, weights, smoothing, z_loss):
        options = {"class_weights": weights, "label_smoothing": smoothing}
        return DENSE(logits, labels, where=where, z_loss=z_loss, **options).sum()

    point = (logits, jnp.array([1.0, 2.0, 3.0]), jnp.float32(0.1), jnp.float32(0.1))
    gradients = transform(jax.grad(total, argnums=(0, 1, 2, 3)))(*point)
    for gradient in gradients:
        assert np.isfinite(gradient).all()

    def answers(logits, smoothing):
        keep = jnp.isfinite(labels)
        return SIGMOID(logits, labels, where=keep, label_smoothing=smoothing).sum()

    for gradient in transform(jax.grad(answers, argnums=(0, 1)))(logits, point[2]):
        assert np.isfinite(gradient).all()


@both
def test_weights_that_are_not_finite_do_not_reach_what_is_dropped(transform):
    logits, ids = np.array([[1.0, 2.0, 0.0], [0.3, -1.0, 2.0]]), np.array([1, -100])
    weights = np.array([INF, 1.0, 2.0], np.float32)
    keep = np.array([True, False])
    losses, _ = evaluate(
        transform, INTEGER, logits, ids, where=keep, class_weights=weights
    )
    assert np.isfinite(losses).all()
    assert losses[1] == 0
    classes = np.array([[False, True, True], [False, True, True]])
    losses, gradients = evaluate(
        transform,
        INTEGER,
        logits,
        np.array([1, 2]),
        where=classes,
        class_weights=weights * np.array([NAN, 1, 1], np.float32),
        label_smoothing=0.1,
    )
    assert np.isfinite(losses).all()
    assert np.isfinite(gradients).all()


@both
def test_a_smoothing_schedule_may_reach_zero(transform):
    rows, ids = [[0.0, 1.0, -INF]], np.array([0])
    one_hot = np.eye(3, dtype=np.float32)[ids]
    for loss, labels in ((INTEGER, ids), (DENSE, one_hot)):
        losses, gradients = evaluate(
            transform, loss, rows, labels, label_smoothing=np.float32(0)
        )
        np.testing.assert_allclose(losses, [np.log1p(np.e)], rtol=1e-6)
        np.testing.assert_allclose(gradients, [two(2) - [1, 0, 0]], rtol=1e-6)
