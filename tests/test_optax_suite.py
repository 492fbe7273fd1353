"""optax's own tests of its losses, run on the losses of this package.

The functions that claim to be drop-in replacements stand where optax's tests look for
them. `safe_softmax_cross_entropy` is replaced as well: here every softmax loss is safe.
"""

import re
import unittest

import jax
import numpy as np
import pytest
from grids import shortened

import xent_jax

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("unoptimized")]

REASON = "optax with its tests is not installed (extra `test`)"
optax = pytest.importorskip("optax", reason=REASON, exc_type=ImportError)
suite = pytest.importorskip(
    "optax.losses._classification_test", reason=REASON, exc_type=ImportError
)

REPLACEMENTS = {
    "softmax_cross_entropy": xent_jax.softmax_cross_entropy,
    "safe_softmax_cross_entropy": xent_jax.softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": (
        xent_jax.softmax_cross_entropy_with_integer_labels
    ),
    "sigmoid_binary_cross_entropy": xent_jax.sigmoid_binary_cross_entropy,
}
TESTS = {
    f"{case.__name__}.{method}": (case, method)
    for case in (
        suite.SoftmaxCrossEntropyTest,
        suite.SafeSoftmaxCrossEntropyTest,
        suite.SoftmaxCrossEntropyWithIntegerLabelsTest,
        suite.SigmoidCrossEntropyTest,
        # Two losses of optax that call the ones above.
        suite.PolyLossTest,
        suite.SigmoidFocalLossTest,
    )
    for method in unittest.defaultTestLoader.getTestCaseNames(case)
}
# What optax takes and this package refuses, on purpose: nothing is broadcast. None of
# the tests above asks for it.
LOGITS = np.arange(12, dtype=np.float32).reshape(4, 3)
REFUSED = {
    "where of shape (N, 1)": (
        "softmax_cross_entropy_with_integer_labels",
        (LOGITS, np.arange(4) % 3, -1, np.ones((4, 1), bool)),
        "where must have shape (4,)",
    ),
    "one class id for all rows": (
        "softmax_cross_entropy_with_integer_labels",
        (LOGITS, np.zeros(1, np.int32)),
        "labels must have shape (4,)",
    ),
    "one row of logits for all class ids": (
        "softmax_cross_entropy_with_integer_labels",
        (LOGITS[:1], np.zeros(4, np.int32)),
        "labels must have shape (1,)",
    ),
    "one row of targets for all rows": (
        "softmax_cross_entropy",
        (LOGITS, np.ones(3, np.float32) / 3),
        "labels must have shape (4, 3)",
    ),
    "class ids as targets": (
        "softmax_cross_entropy",
        (LOGITS[:3], np.arange(3)),
        "labels must have shape (3, 3)",
    ),
    "a column of logits beside a row of labels": (
        "sigmoid_binary_cross_entropy",
        (np.zeros((4, 1), np.float32), np.zeros(4, np.float32)),
        "labels must have shape (4, 1)",
    ),
}


def outcome(name: str) -> str:
    """Runs a test of optax and returns its traceback, empty if it passed."""
    case, method = TESTS[name]
    result = unittest.TestResult()
    case(method).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    return "".join(text for _, text in result.failures + result.errors)


@pytest.fixture(autouse=True)
def _replaced(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator):
    for name, function in REPLACEMENTS.items():
        monkeypatch.setattr(suite._classification, name, function)
    # The suite draws from NumPy's global generator: a mask of False only, which it
    # cannot take, would come up once in 32 runs.
    monkeypatch.setattr(np.random, "normal", rng.normal)
    monkeypatch.setattr(np.random, "randint", rng.integers)
    monkeypatch.setattr(np.random, "dirichlet", rng.dirichlet)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


# Every second of those that go through no parameters, or through the first.
FIRST = [name for name in TESTS if not name[-1].isdigit() or name.endswith("0")][::2]


@pytest.mark.parametrize("name", shortened(TESTS, kept=FIRST))
def test_optax_passes(name: str) -> None:
    assert outcome(name) == ""


@pytest.mark.parametrize("function", REPLACEMENTS)
def test_the_replacement_is_what_runs(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError(function)

    monkeypatch.setattr(suite._classification, function, broken)
    prefix = {
        "softmax_cross_entropy": "SoftmaxCrossEntropyTest.",
        "safe_softmax_cross_entropy": "SafeSoftmaxCrossEntropyTest.",
        "softmax_cross_entropy_with_integer_labels": (
            "SoftmaxCrossEntropyWithIntegerLabelsTest."
        ),
        "sigmoid_binary_cross_entropy": "SigmoidCrossEntropyTest.",
    }[function]
    names = [name for name in TESTS if name.startswith(prefix)]
    assert names
    assert all(f"RuntimeError: {function}" in outcome(name) for name in names)


@pytest.mark.parametrize("case", REFUSED)
def test_broadcasting_is_refused(case: str) -> None:
    function, arguments, message = REFUSED[case]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        getattr(optax.losses, function)(*arguments)
    with pytest.raises(ValueError, match=re.escape(f"{function}: {message}")):
        getattr(xent_jax, function)(*arguments)
