"""What the tests of the linear head share: inputs, options, gradients, the oracle."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import registry
from grids import covering

import xent_jax

LOSS = xent_jax.linear_softmax_cross_entropy
STATISTICS = xent_jax.linear_softmax_statistics
FORMS = tuple(form.get("reduction") for form in registry.FUNCTIONS[registry.HEAD].forms)


def _with_a_truth(name: str) -> tuple[str, ...]:
    """Returns the options of a head that its oracle has too."""
    row = registry.FUNCTIONS[name]
    known = inspect.signature(row.oracle).parameters
    return tuple(key for key in row.options if registry.keyword_of(key) in known)


OPTIONS = _with_a_truth(registry.HEAD)
OF_STATISTICS = _with_a_truth(registry.HEAD_STATISTICS)
SINGLES = [(), *((name,) for name in OPTIONS)]
TRIPLES = covering(OPTIONS)
ALL = registry.Case(registry.FUNCTIONS[registry.HEAD], OPTIONS)
OF_ROWS = tuple(name for name, axes in ALL.axes.items() if axes[:1] == "n")
# What a gradient is taken by, and the oracle has one of.
SMOOTH = tuple(name for name in ALL.moving if name in oracle.LinearLoss._fields)


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
    case = registry.Case(registry.FUNCTIONS[registry.HEAD], options)
    return case.draw(rng, registry.Sizes(batch, classes, features))


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
    return registry.parted([name for name in SMOOTH if name in inputs], inputs)


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
