"""The surrogate loss Σ g·x, whose bracket g is a constant to differentiation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.classes import sum_classes
from xent_jax._reductions.tangents import unless_zero
from xent_jax._targets.block import Block, class_ids, values_of
from xent_jax._targets.dense import DenseTargets, Results


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def linearized_loss(
    classes: ClassAxis, logits: jax.Array, targets: jax.Array
) -> jax.Array:
    """Returns Σ_j g_j·x_j with g = T·softmax(x) − t, a constant to differentiation.

    As Σ g = 0, the logits may be replaced by their distance to the largest: the value
    then needs numbers a row, not the array g, and does not depend on a common offset.
    """
    return _value(classes, logits, targets)


@functools.partial(jax.jit, static_argnums=0)
def _value(classes: ClassAxis, logits: jax.Array, targets: jax.Array) -> jax.Array:
    block, results, pulled = _results(classes, logits, targets)
    row = results.statistics

    def push(block: Block, largest: jax.Array) -> jax.Array:
        below = largest - values_of(block)
        power = jnp.exp(-below)
        return power * jnp.where(power == 0, 0, below)

    expected = sum_classes(push, (block, row.largest), classes.axis)
    return pulled - row.total * (expected / (1 + row.excess))


@functools.partial(jax.jit, static_argnums=0)
def _results(
    classes: ClassAxis, logits: jax.Array, targets: jax.Array
) -> tuple[Block, Results, jax.Array]:
    """Returns the block, its results, and Σ t_j (largest − x_j)."""
    block = Block(logits, class_ids(logits, classes.axis, 0))
    kind = DenseTargets(classes, differentiated=True)
    sums = kind.sums(block, targets)
    return block, kind.results(sums, targets, None), sums.distance


@functools.partial(linearized_loss.defjvp, symbolic_zeros=True)
def _linearized_loss_jvp(
    classes: ClassAxis, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    value = linearized_loss(classes, *primals)
    direction = unless_zero(tangents[0])
    if direction is None:
        return value, jnp.zeros_like(value)
    constants = jax.lax.stop_gradient(primals)
    results = _results(classes, *constants)[1]
    rule = jax.checkpoint(functools.partial(_tangent, classes), prevent_cse=False)
    return value, rule(*constants, results, direction)


@functools.partial(jax.jit, static_argnums=0)
def _tangent(
    classes: ClassAxis,
    logits: jax.Array,
    targets: jax.Array,
    results: Results,
    direction: jax.Array,
) -> jax.Array:
    block = Block(logits, class_ids(logits, classes.axis, 0))
    slope = DenseTargets(classes).slope(block, targets, results)
    product = slope * direction.astype(slope.dtype)
    return jnp.sum(product, axis=classes.axis, keepdims=True)
