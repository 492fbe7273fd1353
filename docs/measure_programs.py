"""Compiles the losses for chips that are not here, and writes `data/programs.json`.

From the root of a checkout, with the extras `test` and `aot`:

    PYTHONPATH=tests JAX_PLATFORMS=cpu python docs/measure_programs.py

Memory is what the compiler says that a program needs beside its arguments and results;
traffic is counted in the compiled program by `tests/aot/hlo.py`. Times are predicted
by `tests/aot/predict.py`. Nothing is run and nothing is timed. The bounds that these
numbers must keep are tests in `tests/aot`.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from aot import compilers, contracts, linear, predict
from aot.cases import CASES, LogitsCase
from aot.linear import LLAMA, Sizes, linear_case

DATA = pathlib.Path(__file__).with_name("data") / "programs.json"
H100 = "H100"
CHIPS = (*compilers.TPU_TOPOLOGIES, H100)
# Powers of two, and the vocabularies of GPT-2, Llama 3 and Gemma.
VOCABULARIES = (32768, 50257, 65536, 128256, 256000)
# Chip, model and dtype of the kernel.
PREDICTED = (
    *((chip, "Llama 3.2", "bfloat16") for chip in predict.CHIPS),
    ("v6e", "Gemma 2", "bfloat16"),
    ("v6e", "Qwen 3", "bfloat16"),
    ("v6e", "Llama 3.2", "float32"),
)
# Logits that fill the memory, that stay on the chip between passes, and few long rows.
PREDICTED_SHAPES = (
    contracts.SHAPE,
    (16384, 1000),
    (65536, 100),
    (1024, 151936),
)
PACKAGES = {"tpu": "libtpu", H100: "jax-cuda13-plugin"}


def _head_with_logits(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array
) -> jax.Array:
    """What a training loop with optax has: its loss of float32 logits."""
    logits = (hidden @ kernel).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _optax(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )


HEADS = {
    "optax": dataclasses.replace(linear_case("mean"), loss=_head_with_logits),
    "mean": linear_case("mean"),
    "rows": linear_case(None),
}
# For the table of losses: what is usually written, beside the cases of the tests.
OPTAX_CASE = dataclasses.replace(CASES[0], name="optax", loss=_optax)


def compile_for(chip: str, function: Callable[..., Any], arguments: tuple) -> dict:
    """Returns the cost of a program, or that the chip has no room for it."""
    try:
        if chip == H100:
            compiled = compilers.compile_for_gpu(function, *arguments)
        else:
            compiled = compilers.compile_for_tpu(chip, function, *arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False}
    return {
        "temp_bytes": compiled.temp_bytes,
        "traffic_bytes": compiled.module.traffic,
    }


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Turns the kernels for TPUs off: of all chips the same form is compared."""
    os.environ["XENT_JAX_TPU_KERNELS"] = "0"
    try:
        yield
    finally:
        del os.environ["XENT_JAX_TPU_KERNELS"]


@without_kernels()
def head(chip: str, form: str, sizes: Sizes) -> dict:
    """Returns the cost of value and gradients of a head in bfloat16."""
    case = HEADS[form]
    entry = {"chip": chip, "form": form, **dataclasses.asdict(sizes)}
    arguments = linear.arguments(case, sizes)
    return entry | compile_for(chip, case.value_and_grad, arguments)


def loss(chip: str, case: LogitsCase) -> dict:
    """Returns the cost of value and gradient of a loss of bfloat16 logits."""
    arguments = case.arguments(contracts.SHAPE, jnp.bfloat16)
    cost = compile_for(chip, case.value_and_grad, arguments)
    passes = cost["traffic_bytes"] / contracts.logits_bytes(jnp.bfloat16)
    return {"chip": chip, "case": case.name, "passes": round(passes, 3)} | cost


def prediction(chip: str, model: str, kernel: str, form: str) -> dict:
    """Returns how long a head takes, predicted."""
    predicted = predict.predict(chip, form, model, kernel)
    return {
        "chip": chip,
        "model": model,
        **dataclasses.asdict(predict.SIZES[model]),
        "kernel": kernel,
        "form": form,
        "bare_seconds": predicted.bare_seconds,
        "ratio": round(predicted.ratio, 4),
        "temp_bytes": predicted.temp_bytes,
    }


def loss_prediction(chip: str, name: str, shape: tuple[int, int]) -> dict:
    """Returns how long value and gradient of a loss take, predicted."""
    predicted = predict.predict_loss(chip, name, shape)
    return {
        "chip": chip,
        "loss": name,
        "shape": shape,
        "seconds": predicted.seconds,
        "ratio": round(predicted.ratio, 4),
    }


def log(entry: dict) -> dict:
    """Shows progress: compiling takes minutes."""
    print(json.dumps(entry), flush=True)
    return entry


def main() -> None:
    """Compiles everything and writes the data file."""
    chips = ("v5e", H100)
    vocabularies = [
        log(head("v5e", form, dataclasses.replace(LLAMA, classes=classes)))
        for classes in VOCABULARIES
        for form in HEADS
    ]
    heads = [log(head(chip, form, LLAMA)) for chip in CHIPS for form in HEADS]
    losses = [log(loss(chip, case)) for case in (OPTAX_CASE, *CASES) for chip in chips]
    predictions = [
        log(prediction(*case, form))
        for case in PREDICTED
        for form in predict.FORMS
        if form != "rows" or case[1:] == ("Llama 3.2", "bfloat16")
    ]
    loss_predictions = [
        log(loss_prediction(chip, name, shape))
        for shape in PREDICTED_SHAPES
        for name in predict.LOSSES
        if name != "sigmoid" or shape == contracts.SHAPE
        for chip in predict.CHIPS
    ]
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "optax", *PACKAGES.values())
    }
    data = {
        "versions": versions,
        "losses_shape": contracts.SHAPE,
        "losses": losses,
        "heads": heads,
        "vocabularies": vocabularies,
        "predictions": predictions,
        "loss_predictions": loss_predictions,
    }
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
