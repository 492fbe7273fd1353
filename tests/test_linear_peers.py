"""Defects of other fused heads, each held against this one; PyTorch and optax beside.

The names say whose defect it is: what a peer gets wrong at these points, this head gets
right against the float64 oracle.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from heads import (
    FORMS,
    LOSS,
    OPTIONS,
    STATISTICS,
    assert_close,
    assert_equals_the_oracle,
    cast,
    head_inputs,
    truth_of,
    value_and_gradients,
)

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("unoptimized")]


forms = pytest.mark.parametrize("reduction", [None, "mean"])


def importable(name):
    reason = f"{name} is not installed (extra `peers`)"
    return pytest.importorskip(name, reason=reason, exc_type=ImportError)


def blocks(reduction, size):
    return {"class_block" if reduction is None else "row_block": size}


@forms
def test_tokamax_padding_columns_are_in_the_normalizer(reduction, rng):
    """V = 1000 in blocks of 128 leaves 24 phantom classes of logit 0: +0.02 nats."""
    inputs = cast(head_inputs(rng, (8,), 6, 1000), "float32")
    inputs["kernel"] *= np.float32(0.001)  # As at initialisation: every class counts.
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 7))
    if reduction is None:
        assert_equals_the_oracle(inputs, 1e-5, class_block=128)
    value, _ = value_and_gradients(inputs, reduction=reduction)
    mean = np.sum(value) / (1 if reduction == "mean" else 8)
    np.testing.assert_allclose(mean, np.log(1000), rtol=1e-3)


@forms
@pytest.mark.parametrize("bad", [-100, -1, 9, 10**6])
def test_no_id_is_clamped_wrapped_or_given_a_gradient_without_its_label(
    bad, reduction, rng
):
    """jax-cce clamps in the value alone, optax wraps −1, tokamax returns 0 or lse."""
    inputs = cast(head_inputs(rng, (4,), 3, 9), "float32")
    inputs["labels"][0] = bad
    value, gradients = value_and_gradients(inputs, reduction=reduction)
    assert np.isnan(value.ravel()[0])
    assert np.isnan(gradients["hidden"][0]).all()
    # Spelled as a mask, ids that are to be ignored cost nothing, in value and gradient.
    inputs["where"] = inputs["labels"] >= 0 if bad < 0 else inputs["labels"] < 9
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 2))


@forms
def test_marin_rows_of_negative_labels_have_value_0_and_a_gradient(reduction, rng):
    inputs = cast(head_inputs(rng, (6,), 3, 9, ("bias",)), "float32")
    inputs["labels"] = np.array([1, -100, 2, -100, 0, 3])
    inputs["where"] = inputs["labels"] != -100
    value, gradients = value_and_gradients(inputs, reduction=reduction)
    kept = {k: v[inputs["where"]] for k, v in inputs.items() if np.shape(v)[:1] == (6,)}
    kept |= {"kernel": inputs["kernel"], "bias": inputs["bias"]}
    alone, expected = value_and_gradients(kept, reduction=reduction)
    if reduction is None:
        assert not value[~inputs["where"]].any()
        value = value[inputs["where"]]
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    assert not gradients["hidden"][~inputs["where"]].any()
    for name in ("kernel", "bias"):
        assert_close(gradients[name], expected[name], 2e-6, name)


@forms
def test_unsloth_and_fla_softcap_turns_masked_logits_into_classes(reduction, rng):
    """−softcap instead of −inf for every padded lane, where V is no power of two."""
    inputs = head_inputs(rng, (5,), 3, 100, ("class_mask", "softcap"))
    inputs = cast(inputs, "float32") | {"softcap": np.float32(0.1)}
    # With so small a cap padding of logit −0.1 would be a third of the mass.
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 3))


@forms
def test_levanter_softcap_is_differentiated_in_the_blocks(reduction, rng):
    inputs = cast(head_inputs(rng, (5,), 3, 11, ("softcap", "bias")), "float32")
    inputs["softcap"] = np.float32(0.7)
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 2))


@forms
@pytest.mark.parametrize("size", [6, 7, 9, 10])
def test_levanter_one_block_and_a_remainder_is_not_counted_twice(size, reduction, rng):
    """10 rows and 10 classes in blocks of more than half of them."""
    inputs = cast(head_inputs(rng, (10,), 3, 10), "float32")
    inputs["labels"] = np.arange(10)
    assert_equals_the_oracle(
        inputs, 1e-5, reduction=reduction, **blocks(reduction, size)
    )


@forms
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_t5x_targets_that_do_not_sum_to_one(weight, reduction, rng):
    """A class weight scales the targets: the gradient is (Σt)·p − t, not p − t."""
    inputs = cast(head_inputs(rng, (4,), 3, 6, ("label_smoothing",)), "float32")
    inputs["class_weights"] = np.full(6, weight, np.float32)
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 4))


@forms
def test_t5x_and_liger_the_z_loss_has_its_gradient(reduction, rng):
    inputs = cast(head_inputs(rng, (5,), 3, 7), "float32")
    plain = value_and_gradients(inputs, reduction=reduction)[1]
    inputs["z_loss"] = np.float32(0.3)
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 3))
    gradients = value_and_gradients(inputs, reduction=reduction)[1]
    assert np.abs(gradients["hidden"] - plain["hidden"]).max() > 0.01


def test_t5x_the_cotangent_of_every_output_counts(rng):
    """Of the statistics: log-normalizer and entropy are differentiable too."""
    inputs = cast(head_inputs(rng, (5,), 3, 7), "float32")
    labels = inputs.pop("labels")
    for index in range(3):
        gradient = jax.grad(
            lambda x, i=index: STATISTICS(**x, labels=labels, class_block=3)[i].sum()
        )(jax.tree.map(jnp.asarray, inputs))
        factors = tuple(np.eye(3)[index])
        truth = oracle.linear_softmax_statistics(
            **inputs, labels=labels, factors=factors
        )
        for name in ("hidden", "kernel"):
            assert_close(gradient[name], getattr(truth, name), 2e-6, name)
            assert np.abs(getattr(truth, name)).max() > 0.1


@forms
def test_maxtext_and_axlearn_masking_by_a_product_leaks_nan(reduction, rng):
    inputs = cast(head_inputs(rng, (4,), 3, 6, ("where",)), "float32")
    inputs["where"] = np.array([True, False, True, True])
    inputs["hidden"][1] = np.nan
    value, gradients = value_and_gradients(inputs, reduction=reduction)
    assert np.isfinite(value).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@forms
def test_liger_cotangents_per_row_are_not_those_of_the_sum(reduction, rng):
    """reduction="none" had gradients for equal cotangents alone."""
    inputs = cast(head_inputs(rng, (5,), 3, 7, ("weights",)), "float32")
    cotangent = np.array([3.0, -1.0, 0.0, 2.0, 0.5], np.float32)
    labels, weights = inputs.pop("labels"), inputs.pop("weights")
    static = {"reduction": reduction, **blocks(reduction, 2)}

    def losses(moving):
        return LOSS(**moving, labels=labels, weights=weights, **static)

    value, pullback = jax.vjp(losses, jax.tree.map(jnp.asarray, inputs))
    scale = cotangent if reduction is None else np.float32(-2.5)
    gradients = pullback(jnp.asarray(scale, value.dtype))[0]
    if reduction is None:
        scaled = inputs | {"labels": labels, "weights": weights * cotangent}
        truth, factor = truth_of(scaled, "sum"), 1
    else:
        truth = truth_of(inputs | {"labels": labels, "weights": weights}, reduction)
        factor = scale
    for name, gradient in gradients.items():
        assert_close(gradient, factor * getattr(truth, name), 2e-6, name)


@forms
def test_torch_the_derivative_forward_is_not_silently_0(reduction, rng):
    """torch.func.jvp of its chunked head returns 0.0."""
    inputs = cast(head_inputs(rng, (5,), 3, 7), "float32")
    labels = inputs.pop("labels")
    call = functools.partial(
        LOSS, labels=labels, reduction=reduction, **blocks(reduction, 2)
    )
    tangent = jax.tree.map(lambda a: jnp.asarray(np.cos(a)), inputs)
    slope = jax.jvp(lambda x: call(**x).sum(), (inputs,), (tangent,))[1]
    truth = truth_of(inputs | {"labels": labels}, reduction)
    expected = sum(
        (getattr(truth, k) * np.asarray(v)).sum() for k, v in tangent.items()
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    assert abs(expected) > 0.1


@forms
def test_tokamax_and_axlearn_bfloat16_sums(reduction, rng):
    """The sum of many losses in bfloat16 stops growing at 256 times its terms."""
    inputs = cast(head_inputs(rng, (1024,), 4, 50), "bfloat16")
    value, gradients = value_and_gradients(
        inputs, reduction=reduction, **blocks(reduction, 16)
    )
    assert value.dtype == np.float32
    assert {g.dtype for g in gradients.values()} == {jnp.dtype("bfloat16")}
    truth = truth_of(inputs, reduction)
    np.testing.assert_allclose(value, truth.value, rtol=5e-6)
    # One rounding of the result, and that of the logits' gradient.
    for name, gradient in gradients.items():
        assert_close(gradient, getattr(truth, name), 2**-7, name)


def test_fla_and_te_small_gradients_of_the_label_are_not_erased():
    """A confident label in bfloat16: p rounds to 1, and p − 1 to 0."""
    hidden, kernel = np.array([[12.0]]), np.array([[1.0, 0.0, 0.0]])
    inputs = cast(
        {"hidden": hidden, "kernel": kernel, "labels": np.array([0])}, "bfloat16"
    )
    for reduction in FORMS:
        _, gradients = value_and_gradients(inputs, reduction=reduction)
        truth = truth_of(inputs, reduction)
        np.testing.assert_allclose(
            gradients["kernel"].astype(np.float64), truth.kernel, rtol=2**-7
        )
        assert gradients["kernel"][0, 0] != 0


@forms
def test_megatron_smoothing_counts_the_classes_that_there_are(reduction, rng):
    """Not those of a partition or block: 7 classes of 10, in blocks of 3."""
    inputs = head_inputs(rng, (4,), 3, 10, ("label_smoothing", "class_mask"))
    inputs = cast(inputs, "float32")
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 3))


@forms
def test_cce_the_bias_is_in_value_and_gradient(reduction, rng):
    inputs = cast(head_inputs(rng, (4,), 3, 10, ("bias",)), "float32")
    inputs["bias"] *= np.float32(5)
    assert_equals_the_oracle(inputs, 1e-5, reduction=reduction, **blocks(reduction, 3))


@forms
@pytest.mark.parametrize("rows", [0, 3])
def test_cce_torch_and_quack_a_mean_of_nothing_is_0(rows, reduction, rng):
    inputs = cast(head_inputs(rng, (rows,), 3, 6), "float32")
    inputs["where"] = np.zeros(rows, bool)
    value, gradients = value_and_gradients(inputs, reduction=reduction)
    assert not np.any(value)
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", None])
@pytest.mark.parametrize(
    "options", [("bias",), ("label_smoothing", "class_weights", "bias")]
)
def test_agrees_with_torch(options, reduction, rng):
    """F.linear_cross_entropy of PyTorch 2.13, which holds the logits."""
    torch = importable("torch")
    inputs = cast(head_inputs(rng, (6,), 5, 9, options), "float32")
    inputs["where"] = np.array([True, True, False, True, False, True])
    value, gradients = value_and_gradients(
        inputs, reduction=reduction, **blocks(reduction, 4)
    )
    hidden = torch.tensor(inputs["hidden"], requires_grad=True)
    weight = torch.tensor(inputs["kernel"].T.copy(), requires_grad=True)
    bias = inputs.get("bias")
    bias = None if bias is None else torch.tensor(bias, requires_grad=True)
    weights = inputs.get("class_weights")
    loss = torch.nn.functional.linear_cross_entropy(
        hidden,
        weight,
        torch.tensor(np.where(inputs["where"], inputs["labels"], -100)),
        linear_bias=bias,
        weight=None if weights is None else torch.tensor(weights),
        reduction=reduction or "none",
        ignore_index=-100,
        label_smoothing=float(inputs.get("label_smoothing", 0.0)),
    )
    loss.sum().backward()
    np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-5)
    assert_close(gradients["hidden"], hidden.grad.numpy(), 2e-6)
    assert_close(gradients["kernel"], weight.grad.numpy().T, 2e-6)
    if bias is not None:
        assert_close(gradients["bias"], bias.grad.numpy(), 2e-6)


@forms
def test_agrees_with_optax_on_logits(reduction, rng):
    optax = importable("optax")
    inputs = cast(head_inputs(rng, (2, 5), 4, 9, ("bias", "softcap")), "float32")
    value, gradients = value_and_gradients(
        inputs, reduction=reduction, **blocks(reduction, 4)
    )

    def dense(x):
        logits = x["hidden"] @ x["kernel"] + x["bias"][None, None]
        logits = x["softcap"] * jnp.tanh(logits / x["softcap"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(inputs["labels"])
        )
        return {None: lambda: losses, "sum": losses.sum, "mean": losses.mean}[
            reduction
        ]()

    moving = {k: jnp.asarray(v) for k, v in inputs.items() if k != "labels"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = dense(moving)
        slopes = jax.grad(lambda x: dense(x).sum())(moving)
    np.testing.assert_allclose(value, theirs, rtol=2e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, slopes[name], 5e-6, name)


def test_jax_cce_and_tokamax_any_number_of_batch_axes(rng):
    """3-D features are refused, or silently wrong, elsewhere."""
    inputs = cast(head_inputs(rng, (2, 3, 2), 3, 6, OPTIONS), "float32")
    for reduction in FORMS:
        assert_equals_the_oracle(
            inputs, 1e-5, reduction=reduction, **blocks(reduction, 4)
        )
