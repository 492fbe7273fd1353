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
    kind: str  # of the labels: ids, targets or answers
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
            "targets": rng.uniform(0.0, 1.0, (rows, classes)),
            "answers": rng.uniform(0.0, 1.0, (rows, classes)),
        }[self.kind]
        return inputs, labels

    def __call__(self, inputs: Any, labels: Any, **more: Any) -> jax.Array:
        return self.loss(inputs, labels, **self.options, **more)

    def truth(self, inputs: Any, labels: Any, **more: Any) -> oracle.Loss:
        return self.oracle(inputs, labels, **self.options, **more)


_WEIGHTS = np.linspace(0.5, 2.0, 7, dtype=np.float32)


def _case(name: str, kind: str, label: str = "", **options: Any) -> LossCase:
    positive = name in ("categorical_cross_entropy", "binary_cross_entropy")
    loss, truth = getattr(xent_jax, name), getattr(oracle, name)
    return LossCase(f"{name}{label}", loss, truth, kind, positive, options)


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
    return case.name.startswith(INTEGER) and len(case.options) == 1


EACH = [
    pytest.param(case, id=case.name, marks=[pytest.mark.once] if _once(case) else [])
    for case in CASES
]
"""The same for tests that run on every version of JAX."""
