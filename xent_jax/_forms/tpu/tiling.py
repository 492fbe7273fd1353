"""The sizes of what the TPU kernels hold in vector memory, by the chip."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Numbers that lie side by side in a register.
LANES = 128


class Tiling(NamedTuple):
    """Sizes of a block of rows and of its tiles; static."""

    rows: int  # R, all of which are in vector memory
    row_chunk: int  # rows that are multiplied at a time; divides R
    classes: int  # of a tile
    memory: int  # bytes of vector memory that the compiler may use
    interpret: Any = False  # as `pallas_call` takes it

    def tiles(self, classes: int) -> int:
        """Returns T, the number of tiles of V classes."""
        return -(-classes // self.classes)

    def class_row(self, row: jax.Array, fill: float) -> jax.Array:
        """Returns [1, V] numbers with `fill` up to whole tiles, [1, V']."""
        missing = self.tiles(row.shape[1]) * self.classes - row.shape[1]
        return jnp.pad(row, ((0, 0), (0, missing)), constant_values=fill)


class _Chip(NamedTuple):
    """What the sizes of blocks and tiles follow from, of one JAX device."""

    memory: int  # bytes of vector memory
    ridge: int  # operations that it does while a byte comes from main memory


_V5E, _V6E = _Chip(128 * 2**20, 300), _Chip(128 * 2**20, 700)
_V5P, _V7 = _Chip(64 * 2**20, 210), _Chip(64 * 2**20, 390)
# By `jax.Device.device_kind`. The chips before these have too little vector memory for
# tiles that keep the matrix unit busy.
_CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7,
}
# The part of the vector memory that a tiling leaves to the compiler, as 1 of so many.
_MARGIN = 16
_BLOCK_ROWS = 2048, 1536, 1024, 768, 512, 256
_ROW_CHUNK = 512
_TILE_CLASSES = 1024, 768, 512, 256
# Half-precision numbers lie in registers in pairs of 8 rows.
_ROW_UNIT = 16


def tiling_of(
    rows: int, features: int, classes: int, chip: str, itemsize: int = 2
) -> Tiling | None:
    """Returns the sizes of blocks and tiles, `None` where the kernels do not run.

    Args:
      rows: N.
      features: D, a whole number of lanes.
      classes: V.
      chip: its `jax.Device.device_kind`.
      itemsize: bytes of a number of the kernel's gradient.
    """
    if chip not in _CHIPS or features % LANES or 0 in (rows, features, classes):
        return None
    memory, ridge = _CHIPS[chip]
    margin = memory // _MARGIN
    least, best = math.inf, None
    for most in _BLOCK_ROWS:
        block, chunk = _rows(rows, most)
        for tile in _TILE_CLASSES:
            tile = min(tile, -(-classes // LANES) * LANES)
            if _needed(block, chunk, features, tile, itemsize) + margin > memory:
                continue
            padded = -(-rows // block) * block / rows
            cost = padded * _cost(block, features, classes, tile, ridge)
            if cost < least:
                least = cost
                best = Tiling(block, chunk, tile, memory - margin // 2)
    return best


def _cost(rows: int, features: int, classes: int, tile: int, ridge: int) -> float:
    """Returns about how long `backward` takes, in its matmuls' time for V classes.

    It reads the kernel and what is kept, and reads and writes the sum of the kernel's
    gradients; it adds to the features' gradient once a tile. What lies behind the last
    class is computed too, and has to be masked.
    """
    moved = (10 * features + 2 * rows) / (4 * rows * features) * ridge
    computed = -(-classes // tile) * tile / classes * (1 + 32 / tile)
    if classes % tile:
        computed *= 1.02
    return max(moved, computed)


def _rows(rows: int, most: int) -> tuple[int, int]:
    """Returns the rows of a block, of which there are as few as can be, and a chunk."""
    blocks = -(-rows // most)
    size = -(-rows // blocks)
    chunks = -(-size // _ROW_CHUNK)
    chunk = -(-size // (chunks * _ROW_UNIT)) * _ROW_UNIT
    return chunks * chunk, chunk


def _needed(rows: int, chunk: int, features: int, tile: int, itemsize: int) -> int:
    """Returns the bytes of vector memory that `backward`, the larger kernel, takes."""
    column = rows * LANES * 4
    block = rows * features * (2 + 4)  # features, and the gradient by them
    tiles = 2 * (2 * features + 2 * rows) * tile + 2 * rows * tile
    total = 2 * 2 * 4 * features * tile
    result = 2 * itemsize * features * tile if itemsize != 4 else 0
    numbers = 2 * column + 4 * column
    values = 4 * chunk * tile + 3 * chunk * features
    return block + tiles + total + result + numbers + values
