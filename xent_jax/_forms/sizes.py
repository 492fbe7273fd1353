"""How large the blocks of logits are that a linear head holds at a time.

All sizes are static: they follow from shapes alone, so that a program and its memory
are the same on every machine.
"""

_ROW_TILE_BYTES = 64 * 2**20
_CLASS_TILE_BYTES = 32 * 2**20
_MOST_ROWS = 1024
_FEWEST_CLASSES = 1536
_LANES = 128
_SUBLANES = 8


# Of a teacher's logits and the student's, or of several labels a row, a TPU holds up to
# three arrays of a block's size; with blocks of a third they take what one would.
ARRAYS_OF_PAIRS = 3


def rows_per_block(
    rows: int, features: int, classes: int, itemsize: int, arrays: int = 1
) -> int:
    """Returns how many rows a block of a scalar reduction has.

    A block of R rows reads the kernel and adds to its gradient once, so it moves about
    12·D·V bytes for 6·R·D·V operations. From the chips' peaks, the sum of the kernel's
    gradient takes longer to compute than to move from about 800 rows on a TPU v5p, 1260
    on a v5e, 1800 on a 7x and 4900 on a v6e. Blocks of 1024 rows are a compromise with
    memory: 4096 would take three times as much, for 4 % less predicted time on a v5e
    and 20 % on a v6e, where the TPU kernels take less of both. The tile of logits has
    half the size of the kernel's gradient, but not more than 1024 rows, and 64 MiB at
    least.

    Args:
      rows: N, which may be symbolic.
      features: D.
      classes: V.
      itemsize: bytes of a logit.
      arrays: how many arrays of its size a block takes.
    """
    half = itemsize * features * classes // 2
    budget = max(_ROW_TILE_BYTES, min(half, itemsize * _MOST_ROWS * classes))
    most = _whole(budget // (itemsize * classes * arrays))
    return _balanced(rows, most, _SUBLANES) if isinstance(rows, int) else most


def classes_per_block(rows: int, classes: int, itemsize: int) -> int:
    """Returns how many classes a block of a result per row has.

    The tile of logits takes 32 MiB, or has 1536 classes where that is more.

    Args:
      rows: N. A symbolic number counts as many.
      classes: V.
      itemsize: bytes of a logit.
    """
    most = _FEWEST_CLASSES
    if isinstance(rows, int) and rows > 0:
        most = max(most, _whole(_CLASS_TILE_BYTES // (itemsize * rows)))
    return _balanced(classes, most, _LANES)


def _whole(size: int) -> int:
    """Returns `size`, at least 1, rounded down to whole registers if it has any."""
    unit = _LANES if size >= _LANES else _SUBLANES if size >= _SUBLANES else 1
    return max(1, size // unit * unit)


def _balanced(total: int, most: int, unit: int) -> int:
    """Returns the block size for as few blocks of `most` as cover `total`."""
    blocks = max(1, -(-total // most))
    size = -(-total // blocks)
    return max(1, min(-(-size // unit) * unit, most, total))
