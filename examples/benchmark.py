"""Times the losses against their peers: `python examples/benchmark.py --help`.

Two suites. `head` is the linear head, value and gradients by hidden and kernel, at the
shapes of real models (smaller ones on a CPU). `logits` is the losses of logits, value
and value with gradient, the gradient in new memory or in that of the donated logits.
Whatever of optax, tokamax, jax-cce and torch is installed takes part, beside the form
without a package: a checkpointed scan over tokens, or log(softmax).

All that is compared runs in the same rounds: a round calls every contender once untimed
and then timed, in rotating order, and medians over the rounds are compared, so that a
machine that slows down slows all of them down. The floor runs there too: the three
matmuls of a head and nothing else, or one pass over the arrays that a loss has to read
and write. Before it is timed, a contender's value and gradients are compared with ours;
one that differs or fails is not timed, stays in the table and says so. Compilation is
timed apart. `temp` is the memory that the compiler sets aside beside arguments and
results.

    python examples/benchmark.py head --output examples/results/cpu.jsonl --check
    python examples/benchmark.py logits --only integer --only float32 --rounds 31
    python examples/benchmark.py head --shapes 4096x2048x50257 --skip torch
    python examples/benchmark.py --read examples/results/cpu.jsonl --markdown
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import xent_jax

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "tokamax", "jax-cce", "torch")
FLAGS = ("XLA_FLAGS", "GLIBC_TUNABLES", "JAX_DEFAULT_MATMUL_PRECISION")
FLOATS = ("float32", "bfloat16")
SHAPES = {
    "head": {
        (8192, 2048, 128256): FLOATS[1:],  # Llama 3.2 1B
        (8192, 2048, 256000): FLOATS[1:],  # Gemma 2B
        (32768, 2560, 128256): FLOATS[1:],
    },
    "head on a CPU": {(2048, 1024, 32000): FLOATS, (2048, 1024, 128256): FLOATS[:1]},
    "logits": dict.fromkeys(
        [
            (128, 10),
            (419430, 10),
            (199728, 21),
            (41943, 100),
            (16448, 255),
            (4096, 1000),
            (512, 8192),
            (2048, 32768),
            (512, 128256),
        ],
        FLOATS,
    ),
}
TINY = {"head": {(24, 16, 100): FLOATS}, "logits": {(16, 10): FLOATS}}
# What is computed, and whose memory the gradient takes.
MODES = [("value", "fresh"), ("value_and_grad", "fresh"), ("value_and_grad", "donated")]
KINDS = {
    "head": [("integer", *MODES[1])],
    "logits": [(y, *mode) for y in ("integer", "dense", "sigmoid") for mode in MODES],
}
KINDS_OF_SOFTMAX = ("integer", "dense")
RULERS = ("optax", "floor")  # what speeds are shown relative to
# ‖difference from ours‖ / ‖ours‖: a loss in bfloat16 is off by 0.4 %.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
SAMPLE_SECONDS = 2e-3  # at least: shorter calls are repeated
PAUSE_SECONDS = 1e-2  # until the threads of the contender before have gone to sleep


class Case(NamedTuple):
    """What the contenders of one comparison have in common."""

    suite: str
    labels: str
    mode: str
    memory: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return " ".join([*self[:4], "x".join(map(str, self.shape)), self.dtype])


class Entry(NamedTuple):
    """Who takes part."""

    name: str
    loss: Callable[..., jax.Array]  # the mean over a batch
    kind: str = "jax"  # or "floor", which has no loss, "torch" or "torch.compile"


class Contender(NamedTuple):
    """An entry made ready to run."""

    inputs: Callable[[], tuple[Any, ...]]  # not timed
    call: Callable[..., Any]  # returns when the result is there
    compile_seconds: float
    temp_bytes: int | None
    repeats: int = 1  # calls a sample


class Goal(NamedTuple):
    """A bound on how ours compares with a rival; on ours alone where there is none."""

    platform: str
    case: str
    ours: str
    measure: str  # "speed", which should be at least the bound, or "temp", at most
    bound: float
    rival: str | None = "optax"


def _goals() -> Iterator[Goal]:
    head = "head integer value_and_grad fresh"
    mean, rows = "xent_jax mean", "xent_jax per row"
    small, wide = f"{head} 2048x1024x32000", f"{head} 2048x1024x128256"
    yield Goal("cpu", f"{small} float32", mean, "speed", 1.0)
    yield Goal("cpu", f"{small} float32", mean, "temp", 0.4)
    yield Goal("cpu", f"{small} float32", rows, "speed", 0.9)
    yield Goal("cpu", f"{small} float32", rows, "temp", 1 / 6)
    yield Goal("cpu", f"{wide} float32", mean, "speed", 1.2)
    yield Goal("cpu", f"{small} bfloat16", mean, "speed", 1.7)
    large = f"{head} 32768x2560x128256 bfloat16"
    yield Goal("gpu", large, mean, "speed", 1 / 1.1, "floor")
    yield Goal("gpu", large, mean, "speed", 1.0)
    yield Goal("gpu", large, mean, "temp", 5 * 2**30, None)
    few, many = ((419430, 10), (199728, 21)), ((41943, 100), (16448, 255), (4096, 1000))
    for labels, mode in itertools.product(KINDS_OF_SOFTMAX, MODES[:2]):
        for (rows, classes), *bounds in (
            *((shape, 0.8, 1.0) for shape in few),
            *((shape, 0.95, 1.2) for shape in (*many, (512, 8192))),
        ):
            for dtype, bound in zip(FLOATS, bounds, strict=True):
                name = f"logits {labels} {mode[0]} fresh {rows}x{classes} {dtype}"
                yield Goal("cpu", name, "xent_jax", "speed", bound)
                torch_bound = 0.75 if mode[0] == "value" else 0.9
                yield Goal(
                    "cpu", name, "xent_jax", "speed", torch_bound, "torch.compile"
                )
    for shape, mode in itertools.product(("4096x1000", "2048x32768"), MODES[:2]):
        name = f"logits sigmoid {mode[0]} fresh {shape} float32"
        bound = 4 if mode[0] == "value" else 3.5
        yield Goal("cpu", name, "xent_jax", "speed", bound)
        yield Goal("cpu", name, "xent_jax", "speed", 0.8, "torch.compile")
    for mode, dtype in itertools.product(MODES[:2], FLOATS):
        name = f"logits integer {mode[0]} fresh 128x10 {dtype}"
        yield Goal("cpu", name, "xent_jax", "speed", 1 / 1.1)


GOALS = tuple(_goals())


def head_entries(case: Case) -> Iterator[Entry]:
    """Yields who takes hidden, kernel and labels, ours first."""
    fused = xent_jax.linear_softmax_cross_entropy
    dense_loss = optax.softmax_cross_entropy_with_integer_labels

    def three_matmuls(hidden, kernel, labels):
        logits = hidden @ kernel  # in the place of their gradient, too
        return logits @ kernel.T, hidden.T @ logits

    def dense(hidden, kernel, labels, dtype=case.dtype):
        logits = jnp.matmul(hidden, kernel, preferred_element_type=dtype)
        return dense_loss(logits, labels).mean()

    def token_scan(hidden, kernel, labels):
        @jax.checkpoint
        def add(total, rows):
            logits = (rows[0] @ kernel).astype(jnp.float32)
            return total + dense_loss(logits, rows[1]).sum(), None

        blocks = hidden.reshape(8, -1, hidden.shape[1]), labels.reshape(8, -1)
        return jax.lax.scan(add, jnp.float32(0), blocks)[0] / len(labels)

    yield Entry("xent_jax mean", functools.partial(fused, reduction="mean"))
    yield Entry("xent_jax per row", lambda *arrays: fused(*arrays).mean())
    yield Entry("floor", three_matmuls, "floor")
    yield Entry("optax", dense)
    if case.dtype != "float32":
        in_float32 = functools.partial(dense, dtype="float32")
        yield Entry("optax, float32 logits", in_float32)
    yield Entry("token scan", token_scan)
    if importlib.util.find_spec("tokamax"):
        for choice in (None, "chunked_xla"):
            loss = functools.partial(_tokamax, implementation=choice)
            yield Entry(f"tokamax {choice or 'default'}", loss)
    if importlib.util.find_spec("jax_cce"):
        yield Entry("jax-cce", _jax_cce)
    if jax.default_backend() == "cpu" and importlib.util.find_spec("torch"):
        torch_loss = importlib.import_module("torch").nn.functional.cross_entropy
        yield Entry("torch", lambda h, w, y: torch_loss(h @ w, y), "torch")


def _tokamax(hidden, kernel, labels, implementation):
    loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    options = {"reduction": "mean", "implementation": implementation}
    return loss(hidden, labels, kernel, **options)


def _jax_cce(hidden, kernel, labels):
    loss = importlib.import_module("jax_cce").linear_cross_entropy
    return loss(hidden, kernel.T, labels)


def logits_entries(case: Case) -> Iterator[Entry]:
    """Yields who takes logits and labels, ours first."""
    name, naive, torch_name = {
        "integer": (
            "softmax_cross_entropy_with_integer_labels",
            lambda x, y: -jnp.log(jax.nn.softmax(x))[jnp.arange(len(y)), y],
            "cross_entropy",
        ),
        "dense": (
            "softmax_cross_entropy",
            lambda x, y: -jnp.sum(y * jnp.log(jax.nn.softmax(x)), axis=-1),
            "cross_entropy",
        ),
        "sigmoid": (
            "sigmoid_binary_cross_entropy",
            lambda x, y: (
                -y * jnp.log(p := jax.nn.sigmoid(x)) - (1 - y) * jnp.log(1 - p)
            ),
            "binary_cross_entropy_with_logits",
        ),
    }[case.labels]

    def floor(logits, labels):
        wide = labels.ndim == 2
        if case.mode == "value":
            return jnp.sum(logits), jnp.sum(labels) if wide else 0
        return logits * labels if wide else logits * 2

    losses = getattr(xent_jax, name), getattr(optax, name), naive
    for contender, loss in zip(("xent_jax", "optax", "naive"), losses, strict=True):
        yield Entry(contender, lambda x, y, loss=loss: loss(x, y).mean())
    yield Entry("floor", floor, "floor")
    on_cpu = jax.default_backend() == "cpu" and case.memory == "fresh"
    if on_cpu and importlib.util.find_spec("torch"):
        torch_loss = getattr(importlib.import_module("torch").nn.functional, torch_name)
        yield Entry("torch", torch_loss, "torch")
        yield Entry("torch.compile", torch_loss, "torch.compile")


def make_arrays(case: Case) -> tuple[jax.Array, ...]:
    """Returns what the loss is of: what it is differentiated by, and the labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows, *features, classes = case.shape
    normal = functools.partial(jax.random.normal, dtype=case.dtype)
    inputs = (normal(keys[0], (rows, *(features or [classes]))),)
    if features:
        scale = jnp.asarray(features[0] ** -0.5, case.dtype)
        inputs = *inputs, scale * normal(keys[1], (*features, classes))
    if case.labels == "integer":
        return *inputs, jax.random.randint(keys[2], (rows,), 0, classes)
    squash = jax.nn.softmax if case.labels == "dense" else jax.nn.sigmoid
    labels = squash(jax.random.normal(keys[2], (rows, classes)))
    return *inputs, labels.astype(case.dtype)


def build(case: Case, entry: Entry, arrays: Sequence[jax.Array]) -> Contender:
    """Returns an entry compiled."""
    if entry.kind.startswith("torch"):
        return _build_torch(case, entry, arrays)
    *inputs, labels = arrays
    by = tuple(range(len(inputs)))
    function, donated = entry.loss, case.memory == "donated"
    if case.mode == "value_and_grad" and entry.kind == "jax":
        function = jax.value_and_grad(function, by)
    jitted = jax.jit(function, donate_argnums=by if donated else ())
    lowered = jitted.lower(*inputs, labels)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    def make_inputs():
        copies = map(jnp.copy, inputs) if donated else inputs
        return jax.block_until_ready((*copies, labels))

    def call(*arguments):
        return jax.block_until_ready(compiled(*arguments))

    temp = None if memory is None else memory.temp_size_in_bytes
    return Contender(make_inputs, call, seconds, temp)


def _build_torch(case: Case, entry: Entry, arrays: Sequence[jax.Array]) -> Contender:
    import torch

    gradient, loss = case.mode == "value_and_grad", entry.loss
    dtypes = {case.dtype: (np.float32, getattr(torch, case.dtype))}
    *inputs, labels = (
        torch.tensor(np.asarray(array, wide)).to(dtype)
        for array in arrays
        for wide, dtype in [dtypes.get(array.dtype.name, (np.int64, torch.int64))]
    )
    inputs = [tensor.requires_grad_(gradient) for tensor in inputs]
    if entry.kind == "torch.compile":
        torch.compiler.reset()  # or it generalises over the shapes of earlier cases
        loss = torch.compile(loss, dynamic=False)

    def call(*arguments):
        value = loss(*arguments)
        return (value, torch.autograd.grad(value, inputs)) if gradient else value

    start = time.perf_counter()
    call(*inputs, labels)
    seconds = time.perf_counter() - start
    return Contender(lambda: (*inputs, labels), call, seconds, None)


def on_host(result: Any) -> list[np.ndarray]:
    """Returns the arrays of JAX or of torch as float32 of NumPy."""
    return [
        np.array(
            leaf if isinstance(leaf, jax.Array) else leaf.detach().float().numpy()
        ).astype(np.float32)
        for leaf in jax.tree.leaves(result)
    ]


def difference(result: Any, reference: Sequence[np.ndarray]) -> float:
    """Returns the largest ‖difference‖ / ‖reference‖ of the value and the gradients."""
    pairs = zip(on_host(result), reference, strict=True)
    off = max(np.linalg.norm(own - true) / np.linalg.norm(true) for own, true in pairs)
    return float(off) if np.isfinite(off) else np.inf


def sample(contender: Contender) -> float:
    """Returns the seconds that a call takes, after one that is not timed.

    That one pays for what the contender before has left: its memory is still being
    given back, and the caches are full of it. Results are given back untimed too.
    """
    contender.call(*contender.inputs())
    inputs = [contender.inputs() for _ in range(contender.repeats)]
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    results = [contender.call(*arguments) for arguments in inputs]
    seconds = time.perf_counter() - start
    return seconds / len(results)


def measure(
    case: Case, entries: Sequence[Entry], rounds: int, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """Returns a record for each entry; tells of every round."""
    arrays, reference = make_arrays(case), []
    ready, records = {}, {}
    for entry in entries:
        record = {"case": case.name, **case._asdict(), "contender": entry.name}
        record |= {
            "status": "ok",
            "detail": "",
            "difference": None,
            "compile_seconds": None,
        }
        record |= {"temp_bytes": None, "median_seconds": None, "seconds": []}
        records[entry.name] = record
        try:
            contender = build(case, entry, arrays)
            record["compile_seconds"] = contender.compile_seconds
            record["temp_bytes"] = contender.temp_bytes
            result = contender.call(*contender.inputs())
            if entry is entries[0]:
                reference = on_host(result)
            if entry.kind != "floor":
                record["difference"] = difference(result, reference)
                if not record["difference"] <= TOLERANCE[case.dtype]:
                    raise ValueError("its value or gradients are not ours")
            del result
            repeats = max(1, round(SAMPLE_SECONDS / sample(contender)))
            ready[entry.name] = contender._replace(repeats=repeats)
        except Exception as error:  # whatever a peer raises, the table says it
            wrong = record["difference"] is not None
            record["status"] = "wrong" if wrong else "failed"
            record["detail"] = f"{error!r:.300}"
    order = list(ready)
    for index in range(rounds):
        advance()
        turn = index % max(1, len(order))
        for name in order[turn:] + order[:turn]:
            records[name]["seconds"].append(sample(ready[name]))
    for name in order:
        records[name]["median_seconds"] = statistics.median(records[name]["seconds"])
    return list(records.values())


def environment() -> dict[str, Any]:
    """Returns where and when records are made."""
    device, cpuinfo = jax.devices()[0], Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    versions = {
        found.name: found.version for found in importlib.metadata.distributions()
    }
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
        "platform": device.platform,
        "device": device.device_kind,
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "xent_jax": xent_jax.__version__,
        "packages": {name: versions[name] for name in PACKAGES if name in versions},
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
    }


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Returns the cases that the command line selects."""
    cases = []
    for suite in KINDS if options.suite == "both" else [options.suite]:
        on_cpu = suite == "head" and jax.default_backend() == "cpu"
        shapes = SHAPES["head on a CPU" if on_cpu else suite]
        if options.tiny:
            shapes = TINY[suite]
        if options.shapes:
            axes = {"head": 3, "logits": 2}[suite]
            shapes = {shape: FLOATS for shape in options.shapes if len(shape) == axes}
        for kind in KINDS[suite]:
            for shape, dtypes in shapes.items():
                cases += [Case(suite, *kind, shape, dtype) for dtype in dtypes]
    return [case for case in cases if all(text in case.name for text in options.only)]


def run(
    cases: Sequence[Case], rounds: int, skip: Sequence[str], output: TextIO
) -> list[dict[str, Any]]:
    """Returns the records of the cases, each written as a line of a file."""
    records, described = [], environment()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases) * rounds)
        advance = functools.partial(progress.advance, task)
        for case in cases:
            progress.update(task, description=case.name)
            entries = {"head": head_entries, "logits": logits_entries}[case.suite](case)
            ours, *rivals = entries
            entries = [ours, *(rival for rival in rivals if rival.name not in skip)]
            for record in measure(case, entries, rounds, advance):
                records.append(described | record)
                print(json.dumps(records[-1]), file=output, flush=True)
            jax.clear_caches()
    return records


def judge(
    goals: Sequence[Goal], records: Sequence[dict[str, Any]]
) -> list[tuple[Goal, float | None, bool | None]]:
    """Returns what was measured for each goal of the cases run, and whether it is met.

    Missed where ours is wrong or fails; neither (`None`) where only the rival does.
    """
    found = {(r["platform"], r["case"], r["contender"]): r for r in records}
    verdicts = []
    for goal in goals:
        ours = found.get((goal.platform, goal.case, goal.ours))
        rival = found.get((goal.platform, goal.case, goal.rival))
        if ours is None or (goal.rival is not None and rival is None):
            continue
        if ours["status"] != "ok":
            verdicts.append((goal, None, False))
        elif rival is not None and rival["status"] != "ok":
            verdicts.append((goal, None, None))
        elif goal.measure == "speed":
            speed = rival["median_seconds"] / ours["median_seconds"]
            verdicts.append((goal, speed, speed >= goal.bound))
        else:
            temp = ours["temp_bytes"] / (rival["temp_bytes"] if rival else 1)
            verdicts.append((goal, temp, temp <= goal.bound))
    return verdicts


def show(records: Sequence[dict[str, Any]], console: Console, style: box.Box):
    """Prints a table a case; speeds are relative to the contenders that they name."""
    cases = {}
    for record in records:
        cases.setdefault((record["device"], record["case"]), []).append(record)
    for (device, case), members in cases.items():
        table = Table(title=f"{case} ({device})", box=style)
        table.add_column("contender", no_wrap=True)
        for heading in ("ms", "× optax", "× floor", "temp MiB", "compile s", "off"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("status")
        times = {r["contender"]: r["median_seconds"] for r in members}
        for record in members:
            own, temp = record["median_seconds"], record["temp_bytes"]
            speeds = [own and rival and rival / own for rival in map(times.get, RULERS)]
            cells = {
                ".4g": [own and own * 1e3],
                ".2f": speeds,
                ".1f": [
                    None if temp is None else temp / 2**20,
                    record["compile_seconds"],
                ],
                ".0e": [record["difference"]],
            }
            texts = [
                "" if value is None else format(value, form)
                for form, values in cells.items()
                for value in values
            ]
            status = f"{record['status']} {record['detail'][:60]}"
            table.add_row(record["contender"], *texts, status)
        console.print(table)


def show_verdicts(verdicts: Sequence[tuple[Goal, Any, Any]], console: Console):
    """Prints a line for each goal."""
    table = Table("case", "contender", "measure", "goal", "measured", "met")
    for goal, measured, met in verdicts:
        measure = f"{goal.measure} / {goal.rival}" if goal.rival else goal.measure
        bound = f"{'≥' if goal.measure == 'speed' else '≤'} {goal.bound:.4g}"
        value = "" if measured is None else f"{measured:.4g}"
        word = {True: "yes", False: "[red]NO[/]", None: "rival failed"}[met]
        table.add_row(goal.case, goal.ours, measure, bound, value, word)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("suite", nargs="?", choices=[*KINDS, "both"], default="both")
    add("--only", action="append", default=[], metavar="TEXT", help="in a case's name")
    add("--skip", action="append", default=[], metavar="NAME", help="a contender")
    add("--shapes", nargs="+", type=_shape, help="NxDxV heads, NxV logits")
    add("--tiny", action="store_true", help="shapes that take no time, to try it out")
    add("--rounds", type=int, default=15)
    add("--output", type=Path, default=os.devnull, help="a file for the JSON lines")
    add("--read", type=Path, nargs="+", help="files of records to show; runs nothing")
    add("--markdown", action="store_true", help="print tables in Markdown")
    add("--check", action="store_true", help="print the goals; exit 1 if one is missed")
    options = parser.parse_args(arguments)
    if options.read:
        texts = [file.read_text(encoding="utf-8") for file in options.read]
        records = [json.loads(line) for text in texts for line in text.splitlines()]
    else:
        cases = cases_of(options)
        if not cases or options.rounds < 1:
            parser.error("no case is selected, or no round")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", encoding="utf-8") as output:
            records = run(cases, options.rounds, options.skip, output)
    console = Console()
    console.width = max(console.width, 110)
    show(records, console, box.MARKDOWN if options.markdown else box.SIMPLE)
    if not options.check:
        return 0
    verdicts = judge(GOALS, records)
    show_verdicts(verdicts, console)
    return int(any(met is False for _, _, met in verdicts))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


if __name__ == "__main__":
    sys.exit(main())
