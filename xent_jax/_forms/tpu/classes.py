"""What the TPU kernels take of the classes of a layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._forms.head import Layer
from xent_jax._forms.loops import zeros
from xent_jax._forms.tpu.tiling import Tiling
from xent_jax._targets.class_ids import ClassIds


class UniformWeights(NamedTuple):
    """The weights of uniform targets, 0 where a class does not count."""

    classes: jax.Array  # float32[V]
    others: jax.Array  # float32[V'], of the other classes in a tile
    tiles: jax.Array  # float32[T], of all classes in a tile


class Classes(NamedTuple):
    """What all blocks take of the layer; `None` for what is not used."""

    kernel: jax.Array  # [D, V]
    first: jax.Array | int  # the id of the first class here
    offset: jax.Array | None  # as of `LogitsOf`
    weights: jax.Array | None  # as of `LogitsOf`
    kept: jax.Array | None  # bool[V]
    uniform: UniformWeights | None

    def places(self, labels: jax.Array) -> jax.Array:
        """Returns where labels are among the classes here, −1 for one that is not."""
        here = labels - self.first
        return jnp.where((here >= 0) & (here < self.kernel.shape[1]), here, -1)


def classes_of(tiling: Tiling, kind: ClassIds, layer: Layer) -> Classes:
    """Returns what all blocks take of the layer."""
    count, mask = layer.kernel.shape[1], layer.class_mask
    ragged = count % tiling.classes != 0
    nothing = zeros((1, count), jnp.float32, layer.kernel)
    offset = layer.options.bias
    if mask is not None:
        offset = jnp.where(mask, nothing if offset is None else offset, -jnp.inf)
    elif offset is None and ragged:
        offset = nothing
    weights = uniform = None
    if kind.wanted.uniform:
        weights = layer.class_weights
        plain = weights is None and mask is None and not ragged
        if weights is None:
            weights = nothing + 1
        if mask is not None:
            weights = jnp.where(mask, weights, 0)
        weights = tiling.class_row(weights, 0)
        of_tiles = weights.reshape(-1, tiling.classes)
        uniform = UniformWeights(
            weights[0, :count], _others(of_tiles).reshape(-1), jnp.sum(of_tiles, axis=1)
        )
        weights = None if plain else weights
    return Classes(
        layer.kernel,
        kind.classes.first(count),
        None if offset is None else tiling.class_row(offset, -jnp.inf),
        weights,
        None if mask is None else mask[0],
        uniform,
    )


def _others(weights: jax.Array) -> jax.Array:
    """Returns Σ_{k≠j} w_k along the last axis, by sums alone: nothing cancels."""
    padded = jnp.pad(weights, ((0, 0), (1, 1)))
    before = jnp.cumsum(padded[:, :-2], axis=1)
    after = jnp.cumsum(padded[:, :1:-1], axis=1)[:, ::-1]
    return before + after


def numbers_at(numbers: Any, here: jax.Array) -> jax.Array:
    """Returns the number of each row's label, 0 where it is not here, [R, 1]."""
    found = numbers[jnp.maximum(here, 0)]
    return jnp.where(here < 0, jnp.zeros_like(found), found)
