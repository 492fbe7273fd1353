"""Every entry of the cookbook, run as a reader would run it.

An entry runs after the blocks above it that no entry owns: those of the beginning of
the page and of its part. One whose library is missing is skipped alone, and says which
it was; a doctest of the page could not do that, nor be copied without its prompts.
"""

import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from grids import shortened

pytestmark = pytest.mark.once

# Read when Keras is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")

PAGE = Path(__file__).parents[1] / "docs" / "cookbook.md"
PIECE = re.compile(
    r"^(?P<level>#{1,3}) (?P<title>[^\n]+)$|^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


class Entry(NamedTuple):
    """What is shared by the page, and by a part of it, and an entry's own code."""

    title: str
    shared: list[str]
    own: list[str]


def entries(text: str) -> list[Entry]:
    """Returns the entries of a page, in its order."""
    found: list[Entry] = []
    shared: list[list[str]] = [[], []]  # of the page, of the part
    level = 1
    for piece in PIECE.finditer(text):
        if piece["level"]:
            level = len(piece["level"])
            if level == 2:
                shared[1] = []
            elif level == 3:
                found.append(Entry(piece["title"], [*shared[0], *shared[1]], []))
        elif level == 3:
            found[-1].own.append(piece["code"])
        else:
            shared[level - 1].append(piece["code"])
    return found


ENTRIES = entries(PAGE.read_text(encoding="utf-8"))
TITLES = [entry.title for entry in ENTRIES]


@pytest.fixture(autouse=True)
def lenient():
    """JAX as it is out of the box."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


FEW = ["Several labels at once", "Equinox"]


@pytest.mark.parametrize("title", shortened(TITLES, kept=FEW))
def test_entry(title):
    entry = ENTRIES[TITLES.index(title)]
    code = entry.shared + entry.own
    for library in sorted(set(IMPORT.findall("".join(code)))):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        for block in code:
            exec(compile(block, str(PAGE), "exec"), names)


def test_every_entry_checks_itself():
    assert len(ENTRIES) >= 19
    for entry in ENTRIES:
        assert re.search(r"^ *assert", "".join(entry.own), re.MULTILINE), entry.title


def test_entries_are_read_with_what_they_share():
    page = "# T\n```python\na\n```\n## P\n```python\nb\n```\n### E\n```python\nc\n```\n"
    second = "## Q\n### F\n```python\nd\n```\ntext\n```python\ne\n```\n"
    assert entries(page + second) == [
        Entry("E", ["a\n", "b\n"], ["c\n"]),
        Entry("F", ["a\n"], ["d\n", "e\n"]),
    ]
