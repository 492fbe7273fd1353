"""Measures the sigmoid loss at every logit there is, and writes `data/exhaustive.json`.

From the root of a checkout, with the extra `test`, minutes on two cores:

    PYTHONPATH=tests JAX_PLATFORMS=cpu python docs/measure_exhaustive.py

Every float32, bfloat16 and float16 number that is not a NaN is a logit, under label 0
and under label 1; then the loss of two classes, on pairs drawn by margin, and sums of
many classes that are made to round badly. The truth is float64 on the host. Errors are
in units in the last place of the result, the largest of its range; where the truth is
below the smallest normal number, which XLA on a CPU flushes to 0, the largest error is
given in itself.
"""

import importlib.metadata
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import test_adversarial_sums as adversarial

import xent_jax

DATA = pathlib.Path(__file__).with_name("data") / "exhaustive.json"
SEED = 20240229
CHUNK = 2**20
PAIRS = 2**21  # of logits, in each range of margins
EXPONENT = np.int64(0x7FF << 52)
# Bits of the significand, and the smallest normal number.
FORMATS = {
    "float32": (24, 2.0**-126),
    "bfloat16": (8, 2.0**-126),
    "float16": (11, 2.0**-14),
}
# Magnitudes of a logit, from the first to below the second; the last has infinity.
RANGES = ((0.0, 1.0), (1.0, 16.0), (16.0, 87.0), (87.0, None))
MARGINS = ((-60, -20), (-20, -5), (-5, 0), (0, 5), (5, 20), (20, 40), (40, 80))


def sigmoid(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the losses and their gradients."""
    losses, pull = jax.vjp(
        lambda x: xent_jax.sigmoid_binary_cross_entropy(x, labels), logits
    )
    return losses, pull(jnp.ones_like(losses))[0]


def two_classes(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of rows of two whose label is the first, and its gradient."""
    ids = jnp.zeros(logits.shape[:1], jnp.int32)
    losses, pull = jax.vjp(
        lambda x: xent_jax.softmax_cross_entropy_with_integer_labels(x, ids), logits
    )
    return losses, pull(jnp.ones_like(losses))[0][:, 0]


def magnitudes(dtype: str) -> Iterator[np.ndarray]:
    """Yields all numbers of a format that are not negative, infinity the last."""
    integers = np.uint32 if dtype == "float32" else np.uint16
    end = int(np.asarray(np.inf, jnp.dtype(dtype)).view(integers)) + 1
    for start in range(0, end, CHUNK):
        bits = np.arange(start, min(start + CHUNK, end), dtype=integers)
        yield bits.view(jnp.dtype(dtype))


def error(computed: np.ndarray, truth: np.ndarray, dtype: str) -> np.ndarray:
    """Returns errors in ulp; that of an infinity that should be one is 0."""
    bits, lowest = FORMATS[dtype]
    exact = np.maximum(np.abs(truth), lowest).view(np.int64) & EXPONENT
    with np.errstate(invalid="ignore"):
        found = np.abs(computed.astype(np.float64) - truth)
        found /= exact.view(np.float64) * 2.0 ** (1 - bits)
    found[computed == truth] = 0  # infinities, and a sign of 0
    return found


def largest(found: np.ndarray, chosen: np.ndarray) -> float:
    """Returns the largest error of a range, inf if there is a NaN."""
    if not chosen.any():
        return 0.0
    return float(np.nan_to_num(found[chosen], nan=np.inf).max())


def truths_of(x: np.ndarray, ahead: bool, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns loss and gradient where the label is ahead by x, or behind by x."""
    odds = np.exp(-x)
    loss, direction = np.log1p(odds), 1 - 2 * label
    if ahead:
        return loss, direction * (odds / (1 + odds))
    return x + loss, direction / (1 + odds)


def every_logit(dtype: str) -> list[dict]:
    """Returns the largest errors of the sigmoid loss over all numbers of a format."""
    program = jax.jit(sigmoid)
    keys = itertools.product((False, True), range(len(RANGES)))
    table = {key: Errors("float32", dtype) for key in keys}
    for chunk in magnitudes(dtype):
        x = chunk.astype(np.float64)
        for ahead, label in itertools.product((False, True), (0, 1)):
            logits = chunk if ahead == (label == 1) else -chunk
            computed = program(logits, np.full_like(chunk, label))
            computed = [np.asarray(result) for result in computed]
            truths = truths_of(x, ahead, label)
            for number, (low, high) in enumerate(RANGES):
                within = (x >= low) & (True if high is None else x < high)
                table[ahead, number].add(computed, truths, within)
    return [
        {"ahead": ahead, "from": RANGES[number][0], "to": RANGES[number][1]}
        | errors.summary()
        for (ahead, number), errors in table.items()
    ]


class Errors:
    """The largest errors of losses and gradients so far, and how many there were."""

    def __init__(self, *dtypes: str):
        """Begins with none, for results of these dtypes."""
        self.dtypes = dtypes
        self.count = 0
        self.normal = [0.0, 0.0]  # in ulp
        self.below = [0.0, 0.0]  # in themselves

    def add(self, computed, truths, within: np.ndarray) -> None:
        """Takes in the numbers of a chunk that are in a range."""
        if not within.any():
            return
        self.count += int(np.count_nonzero(within))
        for place, dtype in enumerate(self.dtypes):
            truth, result = truths[place], computed[place]
            normal = within & (np.abs(truth) >= FORMATS[dtype][1])
            found = largest(error(result, truth, dtype), normal)
            self.normal[place] = max(self.normal[place], found)
            rest = within & ~normal
            if rest.any():
                apart = np.abs(result[rest].astype(np.float64) - truth[rest])
                self.below[place] = max(self.below[place], float(apart.max()))

    def summary(self) -> dict:
        """Returns what the data file has of it."""
        return {
            "count": self.count,
            "loss": round(self.normal[0], 3),
            "gradient": round(self.normal[1], 3),
            "loss_below": self.below[0],
            "gradient_below": self.below[1],
        }


def pairs_by_margin(dtype: str) -> list[dict]:
    """Returns the largest errors of two classes, by how far the label is ahead."""
    rng = np.random.default_rng(SEED)
    program, rows = jax.jit(two_classes), []
    for low, high in MARGINS:
        rival = 4 * rng.standard_normal(PAIRS)
        logits = np.stack([rival + rng.uniform(low, high, PAIRS), rival], -1)
        logits = logits.astype(jnp.dtype(dtype))
        margin = logits[:, 0].astype(np.float64) - logits[:, 1].astype(np.float64)
        odds = np.exp(-margin)
        losses, gradients = (np.asarray(result) for result in program(logits))
        loss = oracle.ulp_error(losses, np.log1p(odds), "float32").max()
        gradient = oracle.ulp_error(gradients, -odds / (1 + odds), dtype).max()
        rows.append(
            {
                "dtype": dtype,
                "from": low,
                "to": high,
                "loss": round(float(loss), 2),
                "gradient": round(float(gradient), 3),
            }
        )
    return rows


def adversarial_sums(dtype: str) -> list[dict]:
    """Returns the largest errors over all widths, for rows that round badly."""
    table = {kind: [0.0, 0.0] for kind in adversarial.KINDS}
    for classes, kind in itertools.product(adversarial.WIDTHS, adversarial.KINDS):
        rivals = adversarial.rivals_of(kind, classes, np.random.default_rng(SEED))
        logits = rivals.copy()
        leads = (-8, 60 if dtype == "float32" else 8)
        logits[:, 0] = np.linspace(*leads, len(rivals))
        logits = logits.astype(jnp.dtype(dtype))
        ids = np.zeros(len(rivals), np.int32)
        losses, slopes = adversarial.value_and_gradient(logits, ids)
        truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
        loss = oracle.ulp_error(losses, truth.value, "float32").max()
        slope = oracle.ulp_error(slopes, truth.gradient[:, 0], dtype).max()
        table[kind] = [max(table[kind][0], loss), max(table[kind][1], slope)]
    return [
        {
            "dtype": dtype,
            "kind": kind,
            "loss": round(float(loss), 2),
            "gradient": round(float(slope), 3),
        }
        for kind, (loss, slope) in table.items()
    ]


def timed(measure: Callable[[str], list[dict]], dtype: str) -> list[dict]:
    """Returns what `measure` does, and says how long it took."""
    began = time.perf_counter()
    found = measure(dtype)
    took = time.perf_counter() - began
    print(f"{measure.__name__} {dtype}: {took:.0f} s", flush=True)
    return found


def main() -> None:
    """Measures everything and writes the data file."""
    data = {
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "numpy")
        },
        "sigmoid": {
            dtype: timed(every_logit, dtype)
            for dtype in ("bfloat16", "float16", "float32")
        },
        "two_classes": [
            row
            for dtype in ("float32", "bfloat16")
            for row in timed(pairs_by_margin, dtype)
        ],
        "sums": [
            row
            for dtype in ("float32", "bfloat16", "float16")
            for row in timed(adversarial_sums, dtype)
        ],
    }
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
