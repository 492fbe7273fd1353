"""The tables of `data/exhaustive.json`, which `measure_exhaustive.py` writes."""

import json
import pathlib
from collections.abc import Callable

from markdown_tables import number, table

DATA = json.loads(
    (pathlib.Path(__file__).parent / "data" / "exhaustive.json").read_text("utf-8")
)
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("loss", "gradient")


def ulp(value: float, dtype: str) -> str:
    """Returns an error in ulp; half of one is where a rounded gradient ends."""
    return f"{value:.{1 if dtype == 'float32' else 2}f}"


def sigmoid_every_logit() -> str:
    """The largest errors over all logits, by how far the label is ahead."""
    lines = []
    for rows in zip(*(DATA["sigmoid"][dtype] for dtype in DTYPES), strict=True):
        low, high = rows[0]["from"], rows[0]["to"]
        side = "ahead" if rows[0]["ahead"] else "behind"
        until = "∞" if high is None else f"{high:g}"
        cells = [f"{row['loss']:.1f}" for row in rows]
        cells += [
            ulp(row["gradient"], dtype) for row, dtype in zip(rows, DTYPES, strict=True)
        ]
        lines.append([f"{side} by {low:g} to {until}", *cells])
    header = [f"loss, {dtype}" for dtype in DTYPES]
    header += [f"gradient, {dtype}" for dtype in DTYPES]
    return table(["label", *header], lines)


def sigmoid_counts() -> str:
    """How many there were, and the largest errors where a result is subnormal."""
    lines = [
        [
            dtype,
            f"{sum(row['count'] for row in DATA['sigmoid'][dtype]):,}".replace(
                ",", " "
            ),
            number(max(row["loss_below"] for row in DATA["sigmoid"][dtype])),
            number(max(row["gradient_below"] for row in DATA["sigmoid"][dtype])),
        ]
        for dtype in DTYPES
    ]
    header = ["logits", "losses and gradients", "loss, absolute", "gradient, absolute"]
    return table(header, lines)


def two_classes() -> str:
    """The largest errors of two classes by the margin of the label."""
    found = {(row["from"], row["to"], row["dtype"]): row for row in DATA["two_classes"]}
    margins = dict.fromkeys((low, high) for low, high, _ in found)
    lines = []
    for low, high in margins:
        cells = []
        for dtype in DTYPES[:2]:
            row = found[low, high, dtype]
            cells += [f"{row['loss']:.1f}", ulp(row["gradient"], dtype)]
        lines.append([f"{low} to {high}".replace("-", "−"), *cells])
    header = [f"{kind}, {dtype}" for dtype in DTYPES[:2] for kind in KINDS]
    return table(["margin", *header], lines)


def adversarial_sums() -> str:
    """The largest errors over 39 widths, by how the rivals are made."""
    found = {(row["kind"], row["dtype"]): row for row in DATA["sums"]}
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in found):
        rows = [found[kind, dtype] for dtype in DTYPES]
        cells = [f"{row['loss']:.1f}" for row in rows]
        cells += [
            ulp(row["gradient"], dtype) for row, dtype in zip(rows, DTYPES, strict=True)
        ]
        lines.append([kind, *cells])
    header = [f"loss, {dtype}" for dtype in DTYPES]
    header += [f"gradient, {dtype}" for dtype in DTYPES]
    return table(["rivals", *header], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "sigmoid-every-logit": sigmoid_every_logit,
    "sigmoid-counts": sigmoid_counts,
    "two-classes": two_classes,
    "adversarial-sums": adversarial_sums,
}
