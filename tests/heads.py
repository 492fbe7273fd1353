"""What the tests of the linear head share: inputs, options, gradients, the oracle."""

import functools
import itertools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import xent_jax

LOSS = xent_jax.linear_softmax_cross_entropy
STATISTICS = xent_jax.linear_softmax_statistics

OPTIONS = (
    "bias",
    "where",
    "weights",
    "class_mask",
    "label_smoothing",
    "class_weights",
    "z_loss",
    "softcap",
)
OF_STATISTICS = ("bias", "where", "class_mask", "softcap")
SINGLES = [(), *((name,) for name in OPTIONS)]
# The 14 blocks of the Steiner system S(3, 4, 8): every three of the options are
# together in one of them, and so is every pair, with and without any third.
QUADRUPLES = [
    tuple(OPTIONS[index] for index in block)
    for block in itertools.combinations(range(8), 4)
    if functools.reduce(operator.xor, block) == 0
]
# What a gradient is taken by.
SMOOTH = ("hidden", "kernel", "bias", "weights", "class_weights", "softcap")
FORMS = (None, "mean", "sum")


def head_inputs(
    rng: np.random.Generator,
    batch: tuple[int, ...],
    features: int,
    classes: int,
    options: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Returns the arguments of a head by name, in float64.

    Of the rows about a third is dropped by `where`, a fifth has weight 0, and a quarter
    of the classes is padding. No label names padding.
    """
    kept = max(1, classes - classes // 4)
    values = {
        "bias": rng.standard_normal(classes),
        "where": rng.random(batch) < 0.7,
        "weights": np.where(rng.random(batch) < 0.2, 0.0, rng.uniform(0.5, 2.0, batch)),
        "class_mask": np.arange(classes) < kept,
        "label_smoothing": np.float64(0.15),
        "class_weights": rng.uniform(0.5, 2.0, classes),
        "z_loss": np.float64(0.05),
        "softcap": np.float64(1.5),
    }
    labels = rng.integers(0, kept if "class_mask" in options else classes, batch)
    return {
        "hidden": rng.standard_normal((*batch, features)),
        "kernel": 2 * rng.standard_normal((features, classes)) / np.sqrt(features),
        "labels": labels,
        **{name: values[name] for name in options},
    }


def cast(inputs: dict[str, Any], hidden: Any, others: Any = None) -> dict[str, Any]:
    """Returns the inputs with `hidden` in one dtype and other floats in another."""

    def convert(name: str, value: Any) -> Any:
        if not np.issubdtype(np.asarray(value).dtype, np.floating):
            return value
        narrow = jnp.dtype(hidden if name == "hidden" else others or hidden)
        return np.asarray(value).astype(narrow)

    return {name: convert(name, value) for name, value in inputs.items()}


def parted(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the inputs that gradients are taken by, and the others."""
    moving = {name: inputs[name] for name in SMOOTH if name in inputs}
    return moving, {name: inputs[name] for name in inputs if name not in moving}


def value_and_gradients(
    inputs: dict[str, Any], *, eager: bool = False, **static: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the loss, and the gradients of its sum by every smooth input.

    Compiled once for inputs of the same names, shapes and dtypes.
    """
    run = _value_and_gradients if eager else _compiled
    arrays = jax.tree.map(jnp.asarray, parted(inputs))
    return jax.tree.map(np.asarray, run(*arrays, tuple(sorted(static.items()))))


def _value_and_gradients(moving: Any, rest: Any, static: Any) -> Any:
    def total(moving: Any) -> Any:
        value = LOSS(**moving, **rest, **dict(static))
        return value.sum(), value

    gradients, value = jax.grad(total, has_aux=True)(moving)
    return value, gradients


_compiled = jax.jit(_value_and_gradients, static_argnums=2)


def truth_of(inputs: dict[str, Any], reduction: str | None) -> oracle.LinearLoss:
    """Returns the loss and its gradients, in float64 and without JAX."""
    return oracle.linear_softmax_cross_entropy(**inputs, reduction=reduction)


def assert_equals_the_oracle(
    inputs: dict[str, Any], rtol: float, *, eager: bool = False, **static: Any
) -> None:
    """Asserts value and gradients to `rtol` of the largest entry of each."""
    value, gradients = value_and_gradients(inputs, eager=eager, **static)
    truth = truth_of(inputs, static.get("reduction"))
    assert value.shape == truth.value.shape
    assert_close(value, truth.value, rtol)
    for name, gradient in gradients.items():
        assert gradient.dtype == np.asarray(inputs[name]).dtype
        assert_close(gradient, getattr(truth, name), rtol, name)


def assert_close(computed: Any, truth: Any, rtol: float, name: str = "") -> None:
    """Asserts equality to `rtol` of the largest finite entry of `truth`."""
    truth = np.asarray(truth, np.float64)
    finite = np.abs(truth[np.isfinite(truth)])
    scale = max(1.0, finite.max()) if finite.size else 1.0
    np.testing.assert_allclose(
        np.asarray(computed).astype(np.float64),
        truth,
        rtol=rtol,
        atol=rtol * scale,
        err_msg=name,
    )


def relative_error(computed: Any, truth: Any) -> float:
    """Returns ‖computed − truth‖ / ‖truth‖."""
    truth = np.asarray(truth, np.float64)
    difference = np.asarray(computed).astype(np.float64) - truth
    return float(np.linalg.norm(difference) / np.linalg.norm(truth))
