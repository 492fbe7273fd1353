"""Inputs that stress every loss: what `python -m xent_jax.verify` runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import xent_jax
from xent_jax._checking.closed_forms import (
    DIVERGENCE_LAW,
    ENTROPY_LAW,
    SOFTMAX_LAW,
    Law,
)
from xent_jax._checking.composed import MEAN_LAW, of_divergence, of_head, of_sinkhorn

ROWS, CLASSES, FEATURES = 64, 96, 16


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
      law: of the loss; that of `testing.law_of` unless given.
      verifies: the names of the public functions that the loss is made of, where it is
        none itself.
      whole: whether the rows make one result, so that none is computed by itself.
      products: the sum of absolute products that a logit is made of at most, by which
        the error of the device's dot product counts.
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
    law: Law | None = None
    verifies: tuple[str, ...] = ()
    whole: bool = False
    products: float = 0.0


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
        *_of_pairs(rng, logits, confident, ids),
        *_of_heads(rng, ids),
        *_of_rows(rng, logits, soft[:, 0]),
    ]


def _of_pairs(
    rng: np.random.Generator, logits: np.ndarray, confident: np.ndarray, ids: np.ndarray
) -> list[Case]:
    """Returns cases of sparse targets, divergences and statistics."""
    others = rng.integers(0, CLASSES, (ROWS, 3))
    indices = np.concatenate([ids[:, None], others], -1)
    probs = rng.dirichlet(np.ones(4), ROWS).astype(np.float32)
    near = logits + 0.01 * rng.standard_normal(logits.shape)
    statistics = xent_jax.softmax_statistics
    divergence = xent_jax.softmax_kl_divergence
    return [
        Case(
            "sparse targets",
            lambda x, t: xent_jax.softmax_cross_entropy_with_sparse_targets(
                x, t[..., :4].astype(np.int32), t[..., 4:]
            ),
            logits,
            np.concatenate([indices, probs], -1),
            8,
            slack=4,
            law=_unpacked(SOFTMAX_LAW, 4),
            verifies=("softmax_cross_entropy_with_sparse_targets",),
        ),
        *(
            Case(
                f"KL, {direction}",
                functools.partial(divergence, direction=direction),
                logits,
                near.astype(np.float32) if close else -logits,
                24,
                slack=24,
                law=_with(DIVERGENCE_LAW, direction=direction),
                verifies=("softmax_kl_divergence",),
            )
            for direction, close in (("forward", False), ("reverse", False))
        ),
        Case(
            "entropy",
            lambda x, t: statistics(x, t).entropy,
            confident,
            ids,
            16,
            slack=16,
            law=ENTROPY_LAW,
            verifies=("softmax_statistics", "SoftmaxStatistics"),
        ),
    ]


def _of_heads(rng: np.random.Generator, ids: np.ndarray) -> list[Case]:
    """Returns cases of heads, by their features; the kernel is exact in every dtype."""
    hidden = rng.standard_normal((ROWS, FEATURES))
    kernel = rng.integers(-8, 9, (FEATURES, CLASSES)) / 16
    wide, narrow = kernel.astype(np.float64), kernel.astype(np.float32)
    teacher = rng.integers(-8, 9, (ROWS, FEATURES)).astype(np.float32) / 8
    head = xent_jax.linear_softmax_cross_entropy
    divergence = xent_jax.linear_softmax_kl_divergence
    rows = np.arange(ROWS)
    common = {"bound": 16, "scale": 1, "slack": 64, "products": 16}
    return [
        Case(
            "head, per row",
            lambda h, y: head(h, narrow, y, class_block=40),
            hidden,
            ids,
            law=of_head(SOFTMAX_LAW, wide),
            verifies=("linear_softmax_cross_entropy",),
            **common,
        ),
        Case(
            "head, sum",
            lambda h, y: head(h, narrow, y, reduction="sum", row_block=24),
            hidden,
            ids,
            law=_summed(of_head(SOFTMAX_LAW, wide)),
            verifies=("linear_softmax_cross_entropy",),
            whole=True,
            **common,
        ),
        Case(
            "head, entropy",
            lambda h, y: xent_jax.linear_softmax_statistics(h, narrow, y).entropy,
            hidden,
            ids,
            law=of_head(ENTROPY_LAW, wide),
            verifies=("linear_softmax_statistics",),
            **common,
        ),
        Case(
            "heads, KL",
            lambda h, y: divergence(h, narrow, jnp.asarray(teacher)[y], narrow),
            hidden,
            rows,
            law=of_divergence(DIVERGENCE_LAW, wide, teacher),
            verifies=("linear_softmax_kl_divergence",),
            **common,
        ),
    ]


def _of_rows(
    rng: np.random.Generator, logits: np.ndarray, weights: np.ndarray
) -> list[Case]:
    """Returns cases of what is made of all rows together."""
    scores = rng.uniform(-1, 1, (ROWS, CLASSES)).astype(np.float32)
    weights = weights.astype(np.float32)
    return [
        Case(
            "Sinkhorn",
            lambda x, _: xent_jax.sinkhorn_cross_entropy(x, scores, num_iters=3),
            logits,
            np.zeros(ROWS, np.int32),
            64,
            slack=64,
            law=of_sinkhorn(scores, 0.05, 3),
            verifies=("sinkhorn_cross_entropy", "sinkhorn_targets"),
            whole=True,
        ),
        Case(
            "weighted mean",
            xent_jax.weighted_mean,
            np.abs(logits[:, 0]),
            weights,
            8,
            law=MEAN_LAW,
            verifies=("weighted_mean",),
            whole=True,
        ),
    ]


def _with(law: Law, **fixed: Any) -> Law:
    """Returns a law with options that its callers need not name."""
    return Law(*(functools.partial(function, **fixed) for function in law))


def _unpacked(law: Law, count: int) -> Law:
    """Returns a law of ids and probabilities that lie side by side."""

    def unpacking(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda x, t: function(
            x, t[..., :count].astype(np.int64), probs=t[..., count:]
        )

    return Law(*map(unpacking, law))


def _summed(law: Law) -> Law:
    """Returns the law of the sum over the rows."""
    return law._replace(value=lambda *arguments: law.value(*arguments).sum())
