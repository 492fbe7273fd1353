"""The sum of a linear head's losses, with its gradient made on the way.

Rows come in blocks. The rule of the `jax.custom_jvp` computes a block's loss and its
gradients in the same step of one scan: three matmuls, as many as where the logits are
kept. What is left of the derivative is an inner product of those gradients with the
tangents, linear in them, so reverse mode recomputes nothing and forward mode is the
same rule; a higher derivative differentiates that scan, whose body is checkpointed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._forms.head import Layer, Rows, capped, kept_hidden, product
from xent_jax._forms.loops import loop, varying, zeros
from xent_jax._forms.rows import Given, row_results
from xent_jax._reductions.axis import psum
from xent_jax._reductions.lowering import is_sharded, one_device
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._reductions.tangents import known_tangents, tangent_of
from xent_jax._targets.block import Block, class_ids, values_of, zero_where_dropped
from xent_jax._targets.class_ids import ClassIds, Coefficients, Results, combined


class RowBlocks(NamedTuple):
    """The form; static."""

    kind: ClassIds
    size: int  # rows a block
    skip: bool  # whether blocks without a kept row are to be left out


class _Block(NamedTuple):
    """The part of the arguments that one step of the scan takes."""

    rows: Rows
    coefficients: Coefficients
    transposed: jax.Array | None  # the features of the rows, [D, N]


class _Small(NamedTuple):
    """The layer's differentiable parts that are not the kernel."""

    bias: jax.Array | None
    softcap: jax.Array | None
    class_weights: jax.Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def linear_loss_sum(
    form: RowBlocks, rows: Rows, layer: Layer, coefficients: Coefficients
) -> jax.Array:
    """Returns Σ over the rows of their combined terms, without the logits.

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
) -> jax.Array:
    kernel = layer.kernel.astype(rows.hidden.dtype)
    first = form.kind.classes.first(kernel.shape[1])

    def step(total: jax.Array, block: _Block) -> tuple[jax.Array, None]:
        linear = product(block.rows.hidden, kernel)
        logits = capped(linear, layer.bias, layer.softcap)
        given, labels = _logits_block(first, logits, layer, block.rows)
        results = row_results(Given(form.kind), given, labels)
        return total + _total(results, block.coefficients), None

    blocks = _split(form, rows, coefficients)
    # A sum over the classes does not differ over their shards.
    start = varying(
        _start(rows, coefficients),
        (rows, layer, coefficients),
        form.kind.classes.names,
    )
    return loop(_unless_idle(form, step), start, blocks)[0]


def _start(rows: Rows, coefficients: Coefficients) -> jax.Array:
    """Returns the sum over no rows, which varies over a mesh as their terms do."""
    dtype = accumulation_dtype(rows.hidden.dtype)
    return zeros((), dtype, (rows.labels, rows.keep, coefficients))


def _total(results: Results, coefficients: Coefficients) -> jax.Array:
    return jnp.sum(combined(results, coefficients))


def _logits_block(
    first: jax.Array | int, logits: jax.Array, layer: Layer, rows: Rows
) -> tuple[Block, jax.Array]:
    """Returns a block of rows with its logits, and their labels.

    `first` is the id of the first class here, which a loop must not ask the mesh for.
    """
    ids = class_ids(logits, -1, first)
    mask, weights = layer.class_mask, layer.class_weights
    return Block(logits, ids, mask, rows.keep, weights), rows.labels


def _small(layer: Layer) -> _Small:
    return _Small(layer.bias, layer.softcap, layer.class_weights)


class _Wanted(NamedTuple):
    """Which gradients are wanted; static."""

    hidden: bool
    kernel: bool
    small: tuple[bool, ...]
    coefficients: tuple[bool, ...]


class _Gradients(NamedTuple):
    """The derivatives of the sum, in the accumulation dtype; `None` if not wanted."""

    hidden: jax.Array | None
    kernel: jax.Array | None
    small: _Small
    coefficients: Coefficients


@functools.partial(linear_loss_sum.defjvp, symbolic_zeros=True)
def _linear_loss_sum_jvp(
    form: RowBlocks, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    rows_dot, layer_dot, coefficients_dot = known_tangents(tangents)
    hidden_dot = rows_dot.hidden
    if hidden_dot is not None:
        hidden_dot = kept_hidden(primals[0]._replace(hidden=hidden_dot))
    dots = _Gradients(hidden_dot, layer_dot.kernel, _small(layer_dot), coefficients_dot)
    wanted = _Wanted(
        dots.hidden is not None,
        dots.kernel is not None,
        tuple(dot is not None for dot in dots.small),
        tuple(dot is not None for dot in dots.coefficients),
    )
    total, gradients = _value_and_gradients(form, wanted, *primals)
    # Those by the coefficients are of all classes, the others of the classes here.
    part = _inner(gradients[:-1], dots[:-1])
    total_dot = zeros(total.shape, total.dtype, total)
    if part is not None:
        total_dot = total_dot + psum(part, form.kind.classes.axis_name)
    whole = _inner(gradients.coefficients, dots.coefficients)
    return total, total_dot if whole is None else total_dot + whole


def _inner(gradients: Any, dots: Any) -> jax.Array | None:
    """Returns the sum of the inner products with the tangents, `None` of nothing."""
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(dots), strict=True)
    products = [jnp.sum(bar * dot.astype(bar.dtype)) for bar, dot in pairs]
    return functools.reduce(jnp.add, products) if products else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_and_gradients(
    form: RowBlocks,
    wanted: _Wanted,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, _Gradients]:
    """Returns the sum and its gradients, from one loop over the blocks."""
    return _scan(loop, form, wanted, rows, layer, coefficients)


@functools.partial(_value_and_gradients.defjvp, symbolic_zeros=True)
def _value_and_gradients_jvp(
    form: RowBlocks,
    wanted: _Wanted,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Any, Any]:
    function = functools.partial(_scan, jax.lax.scan, form, wanted)
    return tangent_of(function, primals, known_tangents(tangents))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scan(
    scan: Any,
    form: RowBlocks,
    wanted: _Wanted,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, _Gradients]:
    # A gradient by what is the same on all devices of a `shard_map` would be summed
    # over them here, and once more by the derivative of this function's result.
    arguments = rows, layer, coefficients
    hidden = varying(rows.hidden, arguments)
    layer = jax.tree.map(lambda array: varying(array, arguments), layer)
    rows, coefficients = jax.tree.map(
        lambda array: varying(array, arguments, form.kind.classes.names),
        (rows, coefficients),
    )
    # Rows may be typed as if they differed over the classes.
    coefficients = jax.tree.map(
        lambda array: varying(array, (rows.labels, rows.keep)), coefficients
    )
    rows = rows._replace(hidden=hidden)
    dtype = accumulation_dtype(rows.hidden.dtype)
    kernel = layer.kernel.astype(rows.hidden.dtype)
    first = form.kind.classes.first(kernel.shape[1])

    def step(carry: Any, block: _Block) -> tuple[Any, Any]:
        total, kernel_bar, small_bar = carry
        hidden = block.rows.hidden
        linear = product(hidden, kernel)
        loss, linear_bar, small, coefficients_bar = _block_gradients(
            form, first, layer, block.rows, linear, block.coefficients
        )
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
        small_bar = jax.tree.map(jnp.add, small_bar, _only(wanted.small, small))
        rows_bar = hidden_bar, _only(wanted.coefficients, coefficients_bar)
        return (total + loss, kernel_bar, small_bar), rows_bar

    def start(array: jax.Array) -> jax.Array:
        return zeros(array.shape, dtype, array)

    blocks = _split(form, rows, coefficients)
    if wanted.kernel and rows.hidden.dtype.itemsize == 2:
        # XLA:CPU is twice as fast where the left factor of half-precision numbers is
        # summed over its last axis, and folds a transposition that it can see.
        blocks = blocks._replace(transposed=blocks.rows.hidden.swapaxes(1, 2))
    (total, kernel_bar, small_bar), rows_bar = scan(
        jax.checkpoint(_unless_idle(form, step), prevent_cse=False),
        (
            _start(rows, coefficients),
            start(layer.kernel) if wanted.kernel else None,
            jax.tree.map(start, _only(wanted.small, _small(layer))),
        ),
        blocks,
    )
    count = rows.hidden.shape[0]
    hidden_bar, coefficients_bar = jax.tree.map(
        lambda array: _joined(form, array)[:count], rows_bar
    )
    return total, _Gradients(hidden_bar, kernel_bar, small_bar, coefficients_bar)


def _block_gradients(
    form: RowBlocks,
    first: jax.Array | int,
    layer: Layer,
    rows: Rows,
    linear: jax.Array,
    coefficients: Coefficients,
) -> tuple[jax.Array, jax.Array, _Small, Coefficients]:
    """Returns the loss of a block, and its gradients by all but the features.

    Those by the logits and by the layer are what the classes here add: no collective is
    transposed.
    """
    logits, pull_logits = jax.vjp(capped, linear, layer.bias, layer.softcap)
    block, labels = _logits_block(first, logits, layer, rows)
    results = row_results(Given(form.kind).differentiated(), block, labels)
    # Of what a loss is composed of: numbers, and not the statistics behind them.
    outer = results._replace(statistics=None, prediction=None, total_weight=None)
    loss, pull_loss = jax.vjp(_total, outer, coefficients)
    outer_bar, coefficients_bar = pull_loss(jnp.ones_like(loss))
    slopes = form.kind.slopes(block, labels, results)
    parts = [
        (outer_bar.loss, slopes.loss),
        (outer_bar.log_normalizer, slopes.log_normalizer),
        (outer_bar.uniform, slopes.uniform),
    ]
    used = [True, coefficients.square is not None, slopes.uniform is not None]
    parts = [bar * slope for use, (bar, slope) in zip(used, parts, strict=True) if use]
    linear_bar, bias_bar, softcap_bar = pull_logits(functools.reduce(jnp.add, parts))
    weights_bar = None
    if layer.class_weights is not None and slopes.uniform is not None:
        surprise = results.log_normalizer - values_of(block)
        weights_bar = outer_bar.uniform * zero_where_dropped(surprise, block)
        weights_bar = jnp.sum(weights_bar, axis=0, keepdims=True)
    elif layer.class_weights is not None:
        weights_bar = zeros(layer.class_weights.shape, loss.dtype, layer.class_weights)
    small = _Small(bias_bar, softcap_bar, weights_bar)
    return loss, linear_bar, small, coefficients_bar


def _only(wanted: tuple[bool, ...], values: Any) -> Any:
    """Returns a named tuple, with `None` for what is not wanted."""
    pairs = zip(wanted, values, strict=True)
    return type(values)(*(value if want else None for want, value in pairs))


def _split(form: RowBlocks, rows: Rows, coefficients: Coefficients) -> _Block:
    """Returns the rows in blocks; a dropped row is what is missing.

    On several devices a block has every n-th row of n blocks: where rows are sharded
    over a mesh, all shards then have their part in every block, and none is sent
    around. Otherwise, and for blocks that may be left out, as dropped rows lie
    together, a block is of rows that lie together, which takes no copy.
    """
    size = form.size
    rows = rows._replace(hidden=kept_hidden(rows))
    count = rows.hidden.shape[0]
    blocks = -(-count // size)
    missing = blocks * size - count
    whole = isinstance(missing, int) and missing == 0
    if not whole and rows.keep is None:
        rows = rows._replace(keep=jnp.ones((count, 1), jnp.bool_))

    def split(array: jax.Array) -> jax.Array:
        if not whole:
            array = jnp.pad(array, ((0, missing), (0, 0)))
        features = array.shape[-1]
        return _together_or_apart(
            form,
            lambda array: array.reshape(blocks, size, features),
            lambda array: array.reshape(size, blocks, features).swapaxes(0, 1),
            array,
        )

    return jax.tree.map(split, _Block(rows, coefficients, None))


def _joined(form: RowBlocks, blocks: jax.Array) -> jax.Array:
    """Returns the rows of all blocks as one axis, in their order before `_split`."""
    count, size, features = blocks.shape
    return _together_or_apart(
        form,
        lambda blocks: blocks.reshape(count * size, features),
        lambda blocks: blocks.swapaxes(0, 1).reshape(count * size, features),
        blocks,
    )


def _together_or_apart(
    form: RowBlocks, together: Any, apart: Any, array: jax.Array
) -> jax.Array:
    """Returns one of two functions of an array, by where the rows of a block are."""
    if form.skip:
        return together(array)
    if is_sharded(array):
        return apart(array)
    return jax.lax.cond(one_device(), together, apart, array)


def _unless_idle(form: RowBlocks, step: Any) -> Any:
    """Returns the step of a scan, left out for a block of dropped rows."""
    if not form.skip:
        return step

    def idle(carry: Any, block: _Block) -> tuple[Any, Any]:
        _, shapes = jax.eval_shape(lambda: step(carry, block))

        def nothing(out: jax.ShapeDtypeStruct) -> jax.Array:
            # XLA:GPU takes a constant out of the branch, and then copies the kernel's
            # gradient in every step.
            zero = zeros(out.shape, out.dtype, out)
            return jnp.where(block.rows.labels[0, 0] > 0, zero, zero)

        return carry, jax.tree.map(nothing, shapes)

    def guarded(carry: Any, block: _Block) -> tuple[Any, Any]:
        counts = jnp.any(jnp.asarray(block.rows.keep))
        return jax.lax.cond(counts, step, idle, carry, block)

    return guarded
