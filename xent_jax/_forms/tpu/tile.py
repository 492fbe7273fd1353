"""A tile of logits in vector memory: what is made of it, in every kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from xent_jax._forms.tpu.tiling import LANES, ROW_UNIT, Tiling


class LogitsOf(NamedTuple):
    """What makes the logits of R rows; `None` where not used.

        x[n, j] = hidden[n]·kernel[:, j] + offset[j]

    Where V is no whole number of tiles, `offset` is asked for, and −inf behind V; and
    for uniform targets `weights`, which are 0 there.
    """

    hidden: jax.Array  # bfloat16[R, D]
    kernel: jax.Array  # [D, V], or [V, D]; of bfloat16, or float32 if nothing is kept
    labels: jax.Array  # int32[R, 1], −1 where the label is no class here
    offset: jax.Array | None = None  # float32[1, V'], −inf for a dropped class
    weights: jax.Array | None = None  # float32[1, V'], 0 for a dropped class


def logits_of(tiling: Tiling, refs: Any, kernel: Any, rows: Any) -> jax.Array:
    """Returns the logits of some rows, with a tile of the kernel in 16 bits."""
    contracted = 1, int(tiling.by_class)
    logits = product(refs.hidden[rows, :], kernel[...], contracted)
    return logits if refs.offset is None else logits + refs.offset[...]


def less_uniform(refs: Any, uniform: jax.Array, slope: jax.Array) -> jax.Array:
    """Returns slopes less what uniform targets take of them, [R, 1] a weight of 1."""
    if refs.weights is not None:
        uniform = uniform * refs.weights[...]
    return slope - uniform


def product(
    left: jax.Array, right: jax.Array, contracted: tuple[int, int]
) -> jax.Array:
    """Returns a product of half-precision matrices in float32."""
    return jax.lax.dot_general(
        left,
        right,
        ((contracted[:1], contracted[1:]), ((), ())),
        # Products of half-precision numbers are exact, whatever the caller's default.
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def row_sum(terms: jax.Array) -> jax.Array:
    """Returns the sums of rows, [R, 1]."""
    return jnp.sum(terms, axis=1, keepdims=True)


def lanes(shape: tuple[int, int]) -> jax.Array:
    """Returns the place of every number in its row."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def is_label(tiling: Tiling, refs: Any, rows: Any, tile: jax.Array) -> jax.Array:
    """Returns which class of a tile is the label of its row."""
    labels = refs.labels[rows, :] - tile * tiling.classes
    return lanes((tiling.row_chunk, tiling.classes)) == labels


def clear_behind(classes: int, ref: Any, axis: int = 1) -> None:
    """Sets what lies behind the last class to 0, in the last tile.

    It is not read from main memory, so that anything may stand there, and a product
    adds it up, if only with factors of 0.

    Args:
      classes: V.
      ref: a tile.
      axis: of the classes.
    """
    count, unit = ref.shape[axis], (ROW_UNIT, LANES)[axis]
    inside = classes % count
    if inside == 0:
        return

    def part(start: int, size: int) -> tuple[slice, ...]:
        here = slice(start, start + size)
        return (slice(None), here) if axis else (here, slice(None))

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _() -> None:
        whole = inside // unit * unit
        if inside > whole:
            # In float32, because not every chip selects half-precision numbers.
            last = ref[part(whole, unit)].astype(jnp.float32)
            place = jax.lax.broadcasted_iota(jnp.int32, last.shape, axis)
            last = jnp.where(place < inside - whole, last, 0)
            ref[part(whole, unit)] = last.astype(ref.dtype)
            whole += unit
        if whole < count:
            rest = part(whole, count - whole)
            ref[rest] = jnp.zeros_like(ref[rest])
