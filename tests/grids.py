"""Parameters of tests, the larger part of which runs only before a change lands."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def shortened(values: Iterable[Any], kept: Collection[Any]) -> list:
    """Returns the values as parameters, marked `exhaustive` unless they are kept.

    A tuple is the values of several arguments.
    """
    values, kept = list(values), list(kept)
    assert all(value in values for value in kept)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in kept else pytest.mark.exhaustive,
        )
        for value in values
    ]


def covering(options: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns sets of half of the options, or three, such that any three are in one.

    Greedily, the first of those that add most: of eight options the 14 blocks of the
    Steiner system S(3, 4, 8), where every pair is with and without any third.
    """
    size = max(3, (len(options) + 1) // 2)
    blocks = {
        block: frozenset(itertools.combinations(block, 3))
        for block in itertools.combinations(options, size)
    }
    missing = frozenset(itertools.combinations(options, 3))
    chosen = []
    while missing:
        best = max(blocks, key=lambda block: len(blocks[block] & missing))
        missing -= blocks[best]
        chosen.append(best)
    return chosen
