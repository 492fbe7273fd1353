"""The loss of targets that are spread evenly: class weights and distances, summed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax import _numerics
from xent_jax._class_axis import ClassAxis
from xent_jax._class_reductions import sum_classes
from xent_jax._numerics import LabelStatistics, Masked


class SpreadSums(NamedTuple):
    """What the loss of evenly spread targets is made of."""

    below: jax.Array  # Σ_{j≠y} w_j (pivot − x_j)
    rivals: jax.Array  # Σ_{j≠y} w_j over the kept classes
    own: jax.Array  # w_y, 0 where its class is dropped


def settled(sums: SpreadSums, statistics: LabelStatistics) -> jax.Array:
    """Returns Σ_j w_j (log-normaliser − x_j), from non-negative terms alone."""
    below, rivals, own = sums
    # Where every rival is impossible the pivot is a stand-in, and so is the rise.
    rise = jnp.where(rivals == 0, 0, statistics.largest - statistics.pivot)
    gap = jnp.where(own == 0, 0, statistics.loss - statistics.log_mass)
    fixed = (rivals + own) * statistics.log_mass
    return below + rivals * rise + own * gap + fixed


def spread_sums(
    classes: ClassAxis,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    pivot: jax.Array,
) -> SpreadSums:
    """Returns the sums over the kept classes here."""

    def terms(
        inputs: Any, index: Any, labels: Any, weights: Any, pivot: Any
    ) -> SpreadSums:
        below = pivot - _numerics.masked(inputs)
        if weights is not None:
            # A weight of 0 drops an infinite difference.
            below = weights * jnp.where(weights == 0, 0, below)
        hit = index == labels
        below = _numerics.zero_where_dropped(jnp.where(hit, 0, below), inputs)
        own, rival = hit, ~hit
        if inputs.keep_class is not None:
            own, rival = own & inputs.keep_class, rival & inputs.keep_class
        return SpreadSums(
            below,
            _weights_of(rival, inputs, weights),
            _weights_of(own, inputs, weights),
        )

    index = _numerics.class_index(inputs.logits, classes)
    operands = (inputs, index, labels, class_weights, pivot)
    return sum_classes(terms, operands, classes.axis)


def label_weight(
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array,
    classes: ClassAxis,
    *,
    linear: bool = False,
) -> jax.Array:
    """Returns the weight of the label's class here, dropped or not, a row.

    Where it is `linear`, reverse mode can transpose it.
    """

    def weight(inputs: Any, index: Any, labels: Any, weights: Any) -> jax.Array:
        return _weights_of(index == labels, inputs, weights)

    index = _numerics.class_index(inputs.logits, classes)
    operands = (inputs, index, labels, class_weights)
    return (_linear_sum if linear else sum_classes)(weight, operands, classes.axis)


def total_weight(
    inputs: Masked,
    class_weights: jax.Array | None,
    classes: ClassAxis,
    *,
    linear: bool = False,
) -> jax.Array:
    """Returns the sum of the weights of the kept classes here, or their number.

    Where it is `linear`, reverse mode can transpose it.
    """
    axis = classes.axis
    if inputs.keep_class is None:
        if class_weights is not None:
            return jnp.sum(class_weights, axis=axis, keepdims=True)
        dtype = _numerics.accumulation_dtype(inputs.logits.dtype)
        return jnp.full((1,) * inputs.logits.ndim, inputs.logits.shape[axis], dtype)

    def weight(inputs: Any, weights: Any) -> jax.Array:
        return _weights_of(inputs.keep_class, inputs, weights)

    reduce = _linear_sum if linear else sum_classes
    return reduce(weight, (inputs, class_weights), axis)


def _linear_sum(
    terms: Callable[..., jax.Array], operands: tuple[Any, ...], axis: int
) -> jax.Array:
    return jnp.sum(terms(*operands), axis=axis, keepdims=True)


def _weights_of(
    chosen: jax.Array, inputs: Masked, class_weights: jax.Array | None
) -> jax.Array:
    """Returns the weights of the chosen classes, or ones, and 0 elsewhere."""
    count = chosen.astype(_numerics.accumulation_dtype(inputs.logits.dtype))
    if class_weights is None:
        return count
    # The sum gives the weights the mask's sharding, which a select asks for.
    return jnp.where(chosen, class_weights + 0 * count, 0)
