"""Predicts how long a head or a loss takes on a TPU, from its compiled schedule.

For every instruction outside of a fusion, times as often as it runs, the largest of

* its bundles, the instruction words that the core starts one a cycle, over the clock;
* the operations of its matrix products over the chip's peak;
* the bytes that it moves over 80 % of the peak bandwidth of the main memory.

That is a lower bound. It leaves out stalls, latencies, what it takes to start a program
or a copy, collectives, and throttling; copies that XLA starts early are hidden. Clocks
follow from peak operations and those of a cycle. There is no TPU v5p here, because two
cores share a device there; a device of a TPU7x is half a chip. Nothing was timed.
"""

import atexit
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import xent_jax
from aot import compilers, hlo
from aot.cases import Shape
from aot.linear import LLAMA, Sizes


class Chip(NamedTuple):
    """The peaks of one JAX device."""

    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second
    clock: float  # cycles a second


CHIPS = {
    "v5e": Chip(197e12, 819e9, 1.5e9),
    "v6e": Chip(918e12, 1640e9, 1.75e9),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 2.2e9),
}
_BANDWIDTH_SHARE = 0.8
SIZES = {
    "Llama 3.2": LLAMA,
    "Gemma 2": Sizes(8192, 2304, 256000),
    "Qwen 3": Sizes(16384, 4096, 151936),
}


def _dense(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    logits = hidden @ kernel.astype(hidden.dtype)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _mean(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return xent_jax.linear_softmax_cross_entropy(
        hidden, kernel, labels, reduction="mean"
    )


def _rows(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(xent_jax.linear_softmax_cross_entropy(hidden, kernel, labels))


FORMS: dict[str, Callable[..., jax.Array]] = {
    "dense": _dense,
    "mean": _mean,
    "rows": _rows,
}


class Loss(NamedTuple):
    """A loss of bfloat16 logits.

    The floor of its traffic is in passes, one of which reads or writes the logits.
    """

    function: Callable[..., jax.Array]
    dense: bool  # whether the labels are dense
    passes: int


_OPTAX_IDS = optax.softmax_cross_entropy_with_integer_labels
LOSSES = {
    "optax": Loss(_OPTAX_IDS, False, 4),
    "class ids": Loss(xent_jax.softmax_cross_entropy_with_integer_labels, False, 4),
    "sigmoid": Loss(xent_jax.sigmoid_binary_cross_entropy, True, 3),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of value and gradients.

    Attributes:
      seconds: the least time that the program takes.
      bare_seconds: three matmuls of a layer's size at the chip's peak; for a loss, its
        least traffic at the peak bandwidth.
      products: how many of them it does.
      traffic: bytes that it moves.
      temp_bytes: main memory needed beyond arguments and results.
    """

    seconds: float
    bare_seconds: float
    products: float
    traffic: int
    temp_bytes: int

    @property
    def ratio(self) -> float:
        """The time as a multiple of the bare one."""
        return self.seconds / self.bare_seconds


@functools.cache
def predict(
    chip: str, form: str, model: str = "Llama 3.2", kernel: str = "bfloat16"
) -> Prediction:
    """Predicts value and gradients of a head with bfloat16 features.

    Args:
      chip: a key of `CHIPS`.
      form: a key of `FORMS`.
      model: a key of `SIZES`.
      kernel: the dtype of the kernel.
    """
    # In another process: the compiler reads once whether it is to show its schedules.
    return _pool().submit(_predict, chip, form, model, kernel).result()


@functools.cache
def predict_loss(chip: str, loss: str, shape: Shape) -> Prediction:
    """Predicts the mean loss of bfloat16 logits and its gradient.

    Args:
      chip: a key of `CHIPS`.
      loss: a key of `LOSSES`.
      shape: of the logits, [N, V].
    """
    return _pool().submit(_predict_loss, chip, loss, shape).result()


@functools.cache
def _pool() -> concurrent.futures.ProcessPoolExecutor:
    folder = tempfile.mkdtemp(prefix="schedules")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pool = concurrent.futures.ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(folder,),
    )
    atexit.register(pool.shutdown)
    return pool


def _start(folder: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    os.environ["XENT_JAX_SCHEDULES"] = folder
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


def _predict(chip: str, form: str, model: str, kernel: str) -> Prediction:
    """Runs in that process."""
    sizes = SIZES[model]
    arguments = (
        jax.ShapeDtypeStruct((sizes.rows, sizes.features), jnp.bfloat16),
        jax.ShapeDtypeStruct((sizes.features, sizes.classes), jnp.dtype(kernel)),
        jax.ShapeDtypeStruct((sizes.rows,), jnp.int32),
    )
    function = jax.value_and_grad(FORMS[form], argnums=(0, 1))
    compiled, seconds = _compiled(chip, function, arguments)
    return Prediction(
        seconds,
        3 * sizes.matmul_flops / CHIPS[chip].flops,
        compiled.module.matmul_flops / sizes.matmul_flops,
        compiled.module.traffic,
        compiled.temp_bytes,
    )


def _predict_loss(chip: str, name: str, shape: Shape) -> Prediction:
    """Runs in that process."""
    loss = LOSSES[name]
    logits = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    labels = logits if loss.dense else jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    function = jax.value_and_grad(lambda *a: jnp.mean(loss.function(*a)))
    compiled, seconds = _compiled(chip, function, (logits, labels))
    floor = loss.passes * logits.size * logits.dtype.itemsize
    return Prediction(
        seconds,
        floor / CHIPS[chip].bandwidth,
        0,
        compiled.module.traffic,
        compiled.temp_bytes,
    )


def _compiled(
    chip: str, function: Callable[..., Any], arguments: tuple
) -> tuple[compilers.Compiled, float]:
    """Returns a program and its predicted time in seconds."""
    folder = pathlib.Path(os.environ["XENT_JAX_SCHEDULES"])
    for path in folder.iterdir():
        path.unlink()
    compiled = compilers.compile_for_tpu(chip, function, *arguments)
    return compiled, _seconds(CHIPS[chip], compiled.module, _schedules(folder))


def _seconds(
    chip: Chip, module: hlo.Module, schedules: dict[str, pathlib.Path]
) -> float:
    total = 0.0
    for instruction, computation, repetitions in module.executed():
        if instruction.opcode.endswith("-start"):
            continue
        words = 0
        if instruction.opcode in ("fusion", "custom-call"):
            words = _bundles(instruction, schedules.get(instruction.name))
        moved = module.moved(instruction, computation)
        total += repetitions * max(
            words / chip.clock,
            module.flops(instruction, computation) / chip.flops,
            moved / (_BANDWIDTH_SHARE * chip.bandwidth),
        )
    return total


def _schedules(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The dumped schedules, by the name of their instruction."""
    pattern = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
    matches = {path: pattern.fullmatch(path.name) for path in folder.iterdir()}
    return {match.group(1): path for path, match in matches.items() if match}


def _bundles(instruction: hlo.Instruction, path: pathlib.Path | None) -> int:
    """The bundles of one execution.

    The schedule of a fusion is that of one iteration, of which the program says how
    many there are; a Pallas kernel's has its loops in it.
    """
    if path is None:
        return 0
    loops = loops_of(path.read_text(errors="replace"))
    if instruction.opcode == "custom-call":
        return sum(loop.bundles * loop.trips for loop in loops)
    bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', instruction.attributes)
    counts = map(int, re.findall(r"\d+", bounds.group(1) if bounds else ""))
    return sum(loop.bundles for loop in loops) * math.prod(counts)


@dataclasses.dataclass
class Loop:
    """Bundles of a loop's body, without those of the loops inside of it."""

    parent: "Loop | None"
    bundles: int = 0
    own_trips: int = 1

    @property
    def trips(self) -> int:
        """How often the body runs."""
        return self.own_trips * (self.parent.trips if self.parent else 1)


_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(?:>\s*)*\{")
_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder [^,]+, (\d+) /\* loop exit test")


def loops_of(text: str) -> list[Loop]:
    """Reads a schedule: what is outside of all loops, and every loop.

    A predicated region counts as if it ran. A loop ends at the bundle after its test.
    """
    current = Loop(None)
    loops, ends = [current], False
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        if ends and current.parent is not None:
            current.bundles += 1
            current, ends = current.parent, False
            continue
        if bundle.group(1) == "LB":
            current = Loop(current)
            loops.append(current)
        current.bundles += 1
        if "loop exit test" in line:
            test = _EXIT.search(line)
            current.own_trips = int(test.group(1)) if test else 1
            ends = True
    return loops
