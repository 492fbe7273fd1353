"""Measures this package and its peers against float64, and writes `data/errors.json`.

From the root of a checkout, with the extras `test` and `peers`:

    PYTHONPATH=tests JAX_PLATFORMS=cpu python docs/measure_errors.py

The truth is `tests/oracle.py`: NumPy in float64, of the logits as rounded to the dtype.
An error is relative, and the largest of its rows; an error of 1 is a result of 0.
"""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

# Before TensorFlow is imported: it otherwise explains itself at length.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import tensorflow as tf
import torch

import xent_jax

DATA = pathlib.Path(__file__).with_name("data") / "errors.json"
SEED = 20240229
MARGINS = tuple(range(0, 41))
TABLE_MARGINS = (0, 5, 10, 20, 40, 80)
WIDTHS = (2, 10, 1000, 32768)
CASES = {  # of the table of offsets: dtype and what is added to every logit
    "float32": (0, 30, 1e3, 1e4, 1e6),
    "bfloat16": (0, 30, 100),
}
SIGMOID = {
    "label 1, logits 5 to 80": (1.0, 5, 80),
    "label 0, logits −80 to −5": (0.0, -80, -5),
    "label 1, logits −5 to 5": (1.0, -5, 5),
    "label 0, logits −5 to 5": (0.0, -5, 5),
    "label 0.9999, logits 5 to 20": (0.9999, 5, 20),
    "label 0.0001, logits −20 to −5": (0.0001, -20, -5),
}

Result = tuple[np.ndarray, np.ndarray]


class Library(NamedTuple):
    """Two losses; each returns its value and the gradient of the sum, in float64."""

    class_ids: Callable[[np.ndarray, np.ndarray], Result]
    sigmoid: Callable[[np.ndarray, np.ndarray], Result]


def _in_jax(loss: Callable) -> Callable[[np.ndarray, np.ndarray], Result]:
    def total(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = loss(logits, labels)
        return losses.astype(jnp.float32).sum(), losses

    def run(logits: np.ndarray, labels: np.ndarray) -> Result:
        program = jax.jit(jax.value_and_grad(total, has_aux=True))
        (_, value), gradient = program(jnp.asarray(logits), jnp.asarray(labels))
        return _double(value), _double(gradient)

    return run


def _in_torch(loss: Callable) -> Callable[[np.ndarray, np.ndarray], Result]:
    def run(logits: np.ndarray, labels: np.ndarray) -> Result:
        inputs = torch.tensor(logits.astype(np.float32))
        inputs = inputs.to(getattr(torch, logits.dtype.name)).requires_grad_()
        value = loss(inputs, torch.tensor(labels), reduction="none")
        value.sum().backward()
        return _double(value.detach().float()), _double(inputs.grad.float())

    return run


def _in_tensorflow(loss: Callable) -> Callable[[np.ndarray, np.ndarray], Result]:
    def run(logits: np.ndarray, labels: np.ndarray) -> Result:
        inputs = tf.cast(tf.constant(logits.astype(np.float32)), logits.dtype.name)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = loss(labels, inputs)
        gradient = tape.gradient(value, inputs)
        return tuple(_double(tf.cast(x, "float32").numpy()) for x in (value, gradient))

    return run


def _double(array: object) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


LIBRARIES = {
    "optax": Library(
        _in_jax(optax.softmax_cross_entropy_with_integer_labels),
        _in_jax(optax.sigmoid_binary_cross_entropy),
    ),
    "PyTorch": Library(
        _in_torch(torch.nn.functional.cross_entropy),
        _in_torch(torch.nn.functional.binary_cross_entropy_with_logits),
    ),
    "TensorFlow": Library(
        _in_tensorflow(tf.nn.sparse_softmax_cross_entropy_with_logits),
        _in_tensorflow(tf.nn.sigmoid_cross_entropy_with_logits),
    ),
    "xent_jax": Library(
        _in_jax(xent_jax.softmax_cross_entropy_with_integer_labels),
        _in_jax(xent_jax.sigmoid_binary_cross_entropy),
    ),
}


def largest_errors(computed: Result, truth: oracle.Loss, hit: np.ndarray) -> dict:
    """Returns the largest relative error of the loss and of the label's gradient."""
    value, gradient = computed
    return {
        "loss": _largest(value, truth.value),
        "gradient": _largest(gradient[hit], truth.gradient[hit]),
    }


def _largest(computed: np.ndarray, truth: np.ndarray) -> float:
    # Four digits are all that a table or a picture shows.
    return float(f"{np.abs(computed / truth - 1).max():.3e}")


def of_class_ids(logits: np.ndarray, ids: np.ndarray) -> dict:
    """Returns the errors of every library for rows of class ids."""
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
    hit = np.arange(logits.shape[-1]) == ids[:, None]
    return {
        name: largest_errors(library.class_ids(logits, ids), truth, hit)
        for name, library in LIBRARIES.items()
    }


def with_margin(margin: float, dtype: str, classes: int = 10) -> dict:
    """Returns the errors for rows whose label is ahead of its best rival."""
    rng = np.random.default_rng(SEED)
    rivals = rng.standard_normal((256, classes))
    ids = rng.integers(0, classes, 256)
    hit = np.arange(classes) == ids[:, None]
    best = np.where(hit, -np.inf, rivals).max(-1, keepdims=True)
    logits = np.where(hit, best + margin, rivals).astype(jnp.dtype(dtype))
    return {"dtype": dtype, "margin": margin, "errors": of_class_ids(logits, ids)}


def with_offset(offset: float, dtype: str) -> dict:
    """Returns the errors for ordinary rows that all have an offset."""
    rng = np.random.default_rng(SEED)
    logits = offset + 2 * rng.standard_normal((256, 64))
    ids = rng.integers(0, 64, 256)
    errors = of_class_ids(logits.astype(jnp.dtype(dtype)), ids)
    return {"dtype": dtype, "offset": offset, "errors": errors}


def of_sigmoid(name: str) -> dict:
    """Returns the errors of binary cross-entropy over a range of logits."""
    label, lowest, highest = SIGMOID[name]
    logits = np.linspace(lowest, highest, 2000).astype(np.float32)
    labels = np.full(logits.shape, label, np.float32)
    truth = oracle.sigmoid_binary_cross_entropy(logits, labels)
    everywhere = np.ones(logits.shape, bool)
    errors = {
        library: largest_errors(losses.sigmoid(logits, labels), truth, everywhere)
        for library, losses in LIBRARIES.items()
    }
    return {"case": name, "errors": errors}


def in_ulp(classes: int, dtype: str) -> dict:
    """Returns this package's largest errors in ulp, for margins from −60 to 80."""
    rng = np.random.default_rng(SEED)
    rows = int(np.clip(400_000 // classes, 16, 2000))
    logits = rng.standard_normal((rows, classes))
    ids = rng.integers(0, classes, rows)
    hit = np.arange(classes) == ids[:, None]
    best = np.where(hit, -np.inf, logits).max(-1)
    margins = np.linspace(-60, 80, rows)
    logits = np.where(hit, (best + margins)[:, None], logits).astype(jnp.dtype(dtype))
    value, gradient = LIBRARIES["xent_jax"].class_ids(logits, ids)
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
    loss = oracle.ulp_error(value, truth.value, "float32").max()
    label = oracle.ulp_error(gradient[hit], truth.gradient[hit], dtype).max()
    return {
        "dtype": dtype,
        "classes": classes,
        "loss": round(float(loss), 2),
        "gradient": round(float(label), 2),
    }


def points() -> dict:
    """Returns single numbers that README.md shows beside optax's."""
    shown = {}
    for dtype, row in (("float32", [0.0, 20.0, 1.0]), ("bfloat16", [0.0, 10.0, 1.0])):
        logits, ids = np.array([row]).astype(jnp.dtype(dtype)), np.array([1])
        truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids)
        shown[dtype] = {"true": [float(truth.value[0]), float(truth.gradient[0, 1])]}
        for name in ("optax", "xent_jax"):
            value, gradient = LIBRARIES[name].class_ids(logits, ids)
            shown[dtype][name] = [float(value[0]), float(gradient[0, 1])]
    rng = np.random.default_rng(SEED)
    logits = rng.standard_normal((256, 32768)).astype(jnp.bfloat16)
    ids = rng.integers(0, 32768, 256)
    truth = oracle.softmax_cross_entropy_with_integer_labels(logits, ids).value
    shown["wide"] = {
        name: float(
            f"{np.abs(LIBRARIES[name].class_ids(logits, ids)[0] - truth).max():.3e}"
        )
        for name in ("optax", "xent_jax")
    }
    return shown


def main() -> None:
    """Measures everything and writes the data file."""
    margins = [
        with_margin(margin, dtype)
        for dtype in ("float32", "bfloat16")
        for margin in sorted({*MARGINS, *TABLE_MARGINS})
    ]
    data = {
        "versions": {
            name: importlib.metadata.version(package)
            for name, package in {
                "jax": "jax",
                "optax": "optax",
                "PyTorch": "torch",
                "TensorFlow": "tensorflow-cpu",
            }.items()
        },
        "points": points(),
        "margins": margins,
        "offsets": [
            with_offset(offset, dtype)
            for dtype, offsets in CASES.items()
            for offset in offsets
        ],
        "sigmoid": [of_sigmoid(name) for name in SIGMOID],
        "ulp": [
            in_ulp(classes, dtype)
            for dtype in ("float32", "bfloat16")
            for classes in WIDTHS
        ],
    }
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
