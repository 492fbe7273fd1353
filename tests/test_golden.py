"""Every loss that five public documents print: its true value, and what went wrong.

The numbers are in golden_cases.json. A printed number without `defect` must be the true
one to its last digit but one unit. A printed number with `defect` is wrong, or is not
the loss that its text speaks of: a test below rebuilds it from the mistake and shows
how far it is from the truth.
"""

import json
from decimal import Decimal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import xent_jax

pytestmark = pytest.mark.once

CASES = {
    case["id"]: case
    for case in json.loads(
        Path(__file__).with_name("golden_cases.json").read_text(encoding="utf-8")
    )["cases"]
}
REDUCTIONS = {
    "none": lambda loss: loss,
    "mean": jnp.mean,
    "sum": jnp.sum,
    "half sum": lambda loss: jnp.sum(loss) / 2,
}
# Losses of probabilities in float32: log1p(p − 1) of a rounded p, and p / Σp rounds p
# once more, which is an absolute error of the loss.
FROM_PROBABILITIES = ("categorical_cross_entropy", "binary_cross_entropy")


def arrays(inputs: dict, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns the two arguments of a loss; whole numbers stay integers."""
    first, labels = (np.asarray(value) for value in inputs.values())
    if labels.dtype.kind == "f":
        labels = labels.astype(dtype)
    return jnp.asarray(first, dtype), jnp.asarray(labels)


def run(case: dict, dtype: jnp.dtype = jnp.float32, *, jit: bool = False) -> np.ndarray:
    """Returns the loss of a case by the public function, reduced as the case says."""
    function = getattr(xent_jax, case["loss"])
    function = jax.jit(function) if jit else function
    loss = function(*arrays(case["inputs"], dtype))
    assert loss.dtype == dtype
    return np.asarray(REDUCTIONS[case.get("reduction", "none")](loss))


def numbers(value: str | list | None) -> np.ndarray:
    """Returns the numbers of (nested) strings."""
    return np.asarray(value, str).astype(np.float64)


def last_place(value: str | list) -> np.ndarray:
    """Returns one unit of the last digit of every printed number."""
    units = [10.0 ** Decimal(str(v)).as_tuple().exponent for v in np.ravel(value)]
    return np.array(units).reshape(np.shape(value))


def printed(name: str) -> np.ndarray:
    return numbers(CASES[name]["printed"])


def true(name: str) -> np.ndarray:
    return numbers(CASES[name]["true"])


def with_defect(*defects: str) -> list[str]:
    return [name for name, case in CASES.items() if case.get("defect") in defects]


def assert_prints_as(name: str, value: np.ndarray) -> None:
    """Asserts that `value` is the printed number to one unit of its last digit."""
    text = CASES[name]["printed"]
    # An ulp of float32 may come on top of the digits that the document shows.
    allowed = last_place(text) + 2.0**-23 * np.abs(numbers(text))
    np.testing.assert_array_less(np.abs(np.squeeze(value) - printed(name)), allowed)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CASES)
def test_float32_loss_is_true(name: str, jit: bool) -> None:
    case = CASES[name]
    loss = run(case, jit=jit)
    if case["loss"] in FROM_PROBABILITIES:
        np.testing.assert_allclose(loss, true(name), rtol=2.0**-22, atol=2.0**-23)
    else:
        # A class id has the error of the logarithm of XLA on top, over an ulp.
        bound = 2.5 if case["loss"].endswith("integer_labels") else 1.5
        assert oracle.ulp_error(loss, true(name), "float32").max() <= bound


@pytest.mark.parametrize("name", CASES)
def test_float64_loss_is_true(name: str, x64: None) -> None:
    case = CASES[name]
    loss = run(case, jnp.float64)
    if case["loss"] in FROM_PROBABILITIES:
        np.testing.assert_allclose(loss, true(name), rtol=2.0**-51, atol=2.0**-52)
    else:
        assert oracle.ulp_error(loss, true(name), "float64").max() <= 2.5


@pytest.mark.parametrize("name", CASES)
def test_loss_has_the_shape_of_the_batch(name: str) -> None:
    # Document 001 says [batch, 1].
    case = {**CASES[name], "reduction": "none"}
    first, labels = arrays(case["inputs"], jnp.float32)
    elementwise = first.shape == labels.shape and "binary" in case["loss"]
    expected = first.shape if elementwise else first.shape[:-1]
    assert run(case).shape == expected


@pytest.mark.parametrize(
    "name",
    [n for n, c in CASES.items() if "defect" not in c and c["printed"] is not None],
)
def test_printed_number_is_right(name: str) -> None:
    assert_prints_as(name, true(name))
    assert_prints_as(name, run(CASES[name]))


def test_every_defect_has_its_test() -> None:
    defects = {case["defect"] for case in CASES.values() if "defect" in case}
    assert defects == {
        "double softmax",
        "epsilon inside the logarithms",
        "labels sum to two",
        "log of a rounded probability",
        "sign",
        "small-loss cancellation",
        "swapped arguments",
    }


@pytest.mark.parametrize("name", with_defect("sign"))
def test_sign(name: str) -> None:
    # Both expressions of the document evaluate to minus the number beside them.
    inputs = CASES[name]["inputs"]
    log_softmax = np.log(oracle.softmax(inputs["logits"]))
    expression = (np.asarray(inputs["labels"]) * log_softmax).sum(-1)
    assert_prints_as(name, -expression)
    assert (expression < 0).all()


@pytest.mark.parametrize("name", with_defect("swapped arguments", "double softmax"))
def test_other_inputs_than_the_text_says(name: str) -> None:
    # The number is a true loss of what was passed, and not the loss that was meant.
    case = CASES[name]
    assert_prints_as(name, run(case))
    intended = run(case["intended"])
    truth = numbers(case["intended"]["true"])
    assert oracle.ulp_error(intended, truth, "float32").max() <= 2.5
    assert (np.abs(printed(name) - truth) > 0.1).all()


def test_swapped_arguments_pass_unnoticed() -> None:
    # The labels and the logits of document 000, the wrong way round, are a loss too.
    intended = CASES["000.torch_api_swapped"]["intended"]["inputs"]
    logits, labels = arrays(intended, jnp.float32)
    swapped = xent_jax.softmax_cross_entropy(labels, logits)
    np.testing.assert_allclose(swapped, [4.7533023], rtol=1e-6)


def test_double_softmax_logits_are_the_softmax() -> None:
    case = CASES["001.result3"]
    softmax = oracle.softmax(case["intended"]["inputs"]["logits"])
    np.testing.assert_allclose(case["inputs"]["logits"], softmax, rtol=1e-15)


@pytest.mark.parametrize("name", with_defect("small-loss cancellation"))
def test_small_loss_cancellation(name: str) -> None:
    # log Σ exp(x − max) − (x_y − max) in float32: the sum 1 + ε has lost digits of ε.
    inputs = CASES[name]["inputs"]
    logits, labels = np.asarray(inputs["logits"], np.float32), inputs["labels"]
    ids = labels if np.ndim(labels) == 1 else np.argmax(labels, axis=-1)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(axis=-1))
    plain = normalizer - shifted[np.arange(len(ids)), ids]
    assert_prints_as(name, plain)
    smallest = np.argmin(true(name))
    lost = oracle.ulp_error(printed(name), true(name), "float32")[smallest]
    ours = oracle.ulp_error(run(CASES[name]), true(name), "float32")[smallest]
    assert lost > 15
    assert ours <= 2.5


def test_small_loss_cancellation_is_as_large_as_said() -> None:
    name = "003.CE_keras_logits"
    error = np.abs(printed(name) - true(name)) / true(name)
    np.testing.assert_allclose(error[:2], [5.6e-5, 7.6e-5], rtol=0.02)
    ours = np.abs(run(CASES[name]) - true(name)) / true(name)
    assert ours.max() < 2.0**-23


def test_log_of_a_float32_softmax() -> None:
    name = "000.onehot_naive"
    assert_prints_as(name, -np.log(np.float32(0.9755587)))
    assert oracle.ulp_error(printed(name), true(name), "float32").max() > 30


def test_log_of_a_float32_probability() -> None:
    name = "003.CE_keras_probs"
    inputs = CASES[name]["inputs"]
    label_probs = np.asarray(inputs["probs"], np.float32)[
        np.asarray(inputs["labels"]) == 1
    ]
    assert_prints_as(name, -np.log(label_probs))
    # Neither this nor ours can be the loss of the logits: p = 0.99983 is the input.
    of_logits = numbers(CASES[name]["reference"])
    for loss in (printed(name), run(CASES[name])):
        error = np.abs(loss - of_logits) / of_logits
        assert error[0] == pytest.approx(1.1e-4, rel=0.05)
        assert error[1] == pytest.approx(2.0e-5, rel=0.05)


def test_log_of_four_digits() -> None:
    name = "004.logsoftmax_table"
    logits = np.asarray(CASES[name]["inputs"]["logits"])
    softmax = oracle.softmax(logits)[np.arange(8), CASES[name]["inputs"]["labels"]]
    assert_prints_as(name, -np.log(np.round(softmax, 4)))
    error = np.abs(printed(name) - true(name))
    assert error.max() == pytest.approx(2.5e-4, rel=0.05)
    assert np.abs(run(CASES[name]) - true(name)).max() < 1e-6


def test_sum_of_four_digit_logarithms() -> None:
    name = "004.multihot_hand_sum"
    table = printed("004.logsoftmax_table").reshape(2, 4)
    by_hand = (np.asarray(CASES[name]["inputs"]["labels"]) * table).sum()
    assert_prints_as(name, by_hand)
    assert abs(by_hand - true(name)) == pytest.approx(1.8e-4, rel=0.05)


def test_epsilon_inside_the_logarithms() -> None:
    name = "003.BCE3_probs"
    inputs = CASES[name]["inputs"]
    probs = np.asarray(inputs["probs"], np.float32)
    labels = np.asarray(inputs["labels"], np.float32)
    epsilon = np.float32(1e-7)
    keras_2 = -labels * np.log(probs + epsilon)
    keras_2 = keras_2 - (1 - labels) * np.log(1 - probs + epsilon)
    assert_prints_as(name, keras_2)
    of_logits = numbers(CASES[name]["reference"])
    off = 1 - printed(name)[0] / of_logits[0]
    assert off == pytest.approx(0.0202, rel=0.01)
    # Ours has only the rounding of the probability to float32, which was its input.
    assert 1 - run(CASES[name])[0] / of_logits[0] == pytest.approx(8e-4, rel=0.05)


def test_one_minus_sigmoid_in_float32() -> None:
    # Document 001 compares log(1 − sigmoid) with the stable form in float64 only.
    name = "001.sigmoid_E1_E2"
    x = np.float32(12)
    plain = -np.log(np.float32(1) / (np.float32(1) + np.exp(-x)))
    assert plain / true(name)[0, 0] - 1 == pytest.approx(9e-3, rel=0.02)
    ours = run(CASES[name])[0, 0]
    assert oracle.ulp_error(ours, true(name)[0, 0], "float32") <= 1


def test_labels_that_sum_to_two() -> None:
    name = "004.multihot"
    case = CASES[name]
    assert_prints_as(name, run(case))
    logits, labels = arrays(case["inputs"], jnp.float32)
    halves = xent_jax.softmax_cross_entropy(logits, labels / 2).mean()
    assert oracle.ulp_error(halves, numbers(case["normalized"]), "float32") <= 1.5
    gradient = jax.grad(lambda x: xent_jax.softmax_cross_entropy(x, labels).sum())(
        logits
    )
    np.testing.assert_allclose(gradient, numbers(case["gradient"]), atol=1e-7)
    # What TensorFlow returns for these labels, softmax − labels, is another number.
    tensorflow = oracle.softmax(logits) - np.asarray(labels)
    np.testing.assert_allclose(
        tensorflow[0], [-0.81398, -0.69330, 0.33896, 0.16832], atol=1e-5
    )
    assert np.abs(tensorflow - gradient).max() > 0.3


def test_nll_of_log_softmax_is_cross_entropy() -> None:
    # Document 000 checks this on random numbers, and takes log(softmax(x)) for the
    # log-softmax, which is −inf once a logit trails by more than about 104.
    logits = jax.random.normal(jax.random.key(0), (3, 5))
    labels = jnp.array([1, 0, 4])
    nll = xent_jax.nll_loss(jax.nn.log_softmax(logits), labels)
    loss = xent_jax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(nll, loss, rtol=3e-6)
    wide = jnp.array([[0.0, 110.0]])
    assert jnp.isneginf(jnp.log(jax.nn.softmax(wide))[0, 0])
    first = jnp.array([0])
    assert xent_jax.softmax_cross_entropy_with_integer_labels(wide, first)[0] == 110


class TestLinearizedLoss:
    """Document 002 says that Σ (softmax(a) − q)·a may stand in for the loss."""

    logits = np.random.default_rng(0).random((128, 64), np.float32) ** 4
    targets = np.random.default_rng(1).dirichlet(np.ones(64), 128).astype(np.float32)

    def test_differs_from_the_loss_by_the_entropy_of_the_softmax(
        self, x64: None
    ) -> None:
        logits = jnp.asarray(self.logits, jnp.float64)
        # Rows that sum to one in float64, not in float32 only.
        targets = jnp.asarray(self.targets, jnp.float64)
        targets = targets / targets.sum(axis=-1, keepdims=True)
        loss = xent_jax.softmax_cross_entropy(logits, targets)
        surrogate = xent_jax.linearized_softmax_cross_entropy(logits, targets)
        p = oracle.softmax(logits)
        entropy = -(p * np.log(p)).sum(-1)
        np.testing.assert_allclose(loss - surrogate, entropy, atol=1e-14)

    def test_has_the_gradient_of_the_loss(self) -> None:
        def gradient(loss):
            return jax.grad(lambda x: loss(x, self.targets).sum())(self.logits)

        surrogate = gradient(xent_jax.linearized_softmax_cross_entropy)
        truth = oracle.softmax_cross_entropy(self.logits, self.targets).gradient
        p_minus_q = oracle.softmax(self.logits) - self.targets
        np.testing.assert_allclose(truth, p_minus_q, atol=1e-7)
        np.testing.assert_allclose(surrogate, truth, atol=1e-8, rtol=1e-6)
        np.testing.assert_allclose(
            gradient(xent_jax.softmax_cross_entropy), truth, atol=1e-8, rtol=1e-6
        )

    def test_is_not_the_loss_without_stop_gradient(self) -> None:
        # The proof of the document takes Σ_i p_i·(a_i − p·a) = 0, which holds, for
        # p_i·(a_i − p·a) = 0, which does not: the gradient keeps that term.
        a = jnp.array([0.90457897, 0.08975555, 0.6955031, 0.74161145, 0.50095907])
        p = jnp.array([0.02797057, 0.09509987, 0.27454503, 0.273575, 0.32880953])
        terms = p * (a - p @ a)
        assert p @ a == pytest.approx(0.5923907187819715, rel=1e-6)
        assert float(terms.sum()) == pytest.approx(0.0, abs=1e-7)
        assert float(jnp.abs(terms).max()) == pytest.approx(0.048, rel=0.02)

        q = jnp.ones(5) / 5
        plain = jax.grad(lambda x: ((jax.nn.softmax(x) - q) * x).sum())(a)
        softmax = oracle.softmax(a)
        extra = softmax * (np.asarray(a) - softmax @ np.asarray(a))
        np.testing.assert_allclose(plain, softmax - 0.2 + extra, atol=1e-6)
        ours = jax.grad(xent_jax.linearized_softmax_cross_entropy)(a, q)
        np.testing.assert_allclose(ours, softmax - 0.2, atol=1e-7)
        assert np.abs(extra).max() > 0.05


class TestOracle:
    """The float64 oracles that the tests compare with, beside 50-digit arithmetic."""

    @pytest.mark.parametrize("margin", [-60, -5, 0, 5, 20, 40, 80])
    def test_class_ids(self, margin: int, rng: np.random.Generator) -> None:
        logits = rng.normal(size=(20, 10)).astype(np.float32)
        labels = rng.integers(0, 10, 20)
        logits[np.arange(20), labels] = np.float32(logits.max(axis=-1) + margin)
        loss = oracle.softmax_cross_entropy_with_integer_labels(logits, labels)
        value, gradient = oracle.exact_softmax_cross_entropy(logits, labels)
        assert oracle.ulp_error(loss.value, value, "float64").max() <= 4
        assert oracle.ulp_error(loss.gradient, gradient, "float64").max() <= 4

    def test_targets_and_options(self, rng: np.random.Generator) -> None:
        logits, labels = rng.normal(size=(20, 10)), rng.random((20, 10))
        weights = rng.random(10)
        options = {"label_smoothing": 0.1, "class_weights": weights, "z_loss": 0.01}
        loss = oracle.softmax_cross_entropy(logits, labels, **options)
        targets = weights * (0.9 * labels + 0.01)
        exact = oracle.exact_softmax_cross_entropy(logits, targets, z_loss=0.01)
        np.testing.assert_allclose(loss.value, exact[0].astype(float), rtol=1e-15)
        np.testing.assert_allclose(
            loss.gradient, exact[1].astype(float), rtol=1e-14, atol=1e-15
        )

    @pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
    def test_sigmoid(self, label: float) -> None:
        logits = np.linspace(-90, 90, 181)
        labels = np.full(181, label)
        loss = oracle.sigmoid_binary_cross_entropy(logits, labels, pos_weight=3.0)
        value, gradient = oracle.exact_sigmoid_binary_cross_entropy(
            logits, labels, pos_weight=3.0
        )
        assert oracle.ulp_error(loss.value, value, "float64").max() <= 4
        np.testing.assert_allclose(loss.gradient, gradient.astype(float), rtol=1e-14)

    def test_units_in_the_last_place(self) -> None:
        error = oracle.ulp_error(np.float32(1) + np.float32(2**-23), 1.0, "float32")
        assert error == 1
        assert oracle.ulp_error(1.0, 1 + 2.0**-8, "bfloat16") == 0.5
        special = oracle.ulp_error(
            [np.nan, np.inf, 1.0, np.inf, -0.0],
            [np.nan, np.inf, np.nan, 1.0, 0.0],
            "float32",
        )
        np.testing.assert_array_equal(special, [0, 0, np.inf, np.inf, 0])
