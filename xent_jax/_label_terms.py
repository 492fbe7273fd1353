"""The differentiable terms of the softmax losses of class ids.

A `jax.custom_jvp` over the statistics of `_numerics`. Its rule is the closed form
"mean parameter minus target", wrapped in `jax.checkpoint`: forward mode, reverse mode
and every nesting of the two follow from it, and reverse mode keeps the logits and a
few numbers a row, but no softmax.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax import _numerics
from xent_jax._class_reductions import sum_classes
from xent_jax._numerics import LabelStatistics, Masked


class LabelConfig(NamedTuple):
    """What is static in the label core."""

    axis: int
    spread: bool  # whether the loss of evenly spread targets is wanted
    normalizer: bool  # whether the log-normaliser is wanted


class LabelTerms(NamedTuple):
    """Per row, of size 1 along the class axis; `None` where not wanted."""

    loss: jax.Array  # log-normaliser − x_y
    spread: jax.Array | None  # Σ_j w_j (log-normaliser − x_j) over the kept classes
    log_normalizer: jax.Array | None


class LabelDot(NamedTuple):
    """The tangents of all terms."""

    loss: jax.Array
    spread: jax.Array | None
    log_normalizer: jax.Array


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
      logits: floating, any dtype.
      labels: int32, of size 1 along the class axis; negative where not a class.
      class_weights: of size V along the class axis and 1 along the others.
      keep_class: of the logits' shape, or of size 1 along other axes.
      keep_row: of size 1 along the class axis.
    """
    inputs = Masked(logits, keep_class, keep_row)
    terms, _ = _label_terms(config, inputs, labels, class_weights)
    return terms


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _label_terms(
    config: LabelConfig,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
) -> tuple[LabelTerms, LabelStatistics]:
    """Returns the terms, and the statistics that their derivatives are made of."""
    statistics = _numerics.label_statistics(inputs, labels, config.axis)
    spread = None
    if config.spread:
        spread = _spread(config.axis, inputs, labels, class_weights, statistics)
    terms = LabelTerms(
        statistics.loss,
        spread,
        statistics.log_normalizer if config.normalizer else None,
    )
    terms = jax.tree.map(lambda term: _numerics.zero_where_dropped(term, inputs), terms)
    return terms, statistics


def _spread(
    axis: int,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    statistics: LabelStatistics,
) -> jax.Array:
    """Returns Σ_j w_j (log-normaliser − x_j), from non-negative terms alone.

    The differences are taken from the best rival, which is known before the largest
    logit is, so that the sum shares its pass over the logits with the normaliser's.
    """
    below = rivals_below(axis, inputs, labels, class_weights, statistics.pivot)
    rivals, own = split_weight(inputs, labels, class_weights, axis)
    return settled_spread(below, rivals, own, statistics)


def rivals_below(
    axis: int,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    pivot: jax.Array,
) -> jax.Array:
    """Returns Σ_{j≠y} w_j (pivot − x_j) over the kept classes."""

    def rival_term(
        inputs: Any, index: Any, labels: Any, weights: Any, pivot: Any
    ) -> Any:
        below = pivot - _numerics.masked(inputs)
        if weights is not None:
            # A weight of 0 drops an infinite difference.
            below = weights * jnp.where(weights == 0, 0, below)
        below = jnp.where(index == labels, 0, below)
        return _numerics.zero_where_dropped(below, inputs)

    index = _numerics.class_index(inputs.logits, axis)
    operands = (inputs, index, labels, class_weights, pivot)
    return sum_classes(rival_term, operands, axis)


def settled_spread(
    below: jax.Array, rivals: jax.Array, own: jax.Array, statistics: LabelStatistics
) -> jax.Array:
    """Returns Σ_j w_j (log-normaliser − x_j) from the sums over the rivals.

    Args:
      below: Σ_{j≠y} w_j (pivot − x_j).
      rivals: the sum of the kept rivals' weights.
      own: the label's weight, 0 where its class is dropped.
      statistics: of the row.
    """
    # Where every rival is impossible the pivot is a stand-in, and so is the rise.
    rise = jnp.where(rivals == 0, 0, statistics.largest - statistics.pivot)
    gap = jnp.where(own == 0, 0, statistics.loss - statistics.log_mass)
    fixed = (rivals + own) * statistics.log_mass
    return below + rivals * rise + own * gap + fixed


def split_weight(
    inputs: Masked, labels: jax.Array, class_weights: jax.Array | None, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the kept rivals' weights and the label's weight, a row."""
    hit = _numerics.class_index(inputs.logits, axis) == labels
    rival = ~hit
    if inputs.keep_class is not None:
        hit, rival = hit & inputs.keep_class, rival & inputs.keep_class
    rivals = _sum_of_weights(rival, inputs, class_weights, axis)
    return rivals, _sum_of_weights(hit, inputs, class_weights, axis)


def _sum_of_weights(
    chosen: jax.Array, inputs: Masked, class_weights: jax.Array | None, axis: int
) -> jax.Array:
    """Returns the sum of the chosen classes' weights, or their number, a row."""
    count = chosen.astype(_numerics.accumulation_dtype(inputs.logits.dtype))
    if class_weights is None:
        return jnp.sum(count, axis=axis, keepdims=True)
    # The sum gives the weights the mask's sharding, which a select asks for.
    weights = jnp.where(chosen, class_weights + 0 * count, 0)
    return jnp.sum(weights, axis=axis, keepdims=True)


def total_weight(
    inputs: Masked, class_weights: jax.Array | None, axis: int
) -> jax.Array:
    """Returns the sum of the kept classes' weights, or their number, a row."""
    if inputs.keep_class is None:
        if class_weights is not None:
            return jnp.sum(class_weights, axis=axis, keepdims=True)
        dtype = _numerics.accumulation_dtype(inputs.logits.dtype)
        return jnp.full((1,) * inputs.logits.ndim, inputs.logits.shape[axis], dtype)
    return _sum_of_weights(inputs.keep_class, inputs, class_weights, axis)


@functools.partial(_label_terms.defjvp, symbolic_zeros=True)
def _label_terms_jvp(
    config: LabelConfig, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    inputs, labels, class_weights = primals
    # The function itself, not its formula: a higher derivative then applies this rule.
    terms, statistics = _label_terms(config, *primals)
    logits_dot = _numerics.unless_zero(tangents[0].logits)
    weights_dot = _numerics.unless_zero(tangents[2])
    total = None
    if config.spread:
        total = total_weight(inputs, class_weights, config.axis)
    rule = jax.checkpoint(functools.partial(label_terms_dot, config), prevent_cse=False)
    dot = rule(
        inputs, labels, class_weights, total, statistics, logits_dot, weights_dot
    )
    normalizer_dot = dot.log_normalizer if config.normalizer else None
    terms_dot = LabelTerms(dot.loss, dot.spread, normalizer_dot)
    return (terms, statistics), (terms_dot, statistics_dot(statistics, dot))


def statistics_dot(statistics: LabelStatistics, dot: LabelDot) -> LabelStatistics:
    """Returns the tangents of the statistics, from those of loss and log-normaliser.

    The largest logit and the pivot are constants: what they shift does not depend on
    them.
    """
    constant = jnp.zeros_like(statistics.largest)
    return LabelStatistics(
        loss=dot.loss,
        log_normalizer=dot.log_normalizer,
        largest=constant,
        log_mass=dot.log_normalizer,
        pivot=constant,
        rival_scale=-statistics.rival_scale * dot.log_normalizer,
        rival_mass=statistics.label_mass * dot.loss,
        label_mass=-statistics.label_mass * dot.loss,
    )


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
    """Returns the tangents of all label terms, linear in the two directions.

    `total` is the `total_weight` of the rows, for the spread.
    """
    axis = config.axis
    values = _numerics.masked(inputs)

    def inner(coefficients: jax.Array, direction: jax.Array) -> jax.Array:
        coefficients = _numerics.zero_where_dropped(coefficients, inputs)
        return jnp.sum(coefficients * direction, axis=axis, keepdims=True)

    zero = _numerics.zero_where_dropped(jnp.zeros_like(statistics.loss), inputs)
    loss, normalizer, spread = zero, zero, zero
    if logits_dot is not None:
        direction = logits_dot.astype(values.dtype)
        direction = _numerics.zero_where_dropped(direction, inputs)
        hit = _numerics.class_index(values, axis) == labels
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
    return LabelDot(loss, spread if config.spread else None, normalizer)
