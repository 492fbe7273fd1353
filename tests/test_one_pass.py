"""The maximum and the sum relative to it in one pass, as a GPU makes them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import xent_jax
from xent_jax._reductions.lowering import Place
from xent_jax._reductions.one_pass import sums_relative_to_maximum
from xent_jax._targets import rivals


def test_sums_are_those_of_two_passes():
    values = jax.random.normal(jax.random.key(0), (5, 300)) * 5
    values = values.at[1, :7].set(-jnp.inf).at[2].multiply(1e30)
    numbers = jax.random.normal(jax.random.key(1), values.shape)
    wide = np.asarray(values, np.float64)
    expected = np.max(wide, 1), np.sum(np.exp(wide - wide.max(1, keepdims=True)), 1)
    for axis, order in ((-1, (0, 1)), (-2, (1, 0))):
        turned = values.transpose(order), numbers.transpose(order)
        found = sums_relative_to_maximum(*turned, axis)
        largest, total, added = (jnp.squeeze(part, axis) for part in found)
        np.testing.assert_array_equal(largest, expected[0])
        # Each of a number's partial sums is rounded, and scaled by a rounded power.
        np.testing.assert_allclose(total, expected[1], rtol=2e-5)
        np.testing.assert_allclose(added, numbers.sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "largest", "total"),
    [
        ([-math.inf, -math.inf], -math.inf, 0),
        ([float(jnp.finfo(jnp.float32).min), -math.inf], -3.4028235e38, 1),
        ([1, math.inf], math.inf, math.nan),
        ([math.nan, 1], math.nan, math.nan),
        ([3, 3], 3, 2),
    ],
)
def test_special_values(row, largest, total):
    values = jnp.array([row], jnp.float32)
    found = sums_relative_to_maximum(values, jnp.zeros_like(values), -1)
    np.testing.assert_array_equal(found[0], [[np.float32(largest)]])
    np.testing.assert_array_equal(found[1], [[total]])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Returns a function after which that is chosen which is lowered for a GPU."""

    def chosen(default, at, **_):
        return at(Place(None, True)) or default

    def choose():
        monkeypatch.setattr(rivals, "by_place", chosen)
        jax.clear_caches()

    yield choose
    jax.clear_caches()


def test_masked_losses_and_gradients_are_those_of_two_passes(as_on_a_gpu):
    keys = jax.random.split(jax.random.key(2), 3)
    logits = 3 * jax.random.normal(keys[0], (40, 30))
    logits = logits.at[1, 3].set(jnp.inf).at[2, 4].set(jnp.nan).at[3].set(-jnp.inf)
    labels = jax.random.randint(keys[1], (40,), 0, 30)
    # The labels of some rows are dropped, and all of others.
    keep = jax.random.bernoulli(keys[2], 0.7, logits.shape).at[5].set(False)

    loss = xent_jax.softmax_cross_entropy_with_integer_labels

    def results():
        found = []
        for where in (None, keep, keep[:, 0]):
            value, pull = jax.vjp(lambda x, w=where: loss(x, labels, where=w), logits)
            found += [value, pull(jnp.ones_like(value))[0]]
        return found

    expected = results()
    as_on_a_gpu()
    for found, wanted in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("specs", [("data", None), ("data", "model")])
def test_lowered_inside_a_shard_map(platform, specs):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    name = specs[1]

    def local(logits, labels):
        return xent_jax.softmax_cross_entropy_with_integer_labels(
            logits, labels, class_axis_name=name
        )

    loss = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(jax.P(*specs), jax.P("data")),
        out_specs=jax.P("data"),
    )
    arguments = jnp.zeros((8, 64)), jnp.zeros(8, jnp.int32)
    traced = jax.jit(jax.value_and_grad(lambda *a: loss(*a).mean())).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # A pair and more is reduced on a GPU; a TPU is told what to do in one pass.
    assert ("stablehlo.optimization_barrier" in text) == (platform == "tpu")
    assert bool(re.search(r"stablehlo.reduce\(%\w+ init: %\w+\), \(", text)) == (
        platform == "cuda"
    )


def test_a_confident_row_keeps_its_digits(as_on_a_gpu):
    as_on_a_gpu()
    logits = jnp.array([[60.0, 0.0, -1.0, -math.inf], [0.0, 1.0, 2.0, 3.0]])
    labels = jnp.array([0, 1])
    loss = xent_jax.softmax_cross_entropy_with_integer_labels
    value, pull = jax.vjp(lambda x: loss(x, labels), logits)
    (slope,) = pull(jnp.ones(2))
    rivals_mass = math.exp(-60) * (1 + math.exp(-1))
    expected = [rivals_mass, math.log(sum(map(math.exp, (-1, 0, 1, 2))))]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope[0, 0], -rivals_mass, rtol=1e-6)
    np.testing.assert_allclose(slope.sum(-1), 0, atol=1e-7)
