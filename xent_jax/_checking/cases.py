"""Inputs that stress every loss: what `python -m xent_jax.verify` runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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
from xent_jax._checking.composed import (
    MEAN_LAW,
    of_divergence,
    of_head,
    of_kernel,
    of_sinkhorn,
)

# As many features as the TPU kernels of the head take.
ROWS, CLASSES, FEATURES = 64, 96, 128


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


class _Rows(NamedTuple):
    """Rows of logits with their labels, in float64."""

    logits: np.ndarray
    confident: np.ndarray  # the label ahead of its best rival by a margin, or behind
    ids: np.ndarray
    one_hot: np.ndarray
    soft: np.ndarray  # targets that sum to one


def cases(highest_margin: float = 60.0) -> list[Case]:
    """Returns the cases: confident, hopeless, soft, masked and weighted rows.

    Args:
      highest_margin: how far a label is ahead of its best rival at most; float16
        cannot hold the gradient of more than 8.
    """
    rng = np.random.default_rng(0)
    rows = _rows(rng, highest_margin)
    return [
        *_of_classes(rng, rows, highest_margin),
        *_of_elements(rng, highest_margin),
        *_of_pairs(rng, rows),
        *_of_heads(rng, rows.ids),
        *_of_rows(rng, rows.logits, rows.soft[:, 0]),
    ]


def _rows(rng: np.random.Generator, highest_margin: float) -> _Rows:
    logits = 3 * rng.standard_normal((ROWS, CLASSES))
    ids = rng.integers(0, CLASSES, ROWS)
    one_hot = np.arange(CLASSES) == ids[:, None]
    rivals = np.where(one_hot, -np.inf, logits).max(-1)
    margins = np.linspace(-min(60.0, 4 * highest_margin), highest_margin, ROWS)
    confident = np.where(one_hot, (rivals + margins)[:, None], logits)
    soft = rng.dirichlet(np.ones(CLASSES), ROWS)
    return _Rows(logits, confident, ids, one_hot, soft)


def _of_classes(
    rng: np.random.Generator, rows: _Rows, highest_margin: float
) -> list[Case]:
    """Returns cases of class ids and of dense targets, with options and without."""
    keep = np.arange(ROWS) % 5 != 0
    broken = np.where(keep[:, None], rows.logits, np.nan)
    options = {
        "label_smoothing": 0.1,
        "class_weights": rng.uniform(0.5, 2.0, CLASSES).astype(np.float32),
        "z_loss": 1e-3,
    }
    sparse = xent_jax.softmax_cross_entropy_with_integer_labels
    dense = xent_jax.softmax_cross_entropy
    linearized = xent_jax.linearized_softmax_cross_entropy
    # The global maximum as the pivot rounds a label's margin: (margin + 10)·2⁻²⁴.
    rounded = (highest_margin + 10) / 2
    certain = {"bound": rounded, "slack": rounded - 4}
    masked = {"where": keep, "options": options}
    return [
        Case("integer labels", sparse, rows.confident, rows.ids, 4),
        Case("integer, options", sparse, broken, rows.ids, 8, **masked),
        Case("dense labels", dense, rows.logits, rows.soft, 6),
        Case("dense one-hot", dense, rows.confident, rows.one_hot, **certain),
        Case("dense, options", dense, broken, rows.soft, 8, **masked),
        Case("linearized", linearized, rows.logits, rows.soft, 8, scale=10),
    ]


def _of_elements(rng: np.random.Generator, highest_margin: float) -> list[Case]:
    """Returns cases of the sigmoid loss, of log-probabilities and of probabilities."""
    sigmoid = xent_jax.sigmoid_binary_cross_entropy
    categorical = xent_jax.categorical_cross_entropy
    binary = xent_jax.binary_cross_entropy
    probs = rng.dirichlet(np.ones(8), ROWS) * 0.8 + 0.025
    steep = np.linspace(-highest_margin, highest_margin, ROWS * 8).reshape(ROWS, 8)
    answers = (rng.random((ROWS, 8)) < 0.5).astype(np.float64)
    picked = rng.integers(0, 8, ROWS)
    return [
        Case("sigmoid", sigmoid, steep, answers, 3),
        Case("pos_weight", sigmoid, steep, answers, 4, options={"pos_weight": 3}),
        Case("nll", xent_jax.nll_loss, np.log(probs), picked, 2),
        Case("categorical", categorical, probs, answers, 16, scale=1),
        Case("binary", binary, probs, answers, 16, scale=1),
    ]


def _of_pairs(rng: np.random.Generator, rows: _Rows) -> list[Case]:
    """Returns cases of sparse targets, divergences and statistics."""
    name = "softmax_cross_entropy_with_sparse_targets"
    others = rng.integers(0, CLASSES, (ROWS, 3))
    probs = rng.dirichlet(np.ones(4), ROWS).astype(np.float32)
    packed = np.concatenate([rows.ids[:, None], others, probs], -1)
    return [
        Case(
            "sparse targets",
            lambda x, t: getattr(xent_jax, name)(
                x, t[..., :4].astype(np.int32), t[..., 4:]
            ),
            rows.logits,
            packed,
            8,
            slack=4,
            law=_unpacked(SOFTMAX_LAW, 4),
            verifies=(name,),
        ),
        _divergence("forward", rows.logits),
        _divergence("reverse", rows.logits),
        Case(
            "entropy",
            lambda x, t: xent_jax.softmax_statistics(x, t).entropy,
            rows.confident,
            rows.ids,
            16,
            slack=16,
            law=ENTROPY_LAW,
            verifies=("softmax_statistics", "SoftmaxStatistics"),
        ),
    ]


def _divergence(direction: Literal["forward", "reverse"], logits: np.ndarray) -> Case:
    return Case(
        f"KL, {direction}",
        functools.partial(xent_jax.softmax_kl_divergence, direction=direction),
        logits,
        -logits,
        24,
        slack=24,
        law=_with(DIVERGENCE_LAW, direction=direction),
        verifies=("softmax_kl_divergence",),
    )


def _of_heads(rng: np.random.Generator, ids: np.ndarray) -> list[Case]:
    """Returns cases of heads; what is not their input is exact in every dtype."""
    hidden = rng.standard_normal((ROWS, FEATURES)) * (4 / FEATURES**0.5)
    kernel = rng.integers(-8, 9, (FEATURES, CLASSES)) / 16
    teacher = rng.integers(-8, 9, (ROWS, FEATURES)).astype(np.float32) / 16
    narrow = kernel.astype(np.float32)
    head = xent_jax.linear_softmax_cross_entropy
    statistics = xent_jax.linear_softmax_statistics
    divergence = xent_jax.linear_softmax_kl_divergence
    law = of_head(SOFTMAX_LAW, kernel)

    def per_row(h: Any, y: Any) -> jax.Array:
        return head(h, narrow, y, class_block=40)

    def total(h: Any, y: Any) -> jax.Array:
        return head(h, narrow, y, reduction="sum", row_block=24)

    def entropy(h: Any, y: Any) -> jax.Array:
        return statistics(h, narrow, y).entropy

    def from_teacher(h: Any, y: Any) -> jax.Array:
        return divergence(h, narrow, jnp.asarray(teacher)[y], narrow)

    rows = [
        ("head, per row", head, per_row, ids, law),
        ("head, sum", head, total, ids, _summed(law)),
        ("head, entropy", statistics, entropy, ids, of_head(ENTROPY_LAW, kernel)),
        (
            "heads, KL",
            divergence,
            from_teacher,
            np.arange(ROWS),
            of_divergence(DIVERGENCE_LAW, kernel, teacher),
        ),
    ]
    heads = [_of_head(hidden, *row) for row in rows]
    return [*heads, _by_kernel(kernel, teacher, ids)]


def _by_kernel(kernel: np.ndarray, hidden: np.ndarray, ids: np.ndarray) -> Case:
    """Returns the case of a head by its kernel."""
    head = xent_jax.linear_softmax_cross_entropy

    def total(k: Any, y: Any) -> jax.Array:
        # The gradient by the features is taken too, as TPU kernels make both at once.
        h = jnp.asarray(hidden, k.dtype) + 0 * k[None, :, 0]
        return head(h, k, y, reduction="sum", row_block=24)

    law = _summed(of_kernel(SOFTMAX_LAW, hidden.astype(np.float64)))
    return _of_head(kernel, "head, by kernel", head, total, ids, law)


def _of_head(
    inputs: np.ndarray,
    name: str,
    function: Callable[..., Any],
    loss: Callable[..., jax.Array],
    labels: np.ndarray,
    law: Law,
) -> Case:
    return Case(
        name,
        loss,
        inputs,
        labels,
        bound=16,
        scale=1,
        slack=64,
        law=law,
        verifies=(function.__name__,),
        whole=name in ("head, sum", "head, by kernel"),
        products=16,
    )


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
