"""The assertions that users call: they pass where the law holds and only there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened
from losses import EACH, unpacked

import xent_jax
from xent_jax import testing

INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels
DENSE = xent_jax.softmax_cross_entropy
SPARSE = xent_jax.softmax_cross_entropy_with_sparse_targets


def call_of(case, labels):
    """Returns the public function, its labels and its options."""
    if case.kind != "sparse":
        return case.loss, labels, case.options
    arguments = unpacked(labels)
    return SPARSE, arguments["indices"], case.options | {"probs": arguments["probs"]}


@pytest.mark.parametrize("case", EACH)
def test_every_loss_obeys_its_law(case, rng):
    inputs, labels = case.inputs(rng)
    labels = labels if case.kind == "ids" else labels.astype(np.float32)
    inputs = inputs.astype(np.float32)
    bound = 4e-6 if case.positive else None
    loss, labels, options = call_of(case, labels)
    testing.assert_gradient_law(loss, inputs, labels, bound=bound, **options)
    law = testing.law_of(loss)
    testing.assert_law_differentiates(law, inputs, labels, **options)


@pytest.mark.parametrize("case", EACH)
def test_the_laws_equal_the_oracle_of_the_tests(case, rng):
    """Two people's float64 formulas of the same loss."""
    inputs, labels = case.inputs(rng)
    truth = case.truth(inputs, labels)
    loss, labels, options = call_of(case, labels)
    law = testing.law_of(loss)
    value = law.value(inputs, labels, **options)
    if isinstance(truth, oracle.Loss):
        gradient = law.gradient(inputs, labels, **options)
        np.testing.assert_allclose(gradient, truth.gradient, rtol=1e-9, atol=1e-12)
        truth = truth.value
    np.testing.assert_allclose(value, truth, rtol=1e-12)


@pytest.mark.once
@pytest.mark.parametrize("loss", [INTEGER, DENSE])
@pytest.mark.parametrize("axis", shortened([0, 1, -1], kept=[1]))
def test_masks_and_axes(loss, axis, rng):
    logits = rng.standard_normal((4, 4)).astype(np.float32)
    ids = rng.integers(0, 4, 4)
    dense = np.moveaxis(np.eye(4, dtype=np.float32)[ids], -1, axis)
    labels = ids if loss is INTEGER else dense
    classes = rng.random((4, 4)) < 0.7
    one_hot = np.moveaxis(np.eye(4, dtype=bool)[ids], -1, axis)
    for where in (np.array([True, False, True, True]), classes | one_hot, classes):
        testing.assert_gradient_law(loss, logits, labels, axis=axis, where=where)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, rng):
    logits = jnp.asarray(rng.standard_normal((5, 9)), dtype)
    testing.assert_gradient_law(INTEGER, logits, rng.integers(0, 9, 5))


def test_a_loss_of_ones_own(rng):
    logits, ids = rng.standard_normal((3, 4)).astype(np.float32), np.array([0, 1, 2])

    def plain(logits, labels):
        return jax.nn.logsumexp(logits, -1) - logits[jnp.arange(3), labels]

    with pytest.raises(ValueError, match=r"name the law .* law=xent_jax.testing"):
        testing.assert_gradient_law(plain, logits, ids)
    testing.assert_gradient_law(plain, logits, ids, law=testing.SOFTMAX_LAW)
    # It cannot do a confident row.
    logits[0, 0] = 30
    with pytest.raises(AssertionError):
        testing.assert_gradient_law(plain, logits, ids, law=testing.SOFTMAX_LAW)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y: 1.001 * INTEGER(x, y),
        lambda x, y: INTEGER(x, y) + 1e-3 * x.sum(-1),
        lambda x, y: INTEGER(jax.nn.softmax(x), y),
        lambda x, y: INTEGER(x, y, label_smoothing=1e-3),
        lambda x, y: jax.lax.stop_gradient(INTEGER(x, y)),
    ],
)
def test_a_wrong_gradient_is_found(wrong, rng):
    logits, ids = rng.standard_normal((3, 4)).astype(np.float32), np.array([0, 1, 2])
    with pytest.raises(AssertionError):
        testing.assert_gradient_law(wrong, logits, ids, law=testing.SOFTMAX_LAW)


def test_a_wrong_forward_mode_is_found(rng):
    @jax.custom_jvp
    def broken(logits):
        return INTEGER(logits, jnp.array([0, 1, 2]))

    @broken.defjvp
    def _(primals, tangents):
        value, slope = jax.jvp(
            lambda x: INTEGER(x, jnp.array([0, 1, 2])), primals, tangents
        )
        return value, 1.01 * slope

    logits = rng.standard_normal((3, 4)).astype(np.float32)
    with pytest.raises(AssertionError):
        testing.assert_gradient_law(
            lambda x, y: broken(x), logits, np.array([0, 1, 2]), law=testing.SOFTMAX_LAW
        )


def test_a_jitted_loss_has_the_law_of_the_loss(rng):
    logits, ids = rng.standard_normal((3, 4)).astype(np.float32), np.array([0, 1, 2])
    testing.assert_gradient_law(jax.jit(INTEGER), logits, ids)


def test_bad_arguments_get_the_message_of_the_loss(rng):
    logits, ids = rng.standard_normal((3, 4)).astype(np.float32), np.array([0, 1])
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        testing.assert_gradient_law(INTEGER, logits, ids)
    with pytest.raises(TypeError, match="unexpected keyword argument 'smoothing'"):
        testing.assert_gradient_law(INTEGER, logits, np.arange(3), smoothing=0.1)


def test_forward_mode_of_a_confident_row_is_not_lost_in_the_batch(rng):
    logits, ids = rng.standard_normal((3, 4)).astype(np.float32), np.array([0, 1, 2])
    logits[0, 0] = 25

    @jax.custom_jvp
    def broken(logits):
        return INTEGER(logits, ids)

    @broken.defjvp
    def _(primals, tangents):
        value, slope = jax.jvp(lambda x: INTEGER(x, ids), primals, tangents)
        return value, slope * jnp.array([1.1, 1, 1])

    direct = testing.SOFTMAX_LAW.gradient(logits, ids)
    magnitude = testing.SOFTMAX_LAW.magnitude(logits, ids)
    slope, truth = testing.forward_mode(broken, jnp.asarray(logits), direct, magnitude)
    np.testing.assert_allclose(slope / truth, [1.1, 1, 1], rtol=1e-5)


def test_bad_ids_are_nan_by_law(rng):
    logits, ids = rng.standard_normal((3, 4)).astype(np.float32), np.array([0, -1, 4])
    testing.assert_gradient_law(INTEGER, logits, ids)
    keep = np.array([True, False, False])
    testing.assert_gradient_law(INTEGER, logits, ids, where=keep)


def test_a_wrong_law_is_found():
    wrong = testing.Law(
        testing.SOFTMAX_LAW.value,
        functools.partial(testing.SOFTMAX_LAW.gradient, label_smoothing=0.1),
        testing.SOFTMAX_LAW.magnitude,
    )
    with pytest.raises(AssertionError):
        testing.assert_law_differentiates(wrong, np.eye(3), np.array([0, 1, 2]))


def test_runs_on_the_device_asked_for(rng):
    device, seen = jax.devices()[3], set()

    def spy(logits, labels):
        # The labels are concrete: only the logits are differentiated.
        seen.update(labels.devices())
        return INTEGER(logits, labels)

    logits, ids = rng.standard_normal((3, 4)).astype(np.float32), np.array([0, 1, 2])
    testing.assert_gradient_law(
        spy, logits, ids, law=testing.SOFTMAX_LAW, device=device
    )
    assert seen == {device}


def test_all_of_a_dropped_batch_is_zero(rng):
    logits, ids = np.full((3, 4), np.nan, np.float32), np.array([0, 1, 2])
    testing.assert_gradient_law(INTEGER, logits, ids, where=np.zeros(3, bool))
