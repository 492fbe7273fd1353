"""Times the losses against their peers: `python examples/benchmark.py --help`.

Two suites. `head` is the linear head, value and gradients by hidden and kernel, at the
shapes of real models (smaller ones on a CPU). `logits` is the losses of logits, of
log-probabilities and of probabilities, value and value with gradient, the gradient in
new memory or in that of the donated logits: for 2 to 128256 classes, of four million
logits where it is not said, for batches that take microseconds, and for images with the
classes on the axis before the pixels or after. Whatever of optax, tokamax, jax-cce and
torch is installed takes part, beside the form without a package: a checkpointed scan
over tokens, log(softmax), or the textbook's formula of probabilities.

All that is compared runs in the same rounds: a round calls every contender once untimed
and then timed, in rotating order, and medians over the rounds are compared, so that a
machine that slows down slows all of them down. The floor runs there too: the three
matmuls of a head and nothing else, or one pass over the arrays that a loss has to read
and write. Before it is timed, a contender's value and gradients are compared with ours;
one that differs or fails is not timed, stays in the table and says so. Compilation is
timed apart. `temp` is the memory that the compiler sets aside beside arguments and
results. Calls of less than a tenth of a millisecond are timed a hundred at once.

`--sweep` times class ids in float32 as the number of classes goes from 2 to 131072,
four million logits each, beside optax and torch.compile: the documentation's curves.

    python examples/benchmark.py head --output examples/results/cpu.jsonl --check
    python examples/benchmark.py logits --only integer --only float32 --rounds 31
    python examples/benchmark.py head --shapes 4096x2048x50257 --skip torch
    python examples/benchmark.py --sweep --output examples/results/cpu-sweep.jsonl
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
}


def _shapes(*classes: int) -> list[tuple[int, int]]:
    """Returns the shapes of four million logits."""
    return [(2**22 // number, number) for number in classes]


# What is computed, and whose memory the gradient takes.
MODES = [("value", "fresh"), ("value_and_grad", "fresh"), ("value_and_grad", "donated")]
FRESH, DONATED = MODES[:2], MODES[2:]
KINDS_OF_SOFTMAX = ("integer", "dense")
OF_PROBABILITIES = ("log-probabilities", "probabilities")
SMALL = [(32, 10), (128, 10)]
FEW = _shapes(2, 10, 21)
MANY = [
    *_shapes(100, 128, 255, 256, 500),
    (4096, 1000),
    *_shapes(1024, 2000, 8192, 50257, 128256),
]
LARGE, WIDEST = (2048, 32768), (512, 128256)
IMAGES = {(8, 21, 160, 160): 1, (8, 160, 160, 21): -1}  # the axis of the classes
SIGMOID = [(4096, 1000), LARGE]
PROBABILITIES = _shapes(10, 100, 1000, 8192)
LOGITS = [
    (KINDS_OF_SOFTMAX, FRESH, [*SMALL, *FEW, *MANY, LARGE], FLOATS),
    (KINDS_OF_SOFTMAX, DONATED, [SMALL[1], *_shapes(100), *SIGMOID], FLOATS),
    (("integer",), FRESH, [*IMAGES, WIDEST], FLOATS),
    (("sigmoid",), MODES, SIGMOID, FLOATS),
    (OF_PROBABILITIES, FRESH, PROBABILITIES, FLOATS[:1]),
]
# What the shapes of the command line are tried with.
KINDS = {
    "head": [("integer", *MODES[1])],
    "logits": [(y, *mode) for y in (*KINDS_OF_SOFTMAX, "sigmoid") for mode in MODES],
}
TINY = {"head": (24, 16, 100), "logits": (16, 10)}
SWEEP = _shapes(
    *(2, 3, 5, 10, 21, 32, 33, 100, 128, 255, 256, 500, 1000, 2000, 4096, 8192),
    *(16384, 32768, 50257, 131072),
)
NOT_IN_SWEEP = ("naive", "floor", "torch")
RULERS = ("optax", "naive", "floor")  # what speeds are shown relative to
# ‖difference from ours‖ / ‖ours‖: a loss in bfloat16 is off by 0.4 %.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
SAMPLE_SECONDS = 2e-3  # at least: shorter calls are repeated
SMALL_SECONDS, SMALL_REPEATS = 1e-4, 100
PAUSE_SECONDS = 1e-2  # until the threads of the contender before have gone to sleep


class Case(NamedTuple):
    """What the contenders of one comparison have in common."""

    suite: str
    labels: str
    mode: str
    memory: str
    shape: tuple[int, ...]
    dtype: str
    axis: int = -1  # of the classes

    @property
    def name(self) -> str:
        axis = [] if self.axis == -1 else [f"axis {self.axis}"]
        shape = "x".join(map(str, self.shape))
        return " ".join([*self[:4], shape, self.dtype, *axis])


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


def head_cases() -> Iterator[Case]:
    """Yields the cases of a linear head."""
    on_cpu = jax.default_backend() == "cpu"
    for shape, dtypes in SHAPES["head on a CPU" if on_cpu else "head"].items():
        for dtype in dtypes:
            yield Case("head", *KINDS["head"][0], shape, dtype)


def logits_cases() -> Iterator[Case]:
    """Yields the cases of the losses of logits, and of probabilities."""
    for kinds, modes, shapes, dtypes in LOGITS:
        for kind, mode, shape, dtype in itertools.product(kinds, modes, shapes, dtypes):
            yield Case("logits", kind, *mode, shape, dtype, IMAGES.get(shape, -1))


SUITES = {"head": head_cases, "logits": logits_cases}


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
    yield from _goals_of_logits()


def _goals_of_logits() -> Iterator[Goal]:
    def goals(case: Case, bound: float, rival: str = "optax") -> Iterator[Goal]:
        compiled = 0.75 if case.mode == "value" else 0.9
        if case.labels == "sigmoid":
            compiled = 0.8
        yield Goal("cpu", case.name, "xent_jax", "speed", bound, rival)
        if rival == "optax" and case.shape not in SMALL:
            yield Goal("cpu", case.name, "xent_jax", "speed", compiled, "torch.compile")

    for case in logits_cases():
        half, value = case.dtype == "bfloat16", case.mode == "value"
        if case.memory == "donated" or case.shape == WIDEST:
            continue
        if case.shape in SMALL:
            yield from goals(case, 1 / 1.1)
        elif case.labels in OF_PROBABILITIES:
            yield from goals(case, 0.9, "naive")
        elif case.labels == "sigmoid":
            if not half:
                yield from goals(case, 4 if value else 3.5)
        elif case.shape in IMAGES:
            yield from goals(case, 1.2 if case.axis == 1 else 0.8)
        elif case.shape in FEW:
            yield from goals(case, 1.0 if half else 0.8)
        elif case.shape in MANY:
            yield from goals(case, 1.2 if half else 0.95)


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
    axis, integer = case.axis, case.labels in ("integer", "log-probabilities")

    def floor(logits, labels):
        if case.mode == "value":
            return jnp.sum(logits), 0 if integer else jnp.sum(labels)
        return logits * 2 if integer else logits * labels

    name, torch_name = LOSSES[case.labels]
    options = {} if axis == -1 else {"axis": axis}
    losses = {"xent_jax": functools.partial(getattr(xent_jax, name), **options)}
    if case.labels not in OF_PROBABILITIES:
        losses["optax"] = functools.partial(getattr(optax, name), **options)
    losses["naive"] = functools.partial(NAIVE[case.labels], axis=axis)
    for contender, loss in losses.items():
        yield Entry(contender, lambda x, y, loss=loss: loss(x, y).mean())
    yield Entry("floor", floor, "floor")
    on_cpu = jax.default_backend() == "cpu" and case.memory == "fresh"
    if on_cpu and torch_name and importlib.util.find_spec("torch"):
        torch_loss = getattr(importlib.import_module("torch").nn.functional, torch_name)

        def with_classes_second(logits, labels):
            return torch_loss(logits.movedim(axis, 1), labels)

        loss = torch_loss if len(case.shape) == 2 else with_classes_second
        yield Entry("torch", loss, "torch")
        yield Entry("torch.compile", loss, "torch.compile")


def _naive_nll(x, y, axis):
    return -jnp.take_along_axis(x, jnp.expand_dims(y, axis), axis)


def _naive_sigmoid(x, y, axis):
    p = jax.nn.sigmoid(x)
    return -y * jnp.log(p) - (1 - y) * jnp.log(1 - p)


def _naive_probabilities(p, y, axis):
    p = p / jnp.sum(p, axis, keepdims=True)
    return -jnp.sum(y * jnp.log(jnp.clip(p, 1e-7, 1 - 1e-7)), axis)


LOSSES = {  # here, and in torch
    "integer": ("softmax_cross_entropy_with_integer_labels", "cross_entropy"),
    "dense": ("softmax_cross_entropy", "cross_entropy"),
    "sigmoid": ("sigmoid_binary_cross_entropy", "binary_cross_entropy_with_logits"),
    "log-probabilities": ("nll_loss", "nll_loss"),
    "probabilities": ("categorical_cross_entropy", None),
}
NAIVE = {
    "integer": lambda x, y, axis: _naive_nll(jnp.log(jax.nn.softmax(x, axis)), y, axis),
    "dense": lambda x, y, axis: -jnp.sum(y * jnp.log(jax.nn.softmax(x, axis)), axis),
    "sigmoid": _naive_sigmoid,
    "log-probabilities": _naive_nll,
    "probabilities": _naive_probabilities,
}


def make_arrays(case: Case) -> tuple[jax.Array, ...]:
    """Returns what the loss is of: what it is differentiated by, and the labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    normal = functools.partial(jax.random.normal, dtype=case.dtype)
    if case.suite == "head":
        rows, features, classes = case.shape
        scale = jnp.asarray(features**-0.5, case.dtype)
        kernel = scale * normal(keys[1], (features, classes))
        labels = jax.random.randint(keys[2], (rows,), 0, classes)
        return normal(keys[0], (rows, features)), kernel, labels
    logits, axis, shape = normal(keys[0], case.shape), case.axis, list(case.shape)
    if case.labels == "log-probabilities":
        logits = jax.nn.log_softmax(logits, axis)
    elif case.labels == "probabilities":
        logits = jax.nn.softmax(logits, axis)
    if case.labels in ("integer", "log-probabilities"):
        classes = shape.pop(axis)
        return logits, jax.random.randint(keys[2], shape, 0, classes)
    squash = jax.nn.sigmoid if case.labels == "sigmoid" else jax.nn.softmax
    labels = squash(jax.random.normal(keys[2], shape))
    return logits, labels.astype(case.dtype)


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


def repeats_of(seconds: float) -> int:
    """Returns how many calls of so many seconds are a sample."""
    if seconds < SMALL_SECONDS:
        return SMALL_REPEATS
    return max(1, round(SAMPLE_SECONDS / seconds))


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
            repeats = repeats_of(sample(contender))
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
    if options.sweep:
        for shape, mode in itertools.product(SWEEP, FRESH):
            cases.append(Case("logits", "integer", *mode, shape, "float32"))
    for suite in SUITES if options.suite == "both" else [options.suite]:
        if options.tiny or options.shapes:
            shapes = options.shapes or [TINY[suite]]
            shapes = [shape for shape in shapes if len(shape) == len(TINY[suite])]
            for kind, *rest in itertools.product(KINDS[suite], shapes, FLOATS):
                cases.append(Case(suite, *kind, *rest))
        elif not options.sweep:
            cases += SUITES[suite]()
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
    add("suite", nargs="?", choices=[*SUITES, "both"], default="both")
    add("--only", action="append", default=[], metavar="TEXT", help="in a case's name")
    add("--skip", action="append", default=[], metavar="NAME", help="a contender")
    add("--shapes", nargs="+", type=_shape, help="NxDxV heads, NxV logits")
    add("--sweep", action="store_true", help="from 2 to 131072 classes, nothing else")
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
            skip = [*options.skip, *(NOT_IN_SWEEP if options.sweep else ())]
            records = run(cases, options.rounds, skip, output)
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
