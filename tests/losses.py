"""Losses of `[rows, classes]` inputs and labels, with what they are in the oracle.

Contract tests run every one through every law: transformations, dtypes, masks, strict
modes. They are made from the rows of `registry.py`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import oracle
import pytest
import registry
from registry import IDS, Case, Sizes

# Every loss that is the integral of its gradient (the linearized one is not), and that
# is made row by row.
ROWS = [
    row
    for row in registry.ROWS
    if row.oracle is not None
    and len(row.result) > 0
    and row.inputs[0] in ("logits", "student_logits", "log_probs", "probs")
    and row.name not in (registry.LINEARIZED, registry.SINKHORN)
]
SIZES = Sizes((5,), 7)
OF_LABELS = {
    "ids": "ids",
    "indices": "sparse",
    "targets": "targets",
    "teacher_logits": "teacher",
    "answers": "answers",
}


@dataclasses.dataclass(frozen=True, eq=False)
class LossCase:
    """A loss as a function of two arrays.

    Attributes:
      name: of the loss, and of its options.
      case: the loss with its options.
      options: their values; numbers are Python's.
    """

    name: str
    case: Case
    options: dict[str, Any]

    @property
    def loss(self) -> Any:
        return self.case.row.call

    @property
    def kind(self) -> str:
        """What the labels are: ids, sparse, targets, teacher or answers."""
        return OF_LABELS[self.case.row.labels[0]]

    @property
    def positive(self) -> bool:
        """Whether the inputs are probabilities."""
        return self.case.row.inputs[0] == "probs"

    @property
    def elementwise(self) -> bool:
        """Whether the classes are kept."""
        return "v" in self.case.result

    def inputs(self, rng: np.random.Generator, rows: int = 5, classes: int = 7) -> Any:
        """Returns float64 inputs and labels; sparse targets lie side by side."""
        sizes = SIZES._replace(batch=(rows,), classes=classes)
        inputs, *labels = Case(self.case.row).draw(rng, sizes).values()
        if self.kind != "sparse":
            return inputs, *labels
        ids, probs = labels
        ids = np.where(rng.random(ids.shape) < 0.2, -1, ids)  # padding
        return inputs, np.concatenate([ids, np.where(ids < 0, 0, probs)], -1)

    def arguments(self, labels: Any) -> dict[str, Any]:
        """Returns labels by keyword, and the options."""
        if self.kind == "sparse":
            return unpacked(labels) | self.options
        return {list(self.case.keys)[1]: labels} | self.options

    def __call__(self, inputs: Any, labels: Any, **more: Any) -> jax.Array:
        return self.loss(inputs, **self.arguments(labels), **more)

    def truth(self, inputs: Any, labels: Any, **more: Any) -> oracle.Loss:
        return self.case.row.oracle(inputs, **self.arguments(labels), **more)


def unpacked(labels: Any) -> dict[str, Any]:
    """Returns the arguments that ids and probabilities side by side stand for."""
    labels = labels if hasattr(labels, "astype") else np.asarray(labels)
    return {
        "indices": labels[..., : SIZES.ids].astype(np.int32),
        "probs": labels[..., SIZES.ids :],
    }


def _case(label: str, case: Case) -> LossCase:
    drawn = registry.narrow(case.draw(np.random.default_rng(0), SIZES))
    options = {
        word: drawn[word] if drawn[word].ndim else float(drawn[word])
        for word in case.words
    }
    name = "-".join(filter(None, [case.row.name, label]))
    return LossCase(name, case, options | dict(case.static))


def _cases() -> list[LossCase]:
    """Returns each loss, with all that is no mask, and ids with each of that."""
    cases = []
    for row in ROWS:
        cases.append(_case("", Case(row, (), row.forms[0])))
        options = row.unmasked()
        if row.name == IDS:
            cases += [_case(key, Case(row, (key,))) for key in options]
        if options:
            cases.append(_case("all", Case(row, options, row.forms[-1])))
    return cases


def _once(case: LossCase) -> bool:
    """Whether the case is one option alone of those that another has together."""
    later = case.kind in ("sparse", "teacher") and case.case.options
    return bool(later) or (case.loss.__name__ == IDS and len(case.options) == 1)


CASES = _cases()
_MARKS = [pytest.mark.once, pytest.mark.exhaustive]
EACH = [
    pytest.param(case, id=case.name, marks=_MARKS if _once(case) else [])
    for case in CASES
]
"""The same as parameters of tests, marked."""
