"""How large test inputs are, and how one is drawn: ordinary ones, and the hardest."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """How many rows there are, by batch axes, classes, features, and ids a row."""

    batch: tuple[int, ...] = (8,)
    classes: int = 16
    features: int = 6
    ids: int = 3

    @property
    def kept(self) -> int:
        """How many classes are no padding, where there is a mask of classes."""
        return max(1, self.classes - self.classes // 4)

    def shape(self, axes: str) -> tuple[int, ...]:
        """Returns the shape of an array of these axes."""
        sizes = {
            "n": self.batch,
            "v": (self.classes,),
            "d": (self.features,),
            "k": (self.ids,),
        }
        return tuple(itertools.chain.from_iterable(sizes[axis] for axis in axes))


Draw = Callable[[np.random.Generator, tuple[int, ...], Sizes], Any]


EXTREME = Sizes((6,), 5, 3, 2)


def normal(scale: float = 1.0) -> Draw:
    return lambda rng, shape, sizes: scale * rng.standard_normal(shape)


def uniform(low: float, high: float) -> Draw:
    return lambda rng, shape, sizes: rng.uniform(low, high, shape)


def number(value: float) -> Draw:
    """Returns a number that every dtype has exactly."""
    return lambda rng, shape, sizes: np.float64(value)


def kernel(rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> Any:
    return 2 * rng.standard_normal(shape) / np.sqrt(sizes.features)


def probabilities(
    rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes
) -> Any:
    """Returns rows away from the clip, where a gradient is straight-through."""
    return rng.dirichlet(np.full(sizes.classes, 5.0), sizes.batch) * 0.8 + 0.02


def log_probabilities(
    rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes
) -> Any:
    return np.log(rng.uniform(0.2, 0.9, shape))


def class_ids(rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> Any:
    return rng.integers(0, sizes.classes, shape)


def row_mask(rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> Any:
    return rng.random(shape) < 0.7


def class_mask(rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> Any:
    return np.broadcast_to(np.arange(sizes.classes) < sizes.kept, shape).copy()


def row_weights(rng: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> Any:
    return np.where(rng.random(shape) < 0.2, 0.0, rng.uniform(0.5, 2.0, shape))


def changed(*changes: tuple[Any, Any]) -> Callable[[Any], Any]:
    """Returns a function that writes values to places of a copy."""

    def copied(array: Any) -> Any:
        array = np.array(array)
        for place, value in changes:
            array[place] = value
        return array

    return copied


# A tie; a label, 1, far ahead and far behind; rivals that the caller masked.
HARD_LOGITS = changed((1, 0.5), ((2, 1), 150), ((3, 1), -150), (4, -1e9), ((4, 1), 2))
HARD_IDS = changed((0, 0), (slice(1, 5), 1), (5, 4))
HARD_INDICES = changed((..., [[0, 2], [1, -1], [1, 2], [1, 0], [1, -1], [4, 2]]))
HARD_SHARES = changed((..., [[0.5, 0.5], [1, 0], [0.3, 0.7], [0.9, 0], [1, 0], [2, 1]]))
# No target, a certain one, and targets that do not sum to one.
HARD_TARGETS = changed((1, 0), (2, [0, 1, 0, 0, 0]), (3, [0, 2, 0, 0.5, 0]))
HARD_ANSWERS = changed((1, 0), (2, [0, 1, 0, 0, 0]), (3, [0, 1, 0, 0.5, 0]))
HARD_PROBS = changed((2, [0, 1, 0, 0, 0]), (3, [1, 0, 0, 0, 0]))
HARD_ROWS = changed((..., [True, True, False, True, True, False]))
# A row that keeps nothing, one that keeps its label alone; all keep their label.
HARD_CLASSES = changed(
    (..., [True, True, True, False, True]),
    (0, False),
    (1, [False, True, False, False, False]),
)
NO_CLASS_3 = changed((..., [True, True, True, False, True]))
NO_WEIGHT_2 = changed(((..., 2), 0))


def one_large_row(array: Any) -> Any:
    return changed((2, 60 * array[2]))(array)
