"""Every loss as one row: how to call it, and what it is in the oracle.

Contract tests run every row through every law: transformations, dtypes, masks, strict
modes. A new loss is a new row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import oracle
import pytest

import xent_jax


@dataclasses.dataclass(frozen=True, eq=False)
class LossCase:
    """A loss of `[rows, classes]` inputs; `elementwise` if it keeps the classes."""

    name: str
    loss: Callable[..., jax.Array]
    oracle: Callable[..., oracle.Loss]
    kind: str  # of the labels: ids, sparse, targets, teacher or answers
    positive: bool  # whether the inputs are probabilities
    options: dict[str, Any]

    @property
    def elementwise(self) -> bool:
        return self.kind == "answers"

    def inputs(self, rng: np.random.Generator, rows: int = 5, classes: int = 7) -> Any:
        """Returns float64 inputs and labels."""
        if self.positive:
            # Away from the clip, where the gradient is straight-through by design.
            inputs = rng.dirichlet(np.full(classes, 5.0), rows) * 0.8 + 0.02
        else:
            inputs = 2 * rng.standard_normal((rows, classes))
        labels = {
            "ids": rng.integers(0, classes, rows),
            "sparse": _packed(rng, rows, classes),
            "targets": rng.uniform(0.0, 1.0, (rows, classes)),
            "teacher": 2 * rng.standard_normal((rows, classes)),
            "answers": rng.uniform(0.0, 1.0, (rows, classes)),
        }[self.kind]
        return inputs, labels

    def __call__(self, inputs: Any, labels: Any, **more: Any) -> jax.Array:
        return self.loss(inputs, labels, **self.options, **more)

    def truth(self, inputs: Any, labels: Any, **more: Any) -> oracle.Loss:
        return self.oracle(inputs, labels, **self.options, **more)


IDS = 3  # of sparse targets, a row


def _packed(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Returns class ids and their probabilities side by side: one array of labels."""
    ids = rng.integers(-1, classes, (rows, IDS))
    probs = np.where(ids < 0, 0, rng.uniform(0.0, 1.0, (rows, IDS)))
    return np.concatenate([ids, probs], -1)


def unpacked(labels: Any) -> dict[str, Any]:
    """Returns the arguments that packed labels stand for."""
    labels = labels if hasattr(labels, "astype") else np.asarray(labels)
    return {"indices": labels[..., :IDS].astype(np.int32), "probs": labels[..., IDS:]}


def _sparse(logits: Any, labels: Any, **options: Any) -> jax.Array:
    loss = xent_jax.softmax_cross_entropy_with_sparse_targets
    return loss(logits, **unpacked(labels), **options)


def _sparse_truth(logits: Any, labels: Any, **options: Any) -> oracle.Loss:
    loss = oracle.softmax_cross_entropy_with_sparse_targets
    return loss(logits, **unpacked(labels), **options)


_WEIGHTS = np.linspace(0.5, 2.0, 7, dtype=np.float32)


def _case(name: str, kind: str, label: str = "", **options: Any) -> LossCase:
    positive = name in ("categorical_cross_entropy", "binary_cross_entropy")
    if kind == "sparse":
        return LossCase(f"{name}{label}", _sparse, _sparse_truth, kind, False, options)
    loss, truth = getattr(xent_jax, name), getattr(oracle, name)
    return LossCase(f"{name}{label}", loss, truth, kind, positive, options)


SPARSE = "softmax_cross_entropy_with_sparse_targets"
INTEGER = "softmax_cross_entropy_with_integer_labels"
CASES = [
    _case(INTEGER, "ids"),
    _case(INTEGER, "ids", "-smoothed", label_smoothing=0.1),
    _case(INTEGER, "ids", "-weighted", class_weights=_WEIGHTS),
    _case(INTEGER, "ids", "-z_loss", z_loss=0.01),
    _case(
        INTEGER,
        "ids",
        "-all",
        label_smoothing=0.1,
        class_weights=_WEIGHTS,
        z_loss=0.01,
    ),
    _case("softmax_cross_entropy", "targets"),
    _case(
        "softmax_cross_entropy",
        "targets",
        "-all",
        label_smoothing=0.1,
        class_weights=_WEIGHTS,
        z_loss=0.01,
    ),
    _case(SPARSE, "sparse"),
    _case(
        SPARSE,
        "sparse",
        "-all",
        label_smoothing=0.1,
        class_weights=_WEIGHTS,
        z_loss=0.01,
    ),
    _case("softmax_kl_divergence", "teacher"),
    _case(
        "softmax_kl_divergence",
        "teacher",
        "-reverse",
        direction="reverse",
        temperature=2.0,
    ),
    _case("sigmoid_binary_cross_entropy", "answers"),
    _case(
        "sigmoid_binary_cross_entropy",
        "answers",
        "-all",
        label_smoothing=0.1,
        pos_weight=_WEIGHTS,
    ),
    _case("nll_loss", "ids"),
    _case("nll_loss", "ids", "-weighted", class_weights=_WEIGHTS),
    _case("categorical_cross_entropy", "targets"),
    _case("binary_cross_entropy", "answers"),
]
"""Every loss that is the integral of its gradient (the linearized one is not)."""


def _once(case: LossCase) -> bool:
    """Whether the case is one option alone of those that another has together."""
    later = case.kind in ("sparse", "teacher") and case.options
    return bool(later) or (case.name.startswith(INTEGER) and len(case.options) == 1)


_MARKS = [pytest.mark.once, pytest.mark.exhaustive]
EACH = [
    pytest.param(case, id=case.name, marks=_MARKS if _once(case) else [])
    for case in CASES
]
"""The same as parameters of tests, marked."""
