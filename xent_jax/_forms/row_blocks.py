"""The sum of a linear head's losses, with its gradient made on the way.

Rows come in blocks. The rule of the `jax.custom_jvp` computes a block's loss and its
gradients in the same step of one scan: three matmuls, as many as where the logits are
kept. What is left of the derivative is an inner product of those gradients with the
tangents, linear in them, so reverse mode recomputes nothing and forward mode is the
same rule; a higher derivative differentiates that scan, whose body is checkpointed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from xent_jax._arguments.options import LogitOptions, changed
from xent_jax._forms.head import Layer, Rows, kept_hidden, product, target_of
from xent_jax._forms.loops import loop, varying, zeros
from xent_jax._forms.row_gradients import (
    Gradients,
    RowBlocks,
    Small,
    alike,
    no_rows,
    only,
    total_and_factors,
    total_of,
)
from xent_jax._forms.rows import Given, row_results
from xent_jax._forms.splitting import RowBlock, joined, split, unless_idle
from xent_jax._forms.tpu import choice
from xent_jax._reductions.axis import psum
from xent_jax._reductions.lowering import Place, by_place
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._reductions.tangents import known_tangents, tangent_of
from xent_jax._targets.block import Block, class_ids, values_of, zero_where_dropped
from xent_jax._targets.class_ids import Coefficients


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def linear_loss_sum(
    form: RowBlocks, rows: Rows, layer: Layer, coefficients: Coefficients
) -> tuple[jax.Array, Any]:
    """Returns Σ over the rows of their combined terms, without the logits.

    And the results of the rows, which are constants, if the form has them.

    Args:
      form: static.
      rows: N of them, each counted as its coefficients say.
      layer: what makes the logits.
      coefficients: [N, 1], in the accumulation dtype.
    """
    return _value(form, rows, layer, coefficients)


@functools.partial(jax.jit, static_argnums=0)
def _value(
    form: RowBlocks, rows: Rows, layer: Layer, coefficients: Coefficients
) -> tuple[jax.Array, Any]:
    kernel = layer.kernel.astype(rows.hidden.dtype)
    first = form.kind.classes.first(kernel.shape[1])

    def step(total: jax.Array, block: RowBlock) -> tuple[jax.Array, Any]:
        linear = product(block.rows.hidden, kernel)
        logits = changed(linear, layer.options, block.rows.options)
        given = _logits_block(first, logits, layer, block.rows)
        target = target_of(block.rows, layer)
        results = row_results(Given(form.kind), given, target)
        total = total + total_of(results, block.coefficients)
        return total, _statistics(form, results)

    blocks = split(rows, coefficients, form.size, form.skip)
    # A sum over the classes does not differ over their shards.
    start = varying(
        no_rows(rows, coefficients),
        (rows, layer, coefficients),
        form.kind.classes.names,
    )
    total, statistics = loop(_step_of(form, step), start, blocks)
    return total, _of_rows(form, rows, statistics)


def _step_of(form: RowBlocks, step: Any) -> Any:
    return unless_idle(step) if form.skip else step


def _logits_block(
    first: jax.Array | int, logits: jax.Array, layer: Layer, rows: Rows
) -> Block:
    """Returns a block of rows with its logits.

    `first` is the id of the first class here, which a loop must not ask the mesh for.
    """
    ids = class_ids(logits, -1, first)
    mask, weights = layer.class_mask, layer.class_weights
    return Block(logits, ids, mask, rows.keep, weights)


def _statistics(form: RowBlocks, results: Any) -> Any:
    """Returns the results of the rows that are wanted for themselves."""
    if not form.statistics:
        return None
    return results._replace(others=None, statistics=None, total_weight=None)


def _of_rows(form: RowBlocks, rows: Rows, statistics: Any) -> Any:
    """Returns the statistics of all rows, which come in blocks."""
    if statistics is None:
        return None
    count = rows.hidden.shape[0]
    results = jax.tree.map(lambda array: joined(array, form.skip)[:count], statistics)
    if rows.keep is None:
        return results
    # A block that was left out has zeros.
    prediction = jnp.where(rows.keep, results.prediction, -1)
    return results._replace(prediction=prediction)


@functools.partial(linear_loss_sum.defjvp, symbolic_zeros=True)
def _linear_loss_sum_jvp(
    form: RowBlocks, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    rows_dot, layer_dot, coefficients_dot = known_tangents(tangents)
    hidden_dot = rows_dot.hidden
    if hidden_dot is not None:
        hidden_dot = kept_hidden(primals[0]._replace(hidden=hidden_dot))
    dots = Gradients(
        hidden_dot,
        rows_dot.options,
        layer_dot.kernel,
        Small.of(layer_dot),
        coefficients_dot,
    )
    wanted = jax.tree.map(
        lambda dot: dot is not None, dots, is_leaf=lambda dot: dot is None
    )
    total, statistics, gradients = _value_and_gradients(form, wanted, *primals)
    # Those by the coefficients are of all classes, the others of the classes here.
    part = _inner(gradients[:-1], dots[:-1])
    total_dot = zeros(total.shape, total.dtype, total)
    if part is not None:
        total_dot = total_dot + psum(part, form.kind.classes.axis_name)
    whole = _inner(gradients.coefficients, dots.coefficients)
    total_dot = total_dot if whole is None else total_dot + whole
    constant = jax.tree.map(jax.custom_derivatives.zero_from_primal, statistics)
    return (total, statistics), (total_dot, constant)


def _inner(gradients: Any, dots: Any) -> jax.Array | None:
    """Returns the sum of the inner products with the tangents, `None` of nothing."""
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(dots), strict=True)
    products = [jnp.sum(bar * dot.astype(bar.dtype)) for bar, dot in pairs]
    return functools.reduce(jnp.add, products) if products else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_and_gradients(
    form: RowBlocks,
    wanted: Gradients,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, Any, Gradients]:
    """Returns the sum, statistics and gradients, from one loop over the blocks."""
    if choice.are_for(form, wanted, rows, layer):
        return _by_place(form, wanted, rows, layer, coefficients)
    return _scan(loop, form, wanted, rows, layer, coefficients)


# Compiled as one, because only what is lowered knows its place.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_place(
    form: RowBlocks,
    wanted: Gradients,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, Any, Gradients]:
    shapes = jax.eval_shape(lambda: (rows, layer))

    def kernels_at(place: Place) -> Any:
        return choice.kernels_at(place, form, wanted, *shapes)

    scan = functools.partial(_scan, loop, form, wanted)
    return by_place(scan, kernels_at, maps=False)(rows, layer, coefficients)


@functools.partial(_value_and_gradients.defjvp, symbolic_zeros=True)
def _value_and_gradients_jvp(
    form: RowBlocks,
    wanted: Gradients,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Any, Any]:
    function = functools.partial(_scan, jax.lax.scan, form, wanted)
    return tangent_of(function, primals, known_tangents(tangents))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scan(
    scan: Any,
    form: RowBlocks,
    wanted: Gradients,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, Any, Gradients]:
    rows, layer, coefficients = alike(form, rows, layer, coefficients)
    dtype = accumulation_dtype(rows.hidden.dtype)
    kernel = layer.kernel.astype(rows.hidden.dtype)
    first = form.kind.classes.first(kernel.shape[1])

    def start(array: jax.Array) -> jax.Array:
        return zeros(array.shape, dtype, array)

    blocks = split(rows, coefficients, form.size, form.skip)
    if wanted.kernel and rows.hidden.dtype.itemsize == 2:
        # XLA:CPU is twice as fast where the left factor of half-precision numbers is
        # summed over its last axis, and folds a transposition that it can see.
        blocks = blocks._replace(transposed=blocks.rows.hidden.swapaxes(1, 2))
    step = functools.partial(_step, form, wanted, first, layer, kernel)
    (total, kernel_bar, small_bar), (rows_bar, statistics) = scan(
        jax.checkpoint(_step_of(form, step), prevent_cse=False),
        (
            no_rows(rows, coefficients),
            start(layer.kernel) if wanted.kernel else None,
            jax.tree.map(start, only(wanted.small, Small.of(layer))),
        ),
        blocks,
    )
    count = rows.hidden.shape[0]
    hidden_bar, options_bar, coefficients_bar = jax.tree.map(
        lambda array: joined(array, form.skip)[:count], rows_bar
    )
    gradients = Gradients(
        hidden_bar, options_bar, kernel_bar, small_bar, coefficients_bar
    )
    return total, _of_rows(form, rows, statistics), gradients


def _step(
    form: RowBlocks,
    wanted: Gradients,
    first: jax.Array | int,
    layer: Layer,
    kernel: jax.Array,
    sums: tuple[jax.Array, Any, Any],
    block: RowBlock,
) -> tuple[Any, Any]:
    """Returns the sums with those of one more block, and its results a row.

    `kernel` is the layer's in the dtype of the features; the sums are the loss and the
    gradients by the kernel and by the small parts of the layer.
    """
    total, kernel_bar, small_bar = sums
    hidden = block.rows.hidden
    linear = product(hidden, kernel)
    made = _block_gradients(form, first, layer, block.rows, linear, block.coefficients)
    loss, results, linear_bar, options_bar, small, coefficients_bar = made
    # As the matmuls take it: in 16 bits where the features are.
    linear_bar = linear_bar.astype(hidden.dtype)
    hidden_bar = None
    if wanted.hidden:
        hidden_bar = product(linear_bar, kernel, (1, 1))
        if block.rows.keep is not None:
            hidden_bar = jnp.where(block.rows.keep, hidden_bar, 0)
    if block.transposed is not None:
        kernel_bar = kernel_bar + product(block.transposed, linear_bar)
    elif wanted.kernel:
        kernel_bar = kernel_bar + product(hidden, linear_bar, (0, 0))
    small_bar = jax.tree.map(jnp.add, small_bar, only(wanted.small, small))
    rows_bar = (
        hidden_bar,
        only(wanted.options, options_bar),
        only(wanted.coefficients, coefficients_bar),
    )
    of_rows = rows_bar, _statistics(form, results)
    return (total + loss, kernel_bar, small_bar), of_rows


def _block_gradients(
    form: RowBlocks,
    first: jax.Array | int,
    layer: Layer,
    rows: Rows,
    linear: jax.Array,
    coefficients: Coefficients,
) -> tuple[jax.Array, Any, jax.Array, LogitOptions, Small, Coefficients]:
    """Returns the loss of a block, its results, and its gradients by all but features.

    Those by the logits and by the layer are what the classes here add: no collective is
    transposed.
    """
    logits, pull_logits = jax.vjp(changed, linear, layer.options, rows.options)
    block = _logits_block(first, logits, layer, rows)
    target = target_of(rows, layer)
    results = row_results(Given(form.kind).differentiated(), block, target)
    loss, factors, coefficients_bar = total_and_factors(results, coefficients)
    slope = form.kind.slope(block, target, results, factors)
    linear_bar, layer_bar, options_bar = pull_logits(slope)
    weights_bar = None
    if layer.class_weights is not None and results.uniform is not None:
        surprise = results.log_normalizer - values_of(block)
        weights_bar = factors.uniform * zero_where_dropped(surprise, block)
        weights_bar = jnp.sum(weights_bar, axis=0, keepdims=True)
    elif layer.class_weights is not None:
        weights_bar = zeros(layer.class_weights.shape, loss.dtype, layer.class_weights)
    small = Small(layer_bar, weights_bar)
    return loss, results, linear_bar, options_bar, small, coefficients_bar
