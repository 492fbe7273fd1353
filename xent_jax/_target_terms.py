"""The differentiable terms of the softmax losses of dense targets.

Like `_label_terms`: each is a `jax.custom_jvp` whose rule is the closed form "mean
parameter minus target" in a `jax.checkpoint`, so reverse mode keeps the logits, the
targets and a few numbers a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax import _numerics
from xent_jax._class_reductions import sum_classes
from xent_jax._numerics import Masked, TargetStatistics


class TargetTerms(NamedTuple):
    """Per row, of size 1 along the class axis."""

    loss: jax.Array  # Σ_j t_j (log-normaliser − x_j)
    log_normalizer: jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def target_terms(
    axis: int,
    logits: jax.Array,
    targets: jax.Array,
    keep_class: jax.Array | None,
    keep_row: jax.Array | None,
) -> TargetTerms:
    """Returns the terms that the loss of dense targets is composed of.

    Args:
      axis: the class axis, negative; static.
      logits: floating, any dtype.
      targets: of the logits' shape, in the accumulation dtype.
      keep_class: of the logits' shape.
      keep_row: of size 1 along the class axis.
    """
    inputs = Masked(logits, keep_class, keep_row)
    targets = _numerics.zero_where_dropped(targets, inputs)
    statistics = _numerics.target_statistics(inputs, targets, axis)
    terms = TargetTerms(statistics.loss, statistics.log_normalizer)
    return jax.tree.map(lambda term: _numerics.zero_where_dropped(term, inputs), terms)


@functools.partial(target_terms.defjvp, symbolic_zeros=True)
def _target_terms_jvp(
    axis: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[TargetTerms, TargetTerms]:
    logits, targets, keep_class, keep_row = primals
    inputs = Masked(logits, keep_class, keep_row)
    kept = _numerics.zero_where_dropped(targets, inputs)
    statistics = _numerics.target_statistics(inputs, kept, axis)
    logits_dot = _numerics.unless_zero(tangents[0])
    targets_dot = _numerics.unless_zero(tangents[1])
    rule = jax.checkpoint(functools.partial(_target_terms_dot, axis), prevent_cse=False)
    terms_dot = rule(inputs, targets, statistics, logits_dot, targets_dot)
    return target_terms(axis, *primals), terms_dot


def _target_terms_dot(
    axis: int,
    inputs: Masked,
    targets: jax.Array,
    statistics: TargetStatistics,
    logits_dot: jax.Array | None,
    targets_dot: jax.Array | None,
) -> TargetTerms:
    """Returns the tangents of the target terms, linear in the two directions."""
    values = _numerics.masked(inputs)
    targets = _numerics.zero_where_dropped(targets, inputs)

    def inner(coefficients: jax.Array, direction: jax.Array) -> jax.Array:
        coefficients = _numerics.zero_where_dropped(coefficients, inputs)
        direction = _numerics.zero_where_dropped(direction, inputs)
        return jnp.sum(coefficients * direction, axis=axis, keepdims=True)

    zero = _numerics.zero_where_dropped(jnp.zeros_like(statistics.loss), inputs)
    loss, normalizer = zero, zero
    if logits_dot is not None:
        direction = logits_dot.astype(values.dtype)
        loss = inner(_numerics.target_gradient(values, targets, statistics), direction)
        scale = 1 / (1 + statistics.excess)
        normalizer = inner(jnp.exp(values - statistics.largest) * scale, direction)
    if targets_dot is not None:
        surprise = jnp.log1p(statistics.excess) + (statistics.largest - values)
        loss = loss + inner(surprise, targets_dot)
    return TargetTerms(loss, normalizer)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def linearized_terms(axis: int, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns Σ_j g_j·x_j with g = T·softmax(x) − t, a constant to differentiation.

    As Σ g = 0, the logits may be replaced by their distance to the largest: the value
    then needs numbers a row, not the array g, and does not depend on a common offset.
    """
    inputs = Masked(logits, None, None)
    statistics = _numerics.target_statistics(inputs, targets, axis)

    def pull(inputs: Any, targets: Any, largest: Any) -> jax.Array:
        below = largest - _numerics.masked(inputs)
        return targets * jnp.where(targets == 0, 0, below)

    def push(inputs: Any, largest: Any) -> jax.Array:
        below = largest - _numerics.masked(inputs)
        power = jnp.exp(-below)
        return power * jnp.where(power == 0, 0, below)

    largest = statistics.largest
    targeted = sum_classes(pull, (inputs, targets, largest), axis)
    expected = sum_classes(push, (inputs, largest), axis)
    return targeted - statistics.total * (expected / (1 + statistics.excess))


@functools.partial(linearized_terms.defjvp, symbolic_zeros=True)
def _linearized_terms_jvp(
    axis: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    logits, targets = primals
    value = linearized_terms(axis, logits, targets)
    direction = _numerics.unless_zero(tangents[0])
    if direction is None:
        return value, jnp.zeros_like(value)
    constants = jax.lax.stop_gradient((logits, targets))
    inputs = Masked(constants[0], None, None)
    statistics = _numerics.target_statistics(inputs, constants[1], axis)

    def rule(
        inputs: Masked, targets: Any, statistics: Any, direction: Any
    ) -> jax.Array:
        values = _numerics.masked(inputs)
        gradient = _numerics.target_gradient(values, targets, statistics)
        product = gradient * direction.astype(values.dtype)
        return jnp.sum(product, axis=axis, keepdims=True)

    rule = jax.checkpoint(rule, prevent_cse=False)
    return value, rule(inputs, constants[1], statistics, direction)
