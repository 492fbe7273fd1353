"""Parameters of tests, the larger part of which runs only before a change lands."""

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
