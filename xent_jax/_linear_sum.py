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

from xent_jax import _label_terms
from xent_jax._blocks import loop, varying, zeros
from xent_jax._label_terms import Coefficients, LabelConfig
from xent_jax._layer import Layer, Rows, capped, kept_hidden, product
from xent_jax._numerics import accumulation_dtype, known_tangents, tangent_of


class SumConfig(NamedTuple):
    """What is static in the sum."""

    row_block: int
    terms: LabelConfig
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
    config: SumConfig, rows: Rows, layer: Layer, coefficients: Coefficients
) -> jax.Array:
    """Returns Σ over the rows of their combined terms, without the logits.

    Args:
      config: static.
      rows: N of them, each counted as its coefficients say.
      layer: what makes the logits.
      coefficients: [N, 1], in the accumulation dtype.
    """
    return _value(config, rows, layer, coefficients)


@functools.partial(jax.jit, static_argnums=0)
def _value(
    config: SumConfig, rows: Rows, layer: Layer, coefficients: Coefficients
) -> jax.Array:
    dtype = accumulation_dtype(rows.hidden.dtype)
    kernel = layer.kernel.astype(rows.hidden.dtype)

    def step(total: jax.Array, block: _Block) -> tuple[jax.Array, None]:
        linear = product(block.rows.hidden, kernel)
        loss = _block_sum(
            config, layer, block.rows, linear, _small(layer), block.coefficients
        )
        return total + loss, None

    blocks = _split(config.row_block, rows, coefficients)
    start = zeros((), dtype, (rows, layer, coefficients))
    return loop(_unless_idle(config, step), start, blocks)[0]


def _block_sum(
    config: SumConfig,
    layer: Layer,
    rows: Rows,
    linear: jax.Array,
    small: _Small,
    coefficients: Coefficients,
) -> jax.Array:
    """Returns the loss of a block from its products with the kernel."""
    logits = capped(linear, small.bias, small.softcap)
    terms = _label_terms.label_terms(
        config.terms,
        logits,
        rows.labels,
        small.class_weights,
        layer.class_mask,
        rows.keep,
    )
    return jnp.sum(_label_terms.combined(terms, coefficients))


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
    config: SumConfig, primals: tuple[Any, ...], tangents: tuple[Any, ...]
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
    total, gradients = _value_and_gradients(config, wanted, *primals)
    total_dot = jnp.zeros_like(total)
    for gradient, dot in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(dots), strict=True
    ):
        total_dot = total_dot + jnp.sum(gradient * dot.astype(gradient.dtype))
    return total, total_dot


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_and_gradients(
    config: SumConfig,
    wanted: _Wanted,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, _Gradients]:
    """Returns the sum and its gradients, from one loop over the blocks."""
    return _scan(loop, config, wanted, rows, layer, coefficients)


@functools.partial(_value_and_gradients.defjvp, symbolic_zeros=True)
def _value_and_gradients_jvp(
    config: SumConfig,
    wanted: _Wanted,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Any, Any]:
    function = functools.partial(_scan, jax.lax.scan, config, wanted)
    return tangent_of(function, primals, known_tangents(tangents))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scan(
    scan: Any,
    config: SumConfig,
    wanted: _Wanted,
    rows: Rows,
    layer: Layer,
    coefficients: Coefficients,
) -> tuple[jax.Array, _Gradients]:
    # A gradient by what is the same on all devices of a `shard_map` would be summed
    # over them here, and once more by the derivative of this function's result.
    arguments = rows, layer, coefficients
    rows, layer, coefficients = jax.tree.map(
        lambda array: varying(array, arguments), arguments
    )
    dtype = accumulation_dtype(rows.hidden.dtype)
    kernel = layer.kernel.astype(rows.hidden.dtype)

    def step(carry: Any, block: _Block) -> tuple[Any, Any]:
        total, kernel_bar, small_bar = carry
        hidden = block.rows.hidden
        linear = product(hidden, kernel)
        loss, pull = jax.vjp(
            functools.partial(_block_sum, config, layer, block.rows),
            linear,
            _small(layer),
            block.coefficients,
        )
        linear_bar, small, coefficients_bar = pull(jnp.ones_like(loss))
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
        return zeros(array.shape, dtype, (rows, layer, coefficients))

    blocks = _split(config.row_block, rows, coefficients)
    if wanted.kernel and rows.hidden.dtype.itemsize == 2:
        # XLA:CPU is twice as fast where the left factor of half-precision numbers is
        # summed over its last axis, and folds a transposition that it can see.
        blocks = blocks._replace(transposed=blocks.rows.hidden.swapaxes(1, 2))
    (total, kernel_bar, small_bar), rows_bar = scan(
        jax.checkpoint(_unless_idle(config, step), prevent_cse=False),
        (
            zeros((), dtype, (rows, layer, coefficients)),
            start(layer.kernel) if wanted.kernel else None,
            jax.tree.map(start, _only(wanted.small, _small(layer))),
        ),
        blocks,
    )
    count = rows.hidden.shape[0]
    hidden_bar, coefficients_bar = jax.tree.map(
        lambda array: _joined(array)[:count], rows_bar
    )
    return total, _Gradients(hidden_bar, kernel_bar, small_bar, coefficients_bar)


def _only(wanted: tuple[bool, ...], values: Any) -> Any:
    """Returns a named tuple, with `None` for what is not wanted."""
    pairs = zip(wanted, values, strict=True)
    return type(values)(*(value if want else None for want, value in pairs))


def _split(size: int, rows: Rows, coefficients: Coefficients) -> _Block:
    """Returns the rows in blocks of `size`; a dropped row is what is missing."""
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
        return array.reshape(blocks, size, array.shape[-1])

    return jax.tree.map(split, _Block(rows, coefficients, None))


def _joined(blocks: jax.Array) -> jax.Array:
    """Returns the rows of all blocks as one axis."""
    count, size, features = blocks.shape
    return blocks.reshape(count * size, features)


def _unless_idle(config: SumConfig, step: Any) -> Any:
    """Returns the step of a scan, left out for a block of dropped rows."""
    if not config.skip:
        return step

    def counted(carry: Any, block: _Block) -> tuple[Any, Any]:
        carry, result = step(carry, block)
        return carry, jax.tree.map(lambda array: varying(array, (carry, block)), result)

    def idle(carry: Any, block: _Block) -> tuple[Any, Any]:
        _, shapes = jax.eval_shape(lambda: step(carry, block))
        nothing = jax.tree.map(
            lambda out: zeros(out.shape, out.dtype, (carry, block)), shapes
        )
        return carry, nothing

    def guarded(carry: Any, block: _Block) -> tuple[Any, Any]:
        counts = jnp.any(jnp.asarray(block.rows.keep))
        return jax.lax.cond(counts, counted, idle, carry, block)

    return guarded
