"""The terms of a linear head's losses per row, without holding the logits.

Classes come in blocks, whose statistics are merged. As in `_label_terms`, the rule of
the `jax.custom_jvp` is the closed form "mean parameter minus target"; here a scan adds
it up over the blocks, and its body is checkpointed, so that reverse mode makes each
block of logits again instead of keeping it. The closed form is written in the results
themselves, so a higher derivative applies the rule again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax import (
    _block_statistics,
    _blocks,
    _label_terms,
    _linear_arguments,
    _numerics,
    _spread,
)
from xent_jax._block_statistics import BlockStatistics
from xent_jax._blocks import loop, varying, zeros
from xent_jax._class_axis import ClassAxis
from xent_jax._label_terms import LabelConfig, LabelDot, LabelTerms
from xent_jax._layer import (
    Layer,
    Rows,
    capped,
    class_total,
    kept_hidden,
    product,
)
from xent_jax._linear_arguments import Head
from xent_jax._numerics import (
    LabelStatistics,
    Masked,
    accumulation_dtype,
    known_tangents,
    tangent_of,
)


class TermsConfig(NamedTuple):
    """What is static in the terms."""

    class_block: int
    classes: ClassAxis
    spread: bool
    entropy: bool
    prediction: bool


def terms_config(
    function: str,
    head: Head,
    class_block: int | None,
    *,
    spread: bool,
    entropy: bool = False,
    prediction: bool = False,
) -> TermsConfig:
    """Returns the configuration for the caller's block size."""
    count, classes = head.rows.hidden.shape[0], head.layer.kernel.shape[1]
    itemsize = accumulation_dtype(head.rows.hidden.dtype).itemsize
    default = _blocks.classes_per_block(count, classes, itemsize)
    size = _linear_arguments.read_block(
        function, "class_block", class_block, default, classes
    )
    return TermsConfig(size, head.classes, spread, entropy, prediction)


class LinearTerms(NamedTuple):
    """Per row, [N, 1]; `None` where not wanted, 0 in a dropped row."""

    label: LabelTerms
    entropy: jax.Array | None  # −Σ_j p_j log p_j
    prediction: jax.Array | None  # int32: the arg max class, −1 where there is none
    statistics: LabelStatistics  # what the derivatives are made of


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def linear_terms(config: TermsConfig, rows: Rows, layer: Layer) -> LinearTerms:
    """Returns the terms of every row, from blocks of classes."""
    return _value(config, rows, layer)


@functools.partial(jax.jit, static_argnums=0)
def _value(config: TermsConfig, rows: Rows, layer: Layer) -> LinearTerms:
    local = _local(config, rows, layer)

    def statistics_of(index: jax.Array) -> BlockStatistics:
        block = _block(config, local, layer, index)
        statistics = _block_statistics.block_statistics(
            block.inputs,
            block.labels,
            block.part.class_weights,
            spread=config.spread,
            entropy=config.entropy,
            prediction=config.prediction,
        )
        if statistics.top is None:
            return statistics
        top = statistics.top
        top = top._replace(class_id=top.class_id + block.start)
        return statistics._replace(top=top)

    def step(total: BlockStatistics, index: jax.Array) -> tuple[BlockStatistics, None]:
        return _block_statistics.merged(total, statistics_of(index)), None

    indices = _indices(config, layer)
    nothing = jax.tree.map(
        lambda out: zeros(out.shape, out.dtype, (local, layer)),
        jax.eval_shape(statistics_of, indices[0]),
    )
    nothing = nothing._replace(best_rival=nothing.best_rival - jnp.inf)
    if nothing.top is not None:
        top = nothing.top._replace(logit=nothing.top.logit - jnp.inf)
        nothing = nothing._replace(top=top)
    total, _ = loop(step, nothing, indices)
    first = config.classes.first(layer.kernel.shape[1])
    total = _block_statistics.over_shards(total, first, config.classes)
    label_logit = _numerics.defined(total.label_logit, rows.labels)
    statistics = _numerics.settled(total.best_rival, total.rivals, label_logit)
    spread = prediction = None
    if total.spread is not None:
        spread = _spread.settled(total.spread, statistics)
    if total.top is not None:
        prediction = jnp.where(jnp.isfinite(total.top.logit), total.top.class_id, -1)
    label = LabelTerms(statistics.loss, spread, statistics.log_normalizer)
    entropy = _block_statistics.settled_entropy(statistics, total)
    if rows.keep is not None:
        label, entropy = jax.tree.map(
            lambda term: jnp.where(rows.keep, term, 0), (label, entropy)
        )
        if prediction is not None:
            prediction = jnp.where(rows.keep, prediction, -1)
    return LinearTerms(label, entropy, prediction, statistics)


def _local(config: TermsConfig, rows: Rows, layer: Layer) -> Rows:
    """Returns the rows with their ids relative to this shard's classes."""
    labels = rows.labels - config.classes.first(layer.kernel.shape[1])
    return rows._replace(hidden=kept_hidden(rows), labels=labels)


def _indices(config: TermsConfig, layer: Layer) -> jax.Array:
    blocks = -(-layer.kernel.shape[1] // config.class_block)
    return jnp.arange(blocks, dtype=jnp.int32)


def _slice(config: TermsConfig, start: jax.Array, array: Any) -> Any:
    """Returns a block's part of an array of classes, `None` for `None`."""
    if array is None:
        return None
    return jax.lax.dynamic_slice_in_dim(array, start, config.class_block, axis=1)


class _Block(NamedTuple):
    start: jax.Array  # the id of the first class
    labels: jax.Array  # relative to it, −1 where the label is not counted here
    part: Layer
    linear: jax.Array  # the product with the kernel
    inputs: Masked  # the logits and what counts of them


def _block(config: TermsConfig, rows: Rows, layer: Layer, index: jax.Array) -> _Block:
    """Returns a block of classes with its logits, of rows that are 0 where dropped.

    The last block overlaps the one before it, whose classes it does not count again.
    """
    classes, size = layer.kernel.shape[1], config.class_block
    start = jnp.minimum(index * size, classes - size)
    take = functools.partial(_slice, config, start)
    part = Layer(
        take(layer.kernel),
        take(layer.bias),
        layer.softcap,
        take(layer.class_mask),
        take(layer.class_weights),
    )
    mask = part.class_mask
    linear = product(rows.hidden, part.kernel.astype(rows.hidden.dtype))
    logits = capped(linear, part.bias, part.softcap)
    labels = jnp.where(rows.labels >= index * size, rows.labels - start, -1)
    if classes % size:
        fresh = start + jnp.arange(size, dtype=jnp.int32)[None] >= index * size
        mask = fresh if mask is None else mask & fresh
    return _Block(start, labels, part, linear, Masked(logits, mask, rows.keep))


@functools.partial(linear_terms.defjvp, symbolic_zeros=True)
def _linear_terms_jvp(
    config: TermsConfig, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[LinearTerms, LinearTerms]:
    rows, layer = primals
    terms = linear_terms(config, rows, layer)
    rows_dot, layer_dot = known_tangents(tangents)
    hidden_dot = rows_dot.hidden
    if hidden_dot is not None:
        # In float32, so that reverse mode adds the blocks up in float32.
        hidden_dot = kept_hidden(rows._replace(hidden=hidden_dot))
        hidden_dot = hidden_dot.astype(terms.label.loss.dtype)
    dot = _terms_dot(config, rows, hidden_dot, layer, layer_dot, terms)
    # Rows that are typed as if they differed over the classes have such terms.
    dot = jax.tree.map(lambda array: varying(array, terms.statistics), dot)
    return terms, LinearTerms(
        LabelTerms(dot.label.loss, dot.label.spread, dot.label.log_normalizer),
        dot.entropy,
        jax.tree.map(jax.custom_derivatives.zero_from_primal, terms.prediction),
        _label_terms.statistics_dot(terms.statistics, dot.label),
    )


class _TermsDot(NamedTuple):
    label: LabelDot
    entropy: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def _terms_dot(
    config: TermsConfig,
    rows: Rows,
    hidden_dot: jax.Array | None,
    layer: Layer,
    layer_dot: Layer,
    terms: LinearTerms,
) -> _TermsDot:
    """Returns the tangents of the terms, linear in those of the arguments."""
    # What is the same on all devices of a `shard_map` would, in reverse mode, have its
    # gradient summed over them in every step.
    arguments = _local(config, rows, layer), hidden_dot, layer, layer_dot, terms
    rows, hidden_dot, layer, layer_dot, terms = jax.tree.map(
        lambda array: varying(array, arguments), arguments
    )
    statistics = terms.statistics
    weight = None
    if config.spread:
        weight = class_total(layer, terms.label.loss.dtype, config.classes)
    label_config = LabelConfig(ClassAxis(-1), config.spread, normalizer=True)

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        total, dots = carry
        hidden_dot, layer_dot = dots
        block = _block(config, rows, layer, index)
        take = functools.partial(_slice, config, block.start)
        part_dot = Layer(
            take(layer_dot.kernel),
            take(layer_dot.bias),
            layer_dot.softcap,
            None,
            take(layer_dot.class_weights),
        )
        logits_dot = _logits_dot(rows.hidden, hidden_dot, block, part_dot)
        label = _label_terms.label_terms_dot(
            label_config,
            block.inputs,
            block.labels,
            block.part.class_weights,
            weight,
            statistics,
            logits_dot,
            part_dot.class_weights,
        )
        entropy = None
        if terms.entropy is not None:
            entropy = _entropy_dot(block.inputs, statistics, terms.entropy, logits_dot)
        total = jax.tree.map(jnp.add, total, _TermsDot(label, entropy))
        return (total, dots), None

    loss = terms.label.loss
    zero = zeros(loss.shape, loss.dtype, (rows, layer))
    nothing = _TermsDot(
        LabelDot(zero, zero if config.spread else None, zero),
        zero if config.entropy else None,
    )
    step = jax.checkpoint(step, prevent_cse=False)
    # The tangents are carried along: jax 0.7.2 does not transpose a scan whose rule
    # was written by hand and that has them as constants.
    start = nothing, (hidden_dot, layer_dot)
    (total, _), _ = jax.lax.scan(step, start, _indices(config, layer))
    return config.classes.total(total)


def _logits_dot(
    hidden: jax.Array, hidden_dot: jax.Array | None, block: _Block, part_dot: Layer
) -> jax.Array | None:
    """Returns the tangent of a block's logits."""
    part, linear, linear_dot = block.part, block.linear, None
    if hidden_dot is not None:
        kernel = part.kernel.astype(hidden.dtype)
        linear_dot = _tangent_product(hidden_dot, kernel, hidden.dtype)
    if part_dot.kernel is not None:
        by_kernel = _tangent_product(hidden, part_dot.kernel, hidden.dtype)
        linear_dot = by_kernel if linear_dot is None else linear_dot + by_kernel
    dots = linear_dot, part_dot.bias, part_dot.softcap
    if all(dot is None for dot in dots):
        return None
    return tangent_of(capped, (linear, part.bias, part.softcap), dots)[1]


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


def _entropy_dot(
    inputs: Masked,
    statistics: LabelStatistics,
    entropy: jax.Array,
    logits_dot: jax.Array | None,
) -> jax.Array:
    """Returns Σ_j p_j (−log p_j − entropy) ẋ_j over a block."""
    if logits_dot is None:
        return jnp.zeros_like(entropy)
    drop = statistics.largest - _numerics.masked(inputs)
    power = jnp.exp(-drop - statistics.log_mass)
    surprise = jnp.where(power == 0, 0, drop) + statistics.log_mass
    slope = power * (surprise - entropy)
    slope = _numerics.zero_where_dropped(slope, inputs)
    return jnp.sum(slope * logits_dot, axis=-1, keepdims=True)
