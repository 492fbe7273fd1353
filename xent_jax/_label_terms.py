"""The differentiable terms of the softmax losses of class ids.

A `jax.custom_jvp` over the statistics of `_numerics`. Its rule is the closed form
"mean parameter minus target", wrapped in `jax.checkpoint`: forward mode, reverse mode
and every nesting of the two follow from it, and reverse mode keeps the logits and a
few numbers a row, but no softmax.

Where the classes are sharded, every sum over them is one over the classes here until
`ClassAxis.total` adds up all of a row's sums at once: two all-reduces for the terms,
the first for the best rival, and one for their tangents.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax import _numerics, _spread
from xent_jax._blocks import varying
from xent_jax._class_axis import ClassAxis
from xent_jax._class_reductions import SPLIT_SUM
from xent_jax._numerics import LabelStatistics, Masked
from xent_jax._spread import SpreadSums


class LabelConfig(NamedTuple):
    """What is static in the label core."""

    classes: ClassAxis
    spread: bool  # whether the loss of evenly spread targets is wanted
    normalizer: bool  # whether the log-normaliser is wanted
    weight: bool = False  # whether the weight of the label's class is wanted


class LabelTerms(NamedTuple):
    """Per row, of size 1 along the class axis; `None` where not wanted."""

    loss: jax.Array  # log-normaliser − x_y
    spread: jax.Array | None  # Σ_j w_j (log-normaliser − x_j) over the kept classes
    log_normalizer: jax.Array | None
    weight: jax.Array | None = None  # w_y, also where the label's class is dropped


class LabelResults(NamedTuple):
    """The terms, and what their derivatives are made of."""

    terms: LabelTerms
    statistics: LabelStatistics
    total: jax.Array | None  # the `total_weight` of the rows, for the spread


class LabelDot(NamedTuple):
    """The tangents of all terms."""

    loss: jax.Array
    spread: jax.Array | None
    log_normalizer: jax.Array
    weight: jax.Array | None = None


class _Sums(NamedTuple):
    """The sums over the classes that the results of a row are made of."""

    rivals: jax.Array
    label_logit: jax.Array
    spread: SpreadSums | None
    total: jax.Array | None
    weight: jax.Array | None


class Coefficients(NamedTuple):
    """What a row's terms are multiplied by; `None` stands for 1, then 0, then 0."""

    loss: jax.Array | None
    spread: jax.Array | None
    square: jax.Array | None  # of the log-normaliser


def combined(terms: LabelTerms, coefficients: Coefficients) -> jax.Array:
    """Returns the loss of every row: all options are in the coefficients."""
    loss = terms.loss
    if coefficients.loss is not None:
        loss = _numerics.scaled(coefficients.loss, loss)
    if terms.spread is not None and coefficients.spread is not None:
        loss = loss + _numerics.scaled(coefficients.spread, terms.spread)
    if terms.log_normalizer is not None and coefficients.square is not None:
        loss = loss + coefficients.square * jnp.square(terms.log_normalizer)
    return loss


def label_terms(
    config: LabelConfig,
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array | None,
    keep_class: jax.Array | None,
    keep_row: jax.Array | None,
) -> LabelTerms:
    """Returns the terms that the loss of integer labels is composed of.

    Args:
      config: static.
      logits: floating, any dtype; of the classes here, as all arrays are.
      labels: int32, of size 1 along the class axis; negative where not a class. Ids
        count over all shards.
      class_weights: of size V along the class axis and 1 along the others.
      keep_class: of the logits' shape, or of size 1 along other axes.
      keep_row: of size 1 along the class axis, the same on all shards.
    """
    inputs = Masked(logits, keep_class, keep_row)
    return label_results(config, inputs, labels, class_weights).terms


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def label_results(
    config: LabelConfig,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
) -> LabelResults:
    """Returns the terms, and the statistics that their derivatives are made of."""
    return _results(config, inputs, labels, class_weights)


@functools.partial(jax.jit, static_argnums=0)
def _results(
    config: LabelConfig,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
) -> LabelResults:
    classes = config.classes
    best_rival = _numerics.best_rival(inputs, labels, classes)
    pivot = _numerics.pivot_of(best_rival)
    spread = total = weight = None
    if config.spread:
        # The differences are taken from the best rival, which is known before the
        # largest logit is, so that the sums share a pass over the logits.
        spread = _spread.spread_sums(classes, inputs, labels, class_weights, pivot)
        total = _spread.total_weight(inputs, class_weights, classes)
    if config.weight and class_weights is not None:
        weight = _spread.label_weight(inputs, labels, class_weights, classes)
    sums = classes.total(
        _Sums(
            _numerics.sum_of_rivals(SPLIT_SUM, inputs, labels, pivot, classes),
            _numerics.label_logits(classes, inputs, labels),
            spread,
            total,
            weight,
        )
    )
    label_logit = _numerics.defined(sums.label_logit, labels)
    statistics = _numerics.settled(best_rival, sums.rivals, label_logit)
    terms = LabelTerms(
        statistics.loss,
        None if sums.spread is None else _spread.settled(sums.spread, statistics),
        statistics.log_normalizer if config.normalizer else None,
        sums.weight,
    )
    terms = jax.tree.map(
        lambda term: _numerics.zero_in_dropped_rows(term, inputs), terms
    )
    return LabelResults(terms, statistics, sums.total)


@functools.partial(label_results.defjvp, symbolic_zeros=True)
def _label_results_jvp(
    config: LabelConfig, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[LabelResults, LabelResults]:
    # The function itself, not its formula: a higher derivative then applies this rule.
    results = label_results(config, *primals)
    dot, total_dot = config.classes.total(
        (
            _local_dot(config, primals, results, tangents),
            _total_dot(config, primals[0], tangents[2]),
        )
    )
    if total_dot is None and results.total is not None:
        total_dot = jnp.zeros_like(results.total)
    statistics = statistics_dot(results.statistics, dot)
    return results, LabelResults(_terms_dot(config, dot), statistics, total_dot)


def _local_dot(
    config: LabelConfig,
    primals: tuple[Any, ...],
    results: LabelResults,
    tangents: tuple[Any, ...],
) -> LabelDot:
    """Returns what the classes here add to the tangents."""
    logits_dot = _numerics.unless_zero(tangents[0].logits)
    weights_dot = _numerics.unless_zero(tangents[2])
    rule = jax.checkpoint(functools.partial(label_terms_dot, config), prevent_cse=False)
    return rule(*primals, results.total, results.statistics, logits_dot, weights_dot)


def _total_dot(
    config: LabelConfig, inputs: Masked, weights_dot: Any
) -> jax.Array | None:
    """Returns what the classes here add to the tangent of the total weight."""
    weights_dot = _numerics.unless_zero(weights_dot)
    if weights_dot is None or not config.spread:
        return None
    return _spread.total_weight(inputs, weights_dot, config.classes, linear=True)


def _terms_dot(config: LabelConfig, dot: LabelDot) -> LabelTerms:
    normalizer_dot = dot.log_normalizer if config.normalizer else None
    return LabelTerms(dot.loss, dot.spread, normalizer_dot, dot.weight)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def partial_label_terms(
    config: LabelConfig,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    results: LabelResults,
) -> LabelTerms:
    """Returns the terms in `results`, of which every shard has its part's derivative.

    Terms vary over the shards as far as differentiation is concerned, though their
    values do not: a derivative by the logits, or the class weights, is what the classes
    here add to it. Reverse mode so transposes no collective, which JAX turns into a
    second sum over the shards where it does not check what varies
    (`check_vma=False`). Derivatives of that derivative, which is made of `results`, are
    whole. Without shards this is a copy of `results.terms`.

    Args:
      config: static.
      inputs: the logits and their masks.
      labels: as of `label_terms`.
      class_weights: as of `label_terms`.
      results: `label_results` of the same arguments, a constant for the first
        derivative.
    """
    return _partial(results.terms, inputs)


@functools.partial(partial_label_terms.defjvp, symbolic_zeros=True)
def _partial_label_terms_jvp(
    config: LabelConfig, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[LabelTerms, LabelTerms]:
    dot = _local_dot(config, primals[:3], primals[3], tangents)
    terms_dot = _terms_dot(config, dot)
    return partial_label_terms(config, *primals), _partial(terms_dot, primals[0])


@jax.jit
def _partial(terms: LabelTerms, inputs: Masked) -> LabelTerms:
    return jax.tree.map(lambda term: varying(term, inputs.logits), terms)


def statistics_dot(statistics: LabelStatistics, dot: LabelDot) -> LabelStatistics:
    """Returns the tangents of the statistics, from those of loss and log-normaliser.

    The largest logit and the pivot are constants: what they shift does not depend on
    them.
    """
    return LabelStatistics(
        loss=dot.loss,
        log_normalizer=dot.log_normalizer,
        largest=jnp.zeros_like(statistics.largest),
        log_mass=dot.log_normalizer,
        pivot=jnp.zeros_like(statistics.pivot),
        rival_scale=-statistics.rival_scale * dot.log_normalizer,
        rival_mass=statistics.label_mass * dot.loss,
        label_mass=-statistics.label_mass * dot.loss,
    )


# Compiled as one where derivatives are taken eagerly: the −inf of a dropped class, at
# which `jax_debug_infs` would stop, is then no result.
@functools.partial(jax.jit, static_argnums=0)
def label_terms_dot(
    config: LabelConfig,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    total: jax.Array | None,
    statistics: LabelStatistics,
    logits_dot: jax.Array | None,
    weights_dot: jax.Array | None,
) -> LabelDot:
    """Returns what the classes here add to the tangents, linear in two directions.

    `total` is the `total_weight` of the rows over all shards, for the spread.
    """
    classes = config.classes
    values = _numerics.masked(inputs)

    def inner(coefficients: jax.Array, direction: jax.Array) -> jax.Array:
        coefficients = _numerics.zero_where_dropped(coefficients, inputs)
        return jnp.sum(coefficients * direction, axis=classes.axis, keepdims=True)

    zero = _numerics.zero_in_dropped_rows(jnp.zeros_like(statistics.loss), inputs)
    loss, normalizer, spread = zero, zero, zero
    weight = zero if config.weight else None
    hit = _numerics.class_index(values, classes) == labels
    if logits_dot is not None:
        direction = logits_dot.astype(values.dtype)
        direction = _numerics.zero_where_dropped(direction, inputs)
        rival = jnp.exp(values - statistics.pivot) * statistics.rival_scale
        loss = inner(jnp.where(hit, -statistics.rival_mass, rival), direction)
        softmax = jnp.where(hit, statistics.label_mass, rival)
        normalizer = inner(softmax, direction)
        if total is not None:
            weights = 1 if class_weights is None else class_weights
            spread = inner(total * softmax - weights, direction)
    if config.spread and weights_dot is not None:
        surprise = statistics.log_normalizer - values
        direction = _numerics.zero_where_dropped(
            jnp.broadcast_to(weights_dot, values.shape), inputs
        )
        spread = spread + inner(surprise, direction)
    if config.weight and weights_dot is not None:
        weight = _spread.label_weight(inputs, labels, weights_dot, classes, linear=True)
        weight = _numerics.zero_in_dropped_rows(weight, inputs)
    spread = spread if config.spread else None
    return LabelDot(loss, spread, normalizer, weight)
