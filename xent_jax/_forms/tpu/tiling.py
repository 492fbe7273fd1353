"""The sizes of what the TPU kernels hold in vector memory, by the chip."""

import math
from collections.abc import Callable
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
    by_class: bool = False  # whether the kernel and its gradient come as [V, D]

    def tiles(self, classes: int) -> int:
        """Returns T, the number of tiles of V classes."""
        return -(-classes // self.classes)

    def sizes(self, kernel: Any) -> tuple[int, int]:
        """Returns D and V of a kernel, or of a tile."""
        return kernel.shape[::-1] if self.by_class else kernel.shape

    def kernel_tile(self, features: int) -> tuple[int, int]:
        """Returns the shape of a tile of the kernel."""
        return (self.classes, features) if self.by_class else (features, self.classes)

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
# Where all rows go over a tile, every tile reads and writes what all rows add up.
_WIDE_TILES = 2048, 1536, *_TILE_CLASSES
# More take longer to compile than they save: 1 % of the time.
_MOST_INNER_ROWS = 1024
# Half-precision numbers lie in registers in pairs of 8 rows.
ROW_UNIT = 16
# Where traffic takes more than so many times the matmuls' time, XLA's loop over blocks
# of classes is predicted to be faster.
_MOST_TRAFFIC = 1.75


class _Candidate(NamedTuple):
    rows: int
    row_chunk: int
    classes: int
    whole: float  # what is computed for whole tiles, over what is asked for


def tiling_of_sum(
    rows: int, features: int, classes: int, chip: str, itemsize: int = 2
) -> Tiling | None:
    """Returns the sizes for a sum over rows and its gradients, `None` for no kernels.

    Args:
      rows: N.
      features: D, a whole number of lanes.
      classes: V.
      chip: its `jax.Device.device_kind`.
      itemsize: bytes of a number of the kernel.
    """

    def needed(size: _Candidate) -> int:
        """Returns what `backward`, the larger kernel, takes."""
        (count, chunk, tile, _), column = size, size.rows * LANES * 4
        block = count * features * (2 + 4)  # features, and the gradient by them
        tiles = 2 * (2 * features + 2 * count) * tile + 2 * count * tile
        total = 2 * 2 * 4 * features * tile
        result = 2 * itemsize * features * tile if itemsize != 4 else 0
        numbers = 2 * column + 4 * column
        values = 4 * chunk * tile + 3 * chunk * features
        return block + tiles + total + result + numbers + values

    def cost(size: _Candidate, ridge: int) -> float:
        """Returns about how long `backward` takes.

        It reads the kernel and what is kept, and reads and writes the sum of the
        kernel's gradients; it adds to the features' gradient once a tile.
        """
        moved = (10 * features + 2 * size.rows) / (4 * size.rows * features) * ridge
        return max(moved, size.whole * (1 + 32 / size.classes))

    sizes = rows, features, classes
    return _best(sizes, chip, _TILE_CLASSES, needed, cost)


def tiling_of_results(
    rows: int, features: int, classes: int, chip: str, itemsize: int = 2
) -> Tiling | None:
    """Returns the sizes for the results of rows, as `tiling_of_sum` does."""

    def needed(size: _Candidate) -> int:
        """Returns what `forward` takes if nothing is kept."""
        count, chunk, tile, _ = size
        kernel = 2 * itemsize * features * tile
        kernel += 2 * features * tile if itemsize == 4 else 0
        numbers = (1 + 4 * 2) * count * LANES * 4
        values = 3 * 4 * chunk * tile + 3 * chunk * features
        return 2 * count * features + kernel + numbers + values

    def cost(size: _Candidate, ridge: int) -> float:
        """Returns about how long it takes: it reads the kernel once."""
        moved = itemsize / (2 * size.rows) * ridge
        return max(moved, size.whole * (1 + 32 / size.classes))

    best = _best((rows, features, classes), chip, _TILE_CLASSES, needed, cost)
    return _as_it_lies(classes, best)


def tiling_of_gradients(
    rows: int, features: int, classes: int, chip: str, itemsize: int = 2
) -> Tiling | None:
    """Returns the sizes for the gradients of rows' results, as `tiling_of_sum` does."""

    def needed(size: _Candidate) -> int:
        """Returns what `all_rows.gradients` takes."""
        count, chunk, tile, _ = size
        block = count * features * (2 * 2 + 2 * 4)  # features, and their gradient
        kernel = 2 * 2 * itemsize * features * tile  # read and written
        # The sum of its gradient, or what it is in 16 bits.
        kernel += (4 if itemsize == 2 else 2) * features * tile
        numbers = 2 * 2 * count * LANES * 4
        values = 4 * chunk * tile + 4 * chunk * features
        return block + kernel + 2 * count * tile + numbers + values

    def cost(size: _Candidate, ridge: int) -> float:
        """Returns about how long that takes.

        Every tile reads the features, and numbers a row in all lanes, and reads and
        writes the sum of the features' gradient; all that of one block stays. The
        kernel is read, and its gradient written, once.
        """
        if size.rows > _MOST_INNER_ROWS:
            return math.inf
        moved = (10 * features + 8 * LANES) / (6 * features * size.classes) * ridge
        if size.rows >= rows:
            moved = 0
        if moved > _MOST_TRAFFIC:
            return math.inf
        moved += 2 * itemsize / (6 * rows) * ridge
        return max(moved, size.whole * (1 + 16 / size.rows))

    best = _best((rows, features, classes), chip, _WIDE_TILES, needed, cost)
    return _as_it_lies(classes, best)


def _as_it_lies(classes: int, tiling: Tiling | None) -> Tiling | None:
    """Returns a tiling for the kernel as XLA keeps it in main memory.

    Where V is no whole number of lanes, the features are side by side there: the other
    way would take more memory. A kernel that is asked for as [D, V] would be copied.
    """
    if tiling is None or classes % LANES == 0:
        return tiling
    return tiling._replace(by_class=True)


def _best(
    sizes: tuple[int, int, int],
    chip: str,
    tiles: tuple[int, ...],
    needed: Callable[[_Candidate], int],
    cost: Callable[[_Candidate, int], float],
) -> Tiling | None:
    """Returns the sizes of the least cost among those that a chip holds.

    Args:
      sizes: N, D and V.
      chip: its `jax.Device.device_kind`.
      tiles: how many classes a tile may have.
      needed: the bytes of vector memory that a candidate takes.
      cost: how long it takes, in its matmuls' time, where a byte takes as long as so
        many operations.
    """
    rows, features, classes = sizes
    if chip not in _CHIPS or features % LANES or 0 in sizes:
        return None
    memory, ridge = _CHIPS[chip]
    margin = memory // _MARGIN
    least, best = math.inf, None
    for most in _BLOCK_ROWS:
        block, chunk = _rows(rows, most)
        padded = -(-rows // block) * block / rows
        for tile in tiles:
            tile = min(tile, -(-classes // LANES) * LANES)
            # What lies behind the last class is computed too, and has to be masked.
            whole = -(-classes // tile) * tile / classes
            size = _Candidate(block, chunk, tile, whole if whole == 1 else whole * 1.02)
            if needed(size) + margin > memory:
                continue
            if padded * cost(size, ridge) < least:
                least = padded * cost(size, ridge)
                best = Tiling(block, chunk, tile, memory - margin // 2)
    return best


def _rows(rows: int, most: int) -> tuple[int, int]:
    """Returns the rows of a block, of which there are as few as can be, and a chunk."""
    blocks = -(-rows // most)
    size = -(-rows // blocks)
    chunks = -(-size // _ROW_CHUNK)
    chunk = -(-size // (chunks * ROW_UNIT)) * ROW_UNIT
    return chunks * chunk, chunk
