"""Writes the tables and pictures of README.md and `docs/` from their data files.

From the root of a checkout, with the extra `examples`, for matplotlib:

    python docs/render.py

The data comes from `measure_errors.py`, `measure_exhaustive.py`, `measure_programs.py`,
`examples/benchmark.py` and `examples/where_it_matters.py`, and from the rows of the
porting guide. A table is what stands
between two comments that bear its name, so the text around it is free.
`tests/test_docs.py` holds files and data together. Neither needs a display.
"""

import ast
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence

import charts
import draw_architecture
import exhaustive_tables
from markdown_tables import number, table
from porting_frameworks import TABLES
from porting_rows import OURS, SETUP, Table

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
ERRORS = json.loads((DOCS / "data" / "errors.json").read_text(encoding="utf-8"))
PROGRAMS = json.loads((DOCS / "data" / "programs.json").read_text(encoding="utf-8"))


def read_records(name: str) -> list[dict]:
    """Returns what a run of the benchmark has measured."""
    path = ROOT / "examples" / "results" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TIMES, SWEEP = read_records("cpu.jsonl"), read_records("cpu-sweep.jsonl")
MATTERS = ROOT / "examples" / "results" / "where_it_matters.txt"

PAGES = (
    ROOT / "README.md",
    DOCS / "architecture.md",
    DOCS / "backends.md",
    DOCS / "cpu.md",
    DOCS / "heads.md",
    DOCS / "numerics.md",
    DOCS / "porting.md",
    DOCS / "speed.md",
    DOCS / "where_it_matters.md",
)
BLOCK = re.compile(r"(<!-- begin ([\w-]+) -->\n)(.*?)(<!-- end \2 -->\n)", re.DOTALL)

LIBRARIES = ("optax", "PyTorch", "TensorFlow", "xent_jax")
MARGINS = (0, 5, 10, 20, 40, 80)
MEBIBYTE = 2**20
TPU, H100 = "v5e", "H100"
CHIPS = {TPU: "TPU v5e", "v6e": "TPU v6e", "v5p": "TPU v5p", "tpu7x": "TPU7x"}
CHIPS[H100] = "H100"
FORMS = {
    "optax": "logits, optax on their float32 copy",
    "mean": '`reduction="mean"`',
    "rows": "`reduction=None`",
}
LOSSES = {
    "optax": "optax's loss of class ids, on a float32 copy",
    "integer": "class ids",
    "integer-where": "class ids, mask of rows",
    "integer-class-mask": "class ids, mask of classes",
    "integer-smoothing-z-loss": "class ids, smoothing, z-loss",
    "integer-weights-smoothing": "class ids, class weights, smoothing",
    "dense": "dense targets",
    "dense-smoothing-z-loss": "dense targets, smoothing, z-loss",
    "dense-weights": "dense targets, class weights, smoothing",
    "linearized": "linearized",
    "sigmoid": "sigmoid",
    "sigmoid-smoothing-weight": "sigmoid, smoothing, `pos_weight`",
    "nll": "log-probabilities",
    "categorical": "probabilities",
    "binary": "binary probabilities",
}
KINDS = {
    "integer": "class ids",
    "dense": "dense targets",
    "sigmoid": "sigmoid",
    "log-probabilities": "log-probabilities",
    "probabilities": "probabilities",
}
# The numbers of classes in the short table.
SHORT = {10, 21, 100, 255, 1000, 8192, 32768}
MODES = {
    ("value", "fresh"): "value",
    ("value_and_grad", "fresh"): "value and gradient",
    ("value_and_grad", "donated"): "with donated logits",
}
PEERS = ("optax", "torch.compile")
DTYPES = ("float32", "bfloat16")
MEASURED = ("optax", "integer", "integer-weights-smoothing", "dense", "sigmoid")


def error(value: float) -> str:
    """Returns a relative error; 1 is a result of 0."""
    return "1" if 0.9995 <= value <= 1.0005 else number(value)


def mebibytes(count: int) -> str:
    """Returns a size in MiB, to the next whole number above 1."""
    size = count / MEBIBYTE
    return "0" if count == 0 else "< 1" if size < 1 else f"{size:.0f}"


def point(dtype: str, name: str) -> str:
    """Returns a loss and its label's gradient, for README.md."""
    loss, gradient = ERRORS["points"][dtype][name]
    if loss == gradient == 0:
        return "loss 0, label's gradient 0"
    return f"{number(loss, 4)}, {number(gradient, 4).replace('-', '−', 1)}"


def offsets_at(offset: float, name: str) -> str:
    """Returns the error of float32 losses of logits around a number."""
    (entry,) = (
        entry
        for entry in ERRORS["offsets"]
        if (entry["dtype"], entry["offset"]) == ("float32", offset)
    )
    return number(entry["errors"][name]["loss"])


def optax_table() -> str:
    """What README.md opens with; the lines without numbers are as they are tested."""
    wide = ERRORS["points"]["wide"]
    pair = ("optax", "xent_jax")
    rows = [
        ["float32, logits [0, 20, 1], label 1", *(point("float32", n) for n in pair)],
        ["bfloat16, logits [0, 10, 1], label 1", *(point("bfloat16", n) for n in pair)],
        [
            "bfloat16, 32768 classes: largest error of a loss near 11",
            f"{wide['optax']:.2f}",
            f"{number(wide['xent_jax'], 1)} (the loss is float32)",
        ],
        [
            "float32, 64 logits around 10 000: largest relative error",
            *(offsets_at(1e4, name) for name in pair),
        ],
        ["label −1", "taken for the last class", "NaN in loss and gradient"],
        [
            "label ≥ number of classes",
            "loss NaN, gradient finite and wrong",
            "NaN in loss and gradient",
        ],
        ["a logit of −inf beside a one-hot target", "loss NaN", "1.3132617"],
        ["BCE of shapes (4, 1) and (4,)", "broadcast to (4, 4)", "`ValueError`"],
        [
            "label smoothing of class ids",
            "a one-hot array first",
            "`label_smoothing=0.1`",
        ],
        ["class weights, z-loss, `pos_weight`", "by hand", "keywords"],
    ]
    return table(["", f"optax {ERRORS['versions']['optax']}", "xent_jax"], rows)


def margin_table(dtype: str, kind: str) -> str:
    """The error of a loss or gradient by the margin of the label."""
    found = {
        entry["margin"]: entry["errors"]
        for entry in ERRORS["margins"]
        if entry["dtype"] == dtype
    }
    rows = [
        [name, *(error(found[margin][name][kind]) for margin in MARGINS)]
        for name in LIBRARIES
    ]
    return table(["margin", *(str(margin) for margin in MARGINS)], rows)


def offset_table() -> str:
    """The error of a loss by what is added to all logits."""
    rows = [
        [
            f"{entry['dtype']}, {entry['offset']:,.0f}".replace(",000", " 000"),
            *(error(entry["errors"][name]["loss"]) for name in LIBRARIES),
        ]
        for entry in ERRORS["offsets"]
    ]
    return table(["dtype, offset", *LIBRARIES], rows)


def sigmoid_table(kind: str) -> str:
    """The error of a binary loss or its gradient."""
    rows = [
        [entry["case"], *(error(entry["errors"][name][kind]) for name in LIBRARIES)]
        for entry in ERRORS["sigmoid"]
    ]
    return table(["float32", *LIBRARIES], rows)


def ulp_table() -> str:
    """This package's largest errors in units in the last place."""
    rows = [
        [
            entry["dtype"],
            str(entry["classes"]),
            f"{entry['loss']:.1f}",
            f"{entry['gradient']:.{1 if entry['dtype'] == 'float32' else 2}f}",
        ]
        for entry in ERRORS["ulp"]
    ]
    header = ["logits", "classes", "loss, ulp of float32", "label's gradient, its ulp"]
    return table(header, rows)


def memory_table() -> str:
    """The memory of a head on two chips."""
    size = {(entry["chip"], entry["form"]): entry for entry in PROGRAMS["heads"]}
    rows = [
        [
            words,
            *(
                f"{mebibytes(size[chip, form]['temp_bytes'])} MiB"
                for chip in (TPU, H100)
            ),
        ]
        for form, words in FORMS.items()
    ]
    return table(["", CHIPS[TPU], CHIPS[H100]], rows)


def head_table() -> str:
    """Memory and traffic of a head on every chip."""
    rows = [
        [
            CHIPS[entry["chip"]],
            FORMS[entry["form"]],
            mebibytes(entry["temp_bytes"]),
            f"{entry['traffic_bytes'] / 1e9:.1f}",
        ]
        for entry in PROGRAMS["heads"]
    ]
    return table(["chip", "head", "memory, MiB", "traffic, GB"], rows)


def form_table() -> str:
    """Time and memory of the forms of a head beside each other, by chip."""
    forms = ("dense", "mean", "rows")
    predicted = {
        (entry["chip"], entry["form"]): entry
        for entry in PROGRAMS["predictions"]
        if (entry["model"], entry["kernel"]) == ("Llama 3.2", "bfloat16")
    }
    rows = []
    for chip in dict.fromkeys(chip for chip, _ in predicted):
        entries = [predicted[chip, form] for form in forms]
        for what, cells in (
            ("predicted time", [f"{entry['ratio']:.2f}" for entry in entries]),
            ("memory, MiB", [mebibytes(entry["temp_bytes"]) for entry in entries]),
        ):
            rows.append([f"{CHIPS[chip]}: {what}", *cells])
    gpu = {entry["form"]: entry for entry in PROGRAMS["heads"] if entry["chip"] == H100}
    entries = [gpu[form] for form in ("optax", *forms[1:])]
    traffic = [f"{entry['traffic_bytes'] / 1e9:.1f}" for entry in entries]
    rows.append([f"{CHIPS[H100]}: traffic, GB", *traffic])
    memory = [mebibytes(entry["temp_bytes"]) for entry in entries]
    rows.append([f"{CHIPS[H100]}: memory, MiB", *memory])
    return table(["", "logits, optax", FORMS["mean"], FORMS["rows"]], rows)


def vocabulary_table() -> str:
    """The memory of a head by its vocabulary, on a TPU."""
    entries = PROGRAMS["vocabularies"]
    size = {(entry["classes"], entry["form"]): entry for entry in entries}
    rows = [
        [
            str(classes),
            *(mebibytes(size[classes, form]["temp_bytes"]) for form in FORMS),
        ]
        for classes in dict.fromkeys(entry["classes"] for entry in entries)
    ]
    return table(["vocabulary", *FORMS.values()], rows)


def prediction_table() -> str:
    """The predicted time of a head in multiples of its matmuls'."""
    found = {}
    for entry in PROGRAMS["predictions"]:
        key = entry["chip"], entry["model"], entry["kernel"]
        found.setdefault(key, {})[entry["form"]] = entry
    rows = []
    for (chip, model, kernel), forms in found.items():
        mean, dense, rowwise = (forms.get(form) for form in ("mean", "dense", "rows"))
        sizes = f"{mean['rows']} × {mean['features']} × {mean['classes']}"
        rows.append(
            [
                CHIPS[chip],
                f"{model}, {sizes}" + (f", {kernel} kernel" * (kernel != "bfloat16")),
                f"{1e3 * mean['bare_seconds']:.1f}",
                f"{dense['ratio']:.2f}",
                f"{mean['ratio']:.2f}",
                f"{rowwise['ratio']:.2f}" if rowwise else "",
                mebibytes(dense["temp_bytes"]),
                mebibytes(mean["temp_bytes"]),
                mebibytes(rowwise["temp_bytes"]) if rowwise else "",
            ]
        )
    heads = "logits, optax", FORMS["mean"], FORMS["rows"]
    memory = "logits, MiB", *(f"{head}, MiB" for head in heads[1:])
    return table(["chip", "head", "three matmuls, ms", *heads, *memory], rows)


def loss_prediction_table() -> str:
    """The predicted time of losses in multiples of their least traffic's."""
    names = {"optax": "optax's class ids", "class ids": "class ids"}
    found = {}
    for entry in PROGRAMS["loss_predictions"]:
        key = entry["loss"], tuple(entry["shape"])
        found.setdefault(key, {})[entry["chip"]] = f"{entry['ratio']:.2f}"
    rows = [
        [f"{names.get(loss, loss)}, {list(shape)}", *chips.values()]
        for (loss, shape), chips in found.items()
    ]
    chips = next(iter(found.values()))
    return table(["", *(CHIPS[chip] for chip in chips)], rows)


def loss_table(names: Sequence[str]) -> str:
    """Passes over the logits and memory of losses of logits."""
    found = {(entry["chip"], entry["case"]): entry for entry in PROGRAMS["losses"]}
    rows = []
    for name in names:
        row = [LOSSES[name]]
        for chip in (TPU, H100):
            entry = found[chip, name]
            row += [f"{entry['passes']:.1f}", mebibytes(entry["temp_bytes"])]
        rows.append(row)
    columns = [
        f"{CHIPS[chip]}{what}" for chip in (TPU, H100) for what in (": passes", ", MiB")
    ]
    return table(["", *columns], rows)


def speed(record: dict, peer: str) -> str:
    """How many times as fast as a peer a loss is, in the same rounds."""
    seconds = {
        entry["contender"]: entry["median_seconds"]
        for entry in TIMES
        if entry["case"] == record["case"] and entry["status"] == "ok"
    }
    if peer not in seconds:
        return ""
    return f"{seconds[peer] / seconds[record['contender']]:.2f}"


def speed_table(*, short: bool) -> str:
    """The speed of the losses of logits, the fewest classes first.

    Relative to the plain formula where optax has no such function.
    """
    records = {}
    for record in TIMES:
        if record["suite"] == "logits" and record["contender"] == "xent_jax":
            row = record["labels"], *record["shape"], record["axis"], record["dtype"]
            records[*row, record["mode"], record["memory"]] = record
    rows = sorted({name[:-2] for name in records}, key=_order)
    lines = []
    for row in rows:
        labels, *shape, axis, dtype = row
        if short and not (
            labels in ("integer", "dense", "sigmoid")
            and len(shape) == 2
            and shape[1] in SHORT
            and shape[0] > 32
        ):
            continue
        found = [records.get((*row, *mode)) for mode in MODES]
        rivals = ("naive",) if "probabilities" in labels else PEERS
        cells = [
            " / ".join(filter(None, (speed(record, rival) for rival in rivals)))
            if record
            else ""
            for record in found
        ]
        where = "" if axis == -1 else f", classes on axis {axis}"
        lines.append([f"{KINDS[labels]}, {shape}{where}, {dtype}", *cells])
    return table(["× optax / × torch.compile", *MODES.values()], lines)


def _order(row: tuple) -> tuple:
    """Sorts rows by kind, from few classes to many, float32 first."""
    labels, *shape, axis, dtype = row
    size = math.prod(shape)
    return [*KINDS].index(labels), shape[axis], size, -axis, DTYPES.index(dtype)


def head_speed_table() -> str:
    """The speed of the head, and its memory as a part of the dense head's."""
    dense = {
        entry["case"]: entry["temp_bytes"]
        for entry in TIMES
        if entry["contender"] == "optax"
    }
    forms = {"xent_jax mean": FORMS["mean"], "xent_jax per row": FORMS["rows"]}
    lines = [
        [
            ", ".join((str(record["shape"]), record["dtype"])),
            forms[record["contender"]],
            speed(record, "optax"),
            f"{record['temp_bytes'] / dense[record['case']]:.2f}",
        ]
        for record in TIMES
        if record["suite"] == "head" and record["contender"] in forms
    ]
    return table(["[rows, features, classes]", "form", "speed", "memory"], lines)


def versions(data: dict) -> str:
    """With what the numbers were made."""
    made = ", ".join(
        f"{name} {version.split('+')[0]}" for name, version in data["versions"].items()
    )
    return f"Made with {made}.\n"


def where_it_matters() -> str:
    """What `examples/where_it_matters.py` printed."""
    return f"```text\n{MATTERS.read_text(encoding='utf-8')}```\n"


def porting_setup() -> str:
    """The arrays and names of the porting guide."""
    return (
        f"```python\n{SETUP}```\n\nIn tables of means, `loss`, `keep` and the weights "
        f"are those of these calls:\n\n```python\n{OURS}```\n"
    )


def porting_table(rows_of: Table) -> str:
    """One table of the porting guide."""

    def heading(pattern: str, words: str) -> str:
        bare = pattern in ("…", "losses.…")
        return words if bare else f"`{pattern}`"

    def cell(pattern: str, text: str) -> str:
        # Whole calls have their module's name; options stand alone.
        return f"`{pattern.replace('…', text) if pattern == 'losses.…' else text}`"

    noted = any(row.note for row in rows_of.rows)
    rows = [
        [cell(rows_of.theirs, row.theirs), cell(rows_of.ours, row.ours)]
        + ([row.note] if noted else [])
        for row in rows_of.rows
    ]
    header = [heading(rows_of.theirs, "there"), heading(rows_of.ours, "here")]
    return table(header + (["note"] if noted else []), rows)


def folders_table() -> str:
    """What every folder of the package is for, in its own words, users first."""
    rows = []
    for folder in draw_architecture.read_imports().modules:
        path = draw_architecture.PACKAGE / folder / "__init__.py"
        if not path.exists():
            path = draw_architecture.PACKAGE / f"{folder}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        line = (ast.get_docstring(tree) or "").splitlines()[0].rstrip(".")
        name = "xent_jax" if folder == "__init__" else folder
        rows.append([f"`{name}`", line])
    return table(["", "what it is"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "optax-table": optax_table,
    "memory-table": memory_table,
    "measured-table": lambda: loss_table(MEASURED),
    "speed-table": lambda: speed_table(short=True),
    "speed-table-all": lambda: speed_table(short=False),
    "head-speed-table": head_speed_table,
    "error-versions": lambda: versions(ERRORS),
    "program-versions": lambda: versions(PROGRAMS),
    "margin-loss-float32": lambda: margin_table("float32", "loss"),
    "margin-gradient-float32": lambda: margin_table("float32", "gradient"),
    "margin-loss-bfloat16": lambda: margin_table("bfloat16", "loss"),
    "margin-gradient-bfloat16": lambda: margin_table("bfloat16", "gradient"),
    "offset-loss": offset_table,
    "sigmoid-loss": lambda: sigmoid_table("loss"),
    "sigmoid-gradient": lambda: sigmoid_table("gradient"),
    "ulp": ulp_table,
    "folders": folders_table,
    "head-table": head_table,
    "form-table": form_table,
    "vocabulary-table": vocabulary_table,
    "prediction-table": prediction_table,
    "loss-prediction-table": loss_prediction_table,
    "loss-table": lambda: loss_table(tuple(LOSSES)),
    "porting-setup": porting_setup,
    "where-it-matters": where_it_matters,
    **exhaustive_tables.BLOCKS,
    **{rows.name: lambda rows=rows: porting_table(rows) for rows in TABLES},
}


@functools.cache
def outputs() -> dict[pathlib.Path, str]:
    """Returns every file that this script writes, with its text."""
    texts = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        texts[page] = BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]]() + m[4], text)
    pictures = charts.charts(ERRORS, PROGRAMS, SWEEP) | draw_architecture.pictures()
    for name, picture in pictures.items():
        texts[DOCS / "pictures" / name] = picture
    return texts


def main() -> None:
    """Writes what has changed."""
    for path, text in outputs().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
