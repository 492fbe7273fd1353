"""The form of a linear head whose classes come in blocks, for a result per row.

The sums of the blocks are merged, and so are the tangents, in a scan whose body is
checkpointed: reverse mode makes each block of logits again instead of keeping it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._arguments.options import changed
from xent_jax._forms.head import Layer, Rows, kept_hidden, product, target_of
from xent_jax._forms.loops import loop, varying, zeros
from xent_jax._forms.tpu import choice
from xent_jax._reductions.lowering import Place, by_place
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._reductions.tangents import tangent_of
from xent_jax._reductions.transposed import transposed_by_place
from xent_jax._targets.block import Block
from xent_jax._targets.rivals import Labels

_CLASSES_OF_PIVOT = 128


class ClassBlocks(NamedTuple):
    """The form; static. Its arguments are the rows and the layer of a head."""

    kind: Any
    size: int  # classes a block
    tangent_size: int  # those of a block of the derivative

    def differentiated(self) -> "ClassBlocks":
        """Returns the form for results that derivatives use too."""
        return self

    def results(self, rows: Rows, layer: Layer) -> Any:
        """Returns the results of every row, [N, 1]."""
        return _results(self, rows, layer)

    def tangents(self, primals: Any, results: Any, dots: Any) -> Any:
        """Returns the tangents of the results that are sums over the classes."""
        rows, layer = primals
        rows_dot, layer_dot = dots
        hidden_dot = rows_dot.hidden
        if hidden_dot is not None:
            # In float32, so that reverse mode adds the blocks up in float32.
            hidden_dot = kept_hidden(rows._replace(hidden=hidden_dot))
            hidden_dot = hidden_dot.astype(results.loss.dtype)
        rows_dot = rows_dot._replace(hidden=hidden_dot)
        form = self._replace(size=self.tangent_size)
        dot = _tangents(form, rows, rows_dot, layer, layer_dot, results)
        # Rows that are typed as if they differed over the classes have such results.
        return jax.tree.map(lambda array: varying(array, results.statistics), dot)


@functools.partial(jax.jit, static_argnums=0)
def _results(form: ClassBlocks, rows: Rows, layer: Layer) -> Any:
    blocks = functools.partial(_results_of_blocks, form)
    if not choice.are_for_rows(form.kind, rows, layer):
        return blocks(rows, layer)
    shapes = jax.eval_shape(lambda: (rows, layer))

    def kernels_at(place: Place) -> Any:
        return choice.results_at(place, form.kind, *shapes)

    return by_place(blocks, kernels_at, maps=False)(rows, layer)


def _results_of_blocks(form: ClassBlocks, rows: Rows, layer: Layer) -> Any:
    kind = form.kind
    kept = rows._replace(hidden=kept_hidden(rows))

    first = kind.classes.first(layer.kernel.shape[1])
    if layer.teacher is not None:
        kept = _with_pivot(form, kept, layer, first)

    def sums_of(index: jax.Array) -> Any:
        block, target = _block(form, kept, layer, first, index)[:2]
        return kind.sums(block, target)

    def step(total: Any, index: jax.Array) -> tuple[Any, None]:
        return kind.merged(total, sums_of(index)), None

    indices = _indices(form, layer)
    nothing = jax.tree.map(
        lambda out: zeros(out.shape, out.dtype, (kept, layer)),
        jax.eval_shape(sums_of, indices[0]),
    )
    total, _ = loop(step, kind.nothing(nothing), indices)
    return kind.results(kind.over_shards(total), kept.target, rows.keep)


def _with_pivot(
    form: ClassBlocks, rows: Rows, layer: Layer, first: jax.Array | int
) -> Rows:
    """Returns the rows with what their two logits are relative to.

    A few of the classes tell it: for distributions that are near, all are alike.
    """
    few = form._replace(size=min(_CLASSES_OF_PIVOT, layer.kernel.shape[1]))
    made = _block(few, rows, layer, first, jnp.int32(0))
    pivot = form.kind.pivot_of(made.block, made.target.logits)
    return rows._replace(target=rows.target._replace(pivot=pivot))


def _indices(form: ClassBlocks, layer: Layer) -> jax.Array:
    blocks = -(-layer.kernel.shape[1] // form.size)
    return jnp.arange(blocks, dtype=jnp.int32)


def _slice(form: ClassBlocks, start: jax.Array, array: Any) -> Any:
    """Returns a block's part of an array of classes, `None` for `None`."""
    if array is None:
        return None
    return jax.lax.dynamic_slice_in_dim(array, start, form.size, axis=1)


def _part(layer: Layer, take: Any) -> Layer:
    """Returns a block's part of a layer, or of its tangent."""
    return Layer(
        take(layer.kernel),
        layer.options.each(take, "v"),
        take(layer.class_mask),
        take(layer.class_weights),
        None if layer.teacher is None else _part(layer.teacher, take),
    )


class _Made(NamedTuple):
    """A block of classes, and how its logits were made."""

    block: Block
    target: Any  # class ids, −1 where not counted here
    start: jax.Array  # the first class, of those here
    part: Layer
    linear: jax.Array  # the product with the kernel


def _block(
    form: ClassBlocks,
    rows: Rows,
    layer: Layer,
    first: jax.Array | int,
    index: jax.Array,
) -> _Made:
    """Returns a block of classes with its logits, of rows that are 0 where dropped.

    The last block overlaps the one before it, whose classes it does not count again.
    `first` is the id of the first class here, which a loop must not ask the mesh for.
    """
    classes, size = layer.kernel.shape[1], form.size
    start = jnp.minimum(index * size, classes - size)
    take = functools.partial(_slice, form, start)
    part = _part(layer, take)
    linear = product(rows.hidden, part.kernel.astype(rows.hidden.dtype))
    logits = changed(linear, part.options, rows.options)
    ids = first + start + jnp.arange(size, dtype=jnp.int32)[None]
    mask, target = part.class_mask, target_of(rows, part)
    if classes % size:
        lowest = first + index * size
        fresh = ids >= lowest
        mask = fresh if mask is None else mask & fresh
        if isinstance(target, Labels):
            target = target.counted_from(lowest)
    block = Block(logits, ids, mask, rows.keep, part.class_weights)
    return _Made(block, target, start, part, linear)


@functools.partial(jax.jit, static_argnums=0)
def _tangents(
    form: ClassBlocks,
    rows: Rows,
    rows_dot: Rows,
    layer: Layer,
    layer_dot: Layer,
    results: Any,
) -> Any:
    """Returns the tangents of the results, linear in those of the arguments."""
    # What is the same on all devices of a `shard_map` would, in reverse mode, have its
    # gradient summed over them in every step.
    rows = rows._replace(hidden=kept_hidden(rows))
    moving = rows_dot.hidden, rows_dot.options
    arguments = rows, moving, layer, layer_dot, results
    rows, moving, layer, layer_dot, results = jax.tree.map(
        lambda array: varying(array, arguments), arguments
    )

    constants, dots = (rows, layer, results), (moving, layer_dot)
    blocks = functools.partial(_tangents_of_blocks, form)
    if choice.are_for_tangents(form.kind, constants, dots):
        shapes = jax.eval_shape(lambda: (constants, dots))

        def transpose_at(place: Place) -> Any:
            return choice.transpose_at(place, form.kind, *shapes)

        blocks = transposed_by_place(blocks, transpose_at)
    return form.kind.classes.total(blocks(constants, dots))


def _tangents_of_blocks(form: ClassBlocks, constants: Any, dots: Any) -> Any:
    """Returns the tangents of the results by the classes here.

    Args:
      form: static.
      constants: rows, layer and results.
      dots: tangents of the features and options of the rows, and of the layer.
    """
    rows, layer, results = constants
    first = form.kind.classes.first(layer.kernel.shape[1])

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        total, dots = carry
        made = _block(form, rows, layer, first, index)
        take = functools.partial(_slice, form, made.start)
        moving, layer_dot = dots
        part_dot = _part(layer_dot._replace(class_mask=None, teacher=None), take)
        dot = form.kind.tangents(
            made.block,
            made.target,
            results,
            _logits_dot(rows, moving, made, part_dot),
            part_dot.class_weights,
        )
        return (jax.tree.map(jnp.add, total, dot), dots), None

    zero = zeros(results.loss.shape, results.loss.dtype, (rows, layer))
    nothing = form.kind.no_tangents(results, zero)
    step = jax.checkpoint(step, prevent_cse=False)
    # The tangents are carried along: jax 0.7.2 does not transpose a scan whose rule
    # was written by hand and that has them as constants.
    (total, _), _ = jax.lax.scan(step, (nothing, dots), _indices(form, layer))
    return total


def _logits_dot(
    rows: Rows, moving: Any, made: _Made, part_dot: Layer
) -> jax.Array | None:
    """Returns the tangent of a block's logits."""
    hidden, (hidden_dot, options_dot) = rows.hidden, moving
    part, linear, linear_dot = made.part, made.linear, None
    if hidden_dot is not None:
        kernel = part.kernel.astype(hidden.dtype)
        linear_dot = _tangent_product(hidden_dot, kernel, hidden.dtype)
    if part_dot.kernel is not None:
        by_kernel = _tangent_product(hidden, part_dot.kernel, hidden.dtype)
        linear_dot = by_kernel if linear_dot is None else linear_dot + by_kernel
    dots = linear_dot, part_dot.options, options_dot
    if not jax.tree.leaves(dots):
        return None
    primals = linear, part.options, rows.options
    return tangent_of(changed, primals, dots)[1]


def _tangent_product(left: jax.Array, right: jax.Array, dtype: Any) -> jax.Array:
    """Returns a product of matrices, one a tangent, in the accumulation dtype.

    On a GPU and a TPU it multiplies in the features' dtype, and so does what it
    transposes to, whose result is rounded to that dtype before blocks add up. (A
    `jax.lax.DotAlgorithm` would say that it is not, but cannot be exported for a CPU
    beside them.) XLA:CPU multiplies as fast in float32.
    """
    result = accumulation_dtype(dtype)

    def narrow(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left.astype(dtype), right.astype(dtype)).astype(result)

    def wide(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left.astype(result), right.astype(result))

    if dtype == result:
        return wide(left, right)
    return jax.lax.platform_dependent(left, right, cpu=wide, default=narrow)
