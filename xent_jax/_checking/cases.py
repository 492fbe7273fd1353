"""Inputs that stress every loss: what `python -m xent_jax.verify` runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import xent_jax

ROWS, CLASSES = 64, 96


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss with inputs that stress it.

    Attributes:
      name: in the table.
      loss: a function of the package.
      inputs: in float64; rounded to the dtype under test before use.
      labels: class ids or targets.
      bound: on the error of a value, in ulp of float32.
      scale: what a value's error is relative to where that is not the value itself.
      slack: ulp of float32 to add to the bounds on derivatives.
      where: rows that count.
      options: further keywords of the loss.
    """

    name: str
    loss: Callable[..., jax.Array]
    inputs: np.ndarray
    labels: np.ndarray
    bound: float
    scale: float = 0.0
    slack: float = 0.0
    where: np.ndarray | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def cases(highest_margin: float = 60.0) -> list[Case]:
    """Returns the cases: confident, hopeless, soft, masked and weighted rows.

    Args:
      highest_margin: how far a label is ahead of its best rival at most; float16
        cannot hold the gradient of more than 8.
    """
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((ROWS, CLASSES))
    ids = rng.integers(0, CLASSES, ROWS)
    one_hot = np.arange(CLASSES) == ids[:, None]
    rivals = np.where(one_hot, -np.inf, logits).max(-1)
    margins = np.linspace(-min(60.0, 4 * highest_margin), highest_margin, ROWS)
    confident = np.where(one_hot, (rivals + margins)[:, None], logits)
    soft = rng.dirichlet(np.ones(CLASSES), ROWS)
    probs = rng.dirichlet(np.ones(8), ROWS) * 0.8 + 0.025
    keep = np.arange(ROWS) % 5 != 0
    broken = np.where(keep[:, None], logits, np.nan)
    weights = rng.uniform(0.5, 2.0, CLASSES)
    options = {
        "label_smoothing": 0.1,
        "class_weights": weights.astype(np.float32),
        "z_loss": 1e-3,
    }
    sparse = xent_jax.softmax_cross_entropy_with_integer_labels
    dense = xent_jax.softmax_cross_entropy
    sigmoid = xent_jax.sigmoid_binary_cross_entropy
    steep = np.linspace(-highest_margin, highest_margin, ROWS * 8).reshape(ROWS, 8)
    answers = (rng.random((ROWS, 8)) < 0.5).astype(np.float64)
    picked = rng.integers(0, 8, ROWS)
    # The global maximum as the pivot rounds a label's margin: (margin + 10)·2⁻²⁴.
    rounded = (highest_margin + 10) / 2
    masked = {"where": keep, "options": options}
    return [
        Case("integer labels", sparse, confident, ids, 4),
        Case("integer, options", sparse, broken, ids, 8, **masked),
        Case("dense labels", dense, logits, soft, 6),
        Case("dense one-hot", dense, confident, one_hot, rounded, slack=rounded - 4),
        Case("dense, options", dense, broken, soft, 8, **masked),
        Case(
            "linearized",
            xent_jax.linearized_softmax_cross_entropy,
            logits,
            soft,
            8,
            scale=10,
        ),
        Case("sigmoid", sigmoid, steep, answers, 3),
        Case("pos_weight", sigmoid, steep, answers, 4, options={"pos_weight": 3}),
        Case("nll", xent_jax.nll_loss, np.log(probs), picked, 2),
        Case(
            "categorical",
            xent_jax.categorical_cross_entropy,
            probs,
            answers,
            16,
            scale=1,
        ),
        Case("binary", xent_jax.binary_cross_entropy, probs, answers, 16, scale=1),
    ]
