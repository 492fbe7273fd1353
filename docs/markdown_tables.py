"""How tables and numbers are written in Markdown."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def number(value: float, digits: int = 2) -> str:
    """Returns a number as people write it: 2.1e-7."""
    text = f"{value:.{digits - 1}e}"
    return re.sub(r"e([+-])0*(\d+)", r"e\1\2", text).replace("e+", "e")
