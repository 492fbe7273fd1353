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


# With several labels a row, a TPU holds up to three arrays of a block's size; blocks
# of a third of the rows take what one array would. With a teacher, those of three
# eighths take half of that more. For 8192 × 2048 × 128256 on a TPU v6e they are
# predicted to take 102 ms and 1.5 GiB; a third, in whole registers, 128 ms and 1.3 GiB;
# all rows, 60 ms and 2.5 GiB.
SHARE_OF_LABELS, SHARE_OF_A_TEACHER = 1 / 3, 3 / 8


def rows_per_block(
    rows: int, features: int, classes: int, itemsize: int, share: float = 1.0
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
      share: of these rows, what a block has that takes more arrays of its size.
    """
    half = itemsize * features * classes // 2
    budget = max(_ROW_TILE_BYTES, min(half, itemsize * _MOST_ROWS * classes))
    most = _whole(int(share * budget) // (itemsize * classes))
    return _balanced(rows, most, _SUBLANES) if isinstance(rows, int) else most


def classes_per_block(
    rows: int, classes: int, itemsize: int, *, narrow: bool = False
) -> int:
    """Returns how many classes a block of a result per row has.

    The tile of logits takes 32 MiB, or has 1536 classes where that is more. A block of
    the derivative in 16 bits has half as many again: a TPU keeps the tile of slopes,
    which take half of what logits do, on the chip, and every block reads and writes the
    gradient of the features. Value and gradient are predicted to take 9 % less time on
    a TPU v6e, and 1 % less on a v5e.

    Args:
      rows: N. A symbolic number counts as many.
      classes: V.
      itemsize: bytes of a logit.
      narrow: whether the block is of a derivative in 16 bits.
    """
    most = _FEWEST_CLASSES
    if isinstance(rows, int) and rows > 0:
        most = max(most, _whole(_CLASS_TILE_BYTES // (itemsize * rows)))
    if narrow:
        most = _whole(most * 3 // 2)
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
