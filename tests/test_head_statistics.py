"""Temperature in heads, and statistics beside the loss and of given logits."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from heads import head_inputs

import xent_jax

HEAD = xent_jax.linear_softmax_cross_entropy
STATISTICS = xent_jax.linear_softmax_statistics
GIVEN = xent_jax.softmax_statistics
REDUCTIONS = (None, "mean", "sum")


def inputs_of(rng, *options, classes=37):
    inputs = head_inputs(rng, (3, 4), 6, classes, options)
    return jax.tree.map(
        lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, inputs
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "kind", ["rows", pytest.param("number", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("options", [(), ("bias", "where", "class_mask", "softcap")])
def test_temperature_divides_the_logits(options, kind, reduction, rng, unoptimized):
    inputs = inputs_of(rng, *options)
    shape = () if kind == "number" else inputs["labels"].shape
    temperature = rng.uniform(0.4, 2, shape).astype(np.float32)
    block = {"class_block": 16} if reduction is None else {"row_block": 5}
    where = inputs.get("where")

    def head(hidden, temperature):
        arguments = inputs | {"hidden": hidden, "temperature": temperature}
        return HEAD(**arguments, reduction=reduction, **block)

    def given(hidden, temperature):
        logits = hidden @ inputs["kernel"]
        logits = logits + np.broadcast_to(
            inputs.get("bias", np.float32(0)), logits.shape
        )
        cap = inputs.get("softcap")
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        batch = jnp.broadcast_to(temperature, logits.shape[:-1])
        logits = logits / batch[..., None]
        keep = np.broadcast_to(inputs.get("class_mask", True), logits.shape)
        keep = keep if where is None else keep & where[..., None]
        loss = xent_jax.softmax_cross_entropy_with_integer_labels(
            logits, inputs["labels"], where=keep
        )
        if reduction == "mean":
            return xent_jax.weighted_mean(loss, where=where)
        return loss if reduction is None else loss.sum()

    arguments = inputs["hidden"], temperature
    np.testing.assert_allclose(head(*arguments), given(*arguments), rtol=1e-5)
    for mode in (jax.grad, jax.jacfwd):
        slopes = [
            jax.jit(mode(lambda h, t, f=f: f(h, t).sum(), (0, 1)))(*arguments)
            for f in (head, given)
        ]
        for one, other in zip(*slopes, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_temperature_is_not_rounded_with_the_features(rng):
    """A quotient of bfloat16 features would be off by 0.4 %."""
    hidden = jnp.asarray(rng.standard_normal((8, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((16, 50)), jnp.bfloat16)
    labels = rng.integers(0, 50, 8)
    found = STATISTICS(hidden, kernel, labels, temperature=0.3)
    wide = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64) / 0.3
    truth = -oracle.softmax_cross_entropy_with_integer_labels(wide, labels).value
    np.testing.assert_allclose(found.log_prob, truth, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, np.inf, 1e-46])
def test_a_temperature_that_is_none_is_refused(temperature, rng):
    inputs = inputs_of(rng)
    with pytest.raises(ValueError, match="temperature must lie in"):
        HEAD(**inputs, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must have shape"):
        HEAD(**inputs, temperature=np.ones(3))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options", [(), ("where", "weights", "label_smoothing", "bias")]
)
def test_statistics_beside_the_loss(options, reduction, rng, unoptimized):
    inputs = inputs_of(rng, *options)
    block = {"class_block": 16} if reduction is None else {"row_block": 5}

    def with_statistics(hidden):
        arguments = inputs | {"hidden": hidden}
        both = HEAD(**arguments, reduction=reduction, with_statistics=True, **block)
        return both[0].sum(), both

    (_, (loss, statistics)), gradient = jax.jit(
        jax.value_and_grad(with_statistics, has_aux=True)
    )(inputs["hidden"])
    plain = HEAD(**inputs, reduction=reduction, **block)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    by_plain = jax.grad(
        lambda h: HEAD(**inputs | {"hidden": h}, reduction=reduction, **block).sum()
    )
    np.testing.assert_allclose(
        gradient, by_plain(inputs["hidden"]), rtol=1e-5, atol=1e-6
    )
    names = ("hidden", "kernel", "labels", "bias")
    rest = {name: inputs[name] for name in names if name in inputs}
    alone = STATISTICS(**rest, where=inputs.get("where"))
    for name, one, other in zip(statistics._fields, statistics, alone, strict=True):
        assert one.shape == inputs["labels"].shape
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_statistics_of_a_mean_are_constants(reduction, rng):
    inputs = inputs_of(rng)

    def entropy(hidden):
        arguments = inputs | {"hidden": hidden}
        statistics = HEAD(**arguments, reduction=reduction, with_statistics=True)[1]
        return statistics.entropy.sum() + statistics.log_prob.sum()

    assert not np.any(jax.grad(entropy)(inputs["hidden"]))
    assert jax.jvp(entropy, (inputs["hidden"],), (inputs["hidden"],))[1] == 0


def test_statistics_of_each_row_are_differentiable(rng):
    inputs = inputs_of(rng)

    def entropy(hidden, function, **static):
        result = function(**inputs | {"hidden": hidden}, **static)
        return (result[1] if static else result).entropy.sum()

    one = jax.grad(entropy)(inputs["hidden"], HEAD, with_statistics=True)
    other = jax.grad(entropy)(inputs["hidden"], STATISTICS)
    assert np.any(one)
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_statistics_take_no_further_matmul(reduction, rng):
    inputs = inputs_of(rng)

    def dots(with_statistics):
        def loss(hidden, kernel):
            arguments = inputs | {"hidden": hidden, "kernel": kernel}
            result = HEAD(
                **arguments, reduction=reduction, with_statistics=with_statistics
            )
            loss, aux = result if with_statistics else (result, None)
            return loss.sum(), aux

        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        text = run.lower(inputs["hidden"], inputs["kernel"]).as_text()
        return text.count("stablehlo.dot_general")

    assert dots(True) == dots(False)


@pytest.mark.parametrize("flag", [1, None, "yes", np.True_])
def test_with_statistics_is_a_python_boolean(flag, rng):
    with pytest.raises(TypeError, match="with_statistics must be True or False"):
        HEAD(**inputs_of(rng), with_statistics=flag)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [None, "rows", "classes"])
def test_statistics_of_given_logits(masked, dtype, rng):
    logits = jnp.asarray(3 * rng.standard_normal((6, 40)), dtype)
    labels = rng.integers(0, 40, 6)
    where = None if masked is None else rng.random((6, 40)) < 0.7
    if where is not None:
        where[np.arange(6), labels] = True
    where = where[:, 0] if masked == "rows" else where
    found = GIVEN(logits, labels, where=where)
    wide = np.asarray(logits, np.float64)
    keep = np.ones((6, 40), bool) if masked != "classes" else where
    rows = np.ones(6, bool) if masked != "rows" else where
    wide = np.where(keep, wide, -np.inf)
    logs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    entropy = -(np.exp(logs) * np.where(keep, logs, 0)).sum(-1)
    own = logs[np.arange(6), labels]
    np.testing.assert_allclose(found.log_prob, np.where(rows, own, 0), rtol=2e-6)
    np.testing.assert_allclose(found.entropy, np.where(rows, entropy, 0), rtol=2e-6)
    prediction = np.where(rows, wide.argmax(-1), -1)
    np.testing.assert_array_equal(found.prediction, prediction)
    assert found.prediction.dtype == jnp.int32


def test_the_entropy_beside_masked_actions(rng):
    """Finite, with a finite gradient, and accurate where a policy is confident."""
    logits = rng.standard_normal((3, 9)).astype(np.float32)
    logits[:, 4:] = -np.inf
    logits[1, 0] += 40
    labels = np.array([0, 0, 1])

    def entropy(logits):
        return GIVEN(logits, labels).entropy

    kept = logits[:, :4].astype(np.float64)
    kept = kept - kept.max(-1, keepdims=True)
    power = np.exp(kept)
    rest = np.sort(power, -1)[:, :-1].sum(-1)
    # log(1 + rest) + Σ p·(largest − x): no term is negative.
    truth = np.log1p(rest) - (power * kept).sum(-1) / (1 + rest)
    np.testing.assert_allclose(entropy(logits), truth, rtol=2e-6)
    gradient = jax.grad(lambda x: entropy(x).sum())(logits)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[:, 4:])
    hessian = jax.hessian(lambda x: entropy(x).sum())(logits)
    assert np.all(np.isfinite(hessian))
