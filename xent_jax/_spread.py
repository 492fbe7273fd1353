"""The loss of targets that are spread evenly: class weights and distances, summed."""

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


def rivals_below(
    classes: ClassAxis,
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    pivot: jax.Array,
) -> jax.Array:
    """Returns Σ_{j≠y} w_j (pivot − x_j) over the kept classes here."""

    def rival_term(
        inputs: Any, index: Any, labels: Any, weights: Any, pivot: Any
    ) -> Any:
        below = pivot - _numerics.masked(inputs)
        if weights is not None:
            # A weight of 0 drops an infinite difference.
            below = weights * jnp.where(weights == 0, 0, below)
        below = jnp.where(index == labels, 0, below)
        return _numerics.zero_where_dropped(below, inputs)

    index = _numerics.class_index(inputs.logits, classes)
    operands = (inputs, index, labels, class_weights, pivot)
    return sum_classes(rival_term, operands, classes.axis)


def split_weight(
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    classes: ClassAxis,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the kept rivals' weights and the label's weight, a row."""
    hit = _numerics.class_index(inputs.logits, classes) == labels
    rival = ~hit
    if inputs.keep_class is not None:
        hit, rival = hit & inputs.keep_class, rival & inputs.keep_class
    rivals = _sum_of_weights(rival, inputs, class_weights, classes)
    return rivals, _sum_of_weights(hit, inputs, class_weights, classes)


def label_weight(
    inputs: Masked,
    labels: jax.Array,
    class_weights: jax.Array | None,
    classes: ClassAxis,
) -> jax.Array:
    """Returns the weight of the label's class, dropped or not, a row."""
    hit = _numerics.class_index(inputs.logits, classes) == labels
    return _sum_of_weights(hit, inputs, class_weights, classes)


def _sum_of_weights(
    chosen: jax.Array,
    inputs: Masked,
    class_weights: jax.Array | None,
    classes: ClassAxis,
) -> jax.Array:
    """Returns the sum of the chosen classes' weights, or their number, a row."""
    count = chosen.astype(_numerics.accumulation_dtype(inputs.logits.dtype))
    if class_weights is None:
        return jnp.sum(count, axis=classes.axis, keepdims=True)
    # The sum gives the weights the mask's sharding, which a select asks for.
    weights = jnp.where(chosen, class_weights + 0 * count, 0)
    return jnp.sum(weights, axis=classes.axis, keepdims=True)


def total_weight(
    inputs: Masked, class_weights: jax.Array | None, classes: ClassAxis
) -> jax.Array:
    """Returns the sum of the weights of the kept classes here, or their number."""
    if inputs.keep_class is None:
        axis = classes.axis
        if class_weights is not None:
            return jnp.sum(class_weights, axis=axis, keepdims=True)
        dtype = _numerics.accumulation_dtype(inputs.logits.dtype)
        return jnp.full((1,) * inputs.logits.ndim, inputs.logits.shape[axis], dtype)
    return _sum_of_weights(inputs.keep_class, inputs, class_weights, classes)
