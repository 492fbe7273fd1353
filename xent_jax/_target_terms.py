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
from xent_jax._class_axis import ClassAxis
from xent_jax._class_reductions import sum_classes
from xent_jax._numerics import Masked, TargetStatistics


class TargetTerms(NamedTuple):
    """Per row, of size 1 along the class axis."""

    loss: jax.Array  # Σ_j t_j (log-normaliser − x_j)
    log_normalizer: jax.Array


class _TargetDot(NamedTuple):
    """What the classes here add to the tangents of a row's statistics."""

    loss: jax.Array
    log_normalizer: jax.Array
    top: jax.Array  # of the largest logits, summed
    below: jax.Array  # Σ_{x_j<largest} exp(x_j − largest) ẋ_j
    rest: jax.Array
    total: jax.Array


def target_terms(
    classes: ClassAxis,
    logits: jax.Array,
    targets: jax.Array,
    keep_class: jax.Array | None,
    keep_row: jax.Array | None,
) -> TargetTerms:
    """Returns the terms that the loss of dense targets is composed of.

    Args:
      classes: the class axis; static.
      logits: floating, any dtype; of the classes here, as all arrays are.
      targets: of the logits' shape, in the accumulation dtype.
      keep_class: of the logits' shape.
      keep_row: of size 1 along the class axis, the same on all shards.
    """
    inputs = Masked(logits, keep_class, keep_row)
    statistics = _statistics(classes, inputs, targets)
    terms = TargetTerms(statistics.loss, statistics.log_normalizer)
    return jax.tree.map(
        lambda term: _numerics.zero_in_dropped_rows(term, inputs), terms
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _statistics(
    classes: ClassAxis, inputs: Masked, targets: jax.Array
) -> TargetStatistics:
    """Returns the statistics of every row."""
    targets = _numerics.zero_where_dropped(targets, inputs)
    return _numerics.target_statistics(inputs, targets, classes)


@functools.partial(_statistics.defjvp, symbolic_zeros=True)
def _statistics_jvp(
    classes: ClassAxis, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[TargetStatistics, TargetStatistics]:
    # The function itself, not its formula: a higher derivative then applies this rule.
    statistics = _statistics(classes, *primals)
    logits_dot = _numerics.unless_zero(tangents[0].logits)
    targets_dot = _numerics.unless_zero(tangents[1])
    rule = jax.checkpoint(functools.partial(_local_dot, classes), prevent_cse=False)
    dot = classes.total(rule(*primals, statistics, logits_dot, targets_dot))
    largest_dot = dot.top / statistics.ties
    # One of the largest logits is left out of the excess, so it has their tangent, and
    # what falls is the rest relative to it.
    below = statistics.excess - (statistics.ties - 1)
    statistics_dot = TargetStatistics(
        loss=dot.loss,
        log_normalizer=dot.log_normalizer,
        largest=largest_dot,
        ties=jnp.zeros_like(statistics.ties),
        excess=dot.below - below * largest_dot,
        total=dot.total,
        rest=dot.rest,
    )
    return statistics, statistics_dot


# Compiled as one where derivatives are taken eagerly: the −inf of a dropped class, at
# which `jax_debug_infs` would stop, is then no result.
@functools.partial(jax.jit, static_argnums=0)
def _local_dot(
    classes: ClassAxis,
    inputs: Masked,
    targets: jax.Array,
    statistics: TargetStatistics,
    logits_dot: jax.Array | None,
    targets_dot: jax.Array | None,
) -> _TargetDot:
    """Returns what the classes here add, linear in the two directions."""
    values = _numerics.masked(inputs)
    targets = _numerics.zero_where_dropped(targets, inputs)
    largest = statistics.largest

    def inner(coefficients: jax.Array, direction: jax.Array) -> jax.Array:
        coefficients = _numerics.zero_where_dropped(coefficients, inputs)
        direction = _numerics.zero_where_dropped(direction, inputs)
        return jnp.sum(coefficients * direction, axis=classes.axis, keepdims=True)

    zero = _numerics.zero_in_dropped_rows(jnp.zeros_like(statistics.loss), inputs)
    loss, normalizer, top, below, rest, total = (zero,) * 6
    if logits_dot is not None:
        direction = logits_dot.astype(values.dtype)
        loss = inner(_numerics.target_gradient(values, targets, statistics), direction)
        power = jnp.exp(values - largest)
        normalizer = inner(power * (1 / (1 + statistics.excess)), direction)
        below = inner(jnp.where(values >= largest, 0, power), direction)
        top = inner((values >= largest).astype(values.dtype), direction)
    if targets_dot is not None:
        surprise = jnp.log1p(statistics.excess) + (largest - values)
        loss = loss + inner(surprise, targets_dot)
        rest = inner((values < largest).astype(values.dtype), targets_dot)
        total = inner(jnp.ones_like(values), targets_dot)
    return _TargetDot(loss, normalizer, top, below, rest, total)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def linearized_terms(axis: int, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns Σ_j g_j·x_j with g = T·softmax(x) − t, a constant to differentiation.

    As Σ g = 0, the logits may be replaced by their distance to the largest: the value
    then needs numbers a row, not the array g, and does not depend on a common offset.
    """
    inputs = Masked(logits, None, None)
    statistics = _numerics.target_statistics(inputs, targets, ClassAxis(axis))

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
    statistics = _numerics.target_statistics(inputs, constants[1], ClassAxis(axis))

    @jax.jit
    def rule(
        inputs: Masked, targets: Any, statistics: Any, direction: Any
    ) -> jax.Array:
        values = _numerics.masked(inputs)
        gradient = _numerics.target_gradient(values, targets, statistics)
        product = gradient * direction.astype(values.dtype)
        return jnp.sum(product, axis=axis, keepdims=True)

    rule = jax.checkpoint(rule, prevent_cse=False)
    return value, rule(inputs, constants[1], statistics, direction)
