"""Checks every loss on every device that JAX sees: `python -m xent_jax.verify`.

Each loss, in float32, bfloat16 and float16, is evaluated eagerly, jitted and vmapped,
differentiated in reverse and in forward mode, and held to its float64 law
(`xent_jax.testing`); the laws are held to finite differences first. A table says how
far off each loss is and how far it may be. The exit status is 1 when one is too far
off, and 2 when a platform is asked for that JAX does not have.

On a CPU the bounds are those of the package. Elsewhere they are widened by what the
device's own `exp`, `log` and `log1p` are worse than the CPU's, measured first: the
losses are sums and products of non-negative terms, so errors add up and never amplify.
The error of a float32 dot product, which no loss of logits needs, is shown beside them:
it is what the logits of a model come from.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import xent_jax
from xent_jax import testing
from xent_jax._checking.cases import ROWS, Case, cases

PLATFORMS = ("cpu", "gpu", "tpu")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
MODES = ("eager", "jit", "vmap", "grad", "jvp")
_ULP = float(np.finfo(np.float32).eps)
# The largest errors of XLA:CPU's functions, in ulp of float32, that the bounds build
# on, and how often each enters a loss (exp: in the rivals' sum and in the margin).
_REFERENCE = {"exp": 1.0, "log": 1.2, "log1p": 2.5, "dot": 1.0}
_USES = {"exp": 2, "log": 1, "log1p": 1}
_FAULT = 64.0
_ROUNDED_SLOPES = 2.0


class Result(NamedTuple):
    """One loss in one dtype on one device; the errors are in ulp, by mode."""

    device: str
    loss: str
    dtype: str
    errors: dict[str, float]
    bounds: dict[str, float]

    @property
    def worst(self) -> str:
        """The mode nearest to its bound, or furthest beyond; a NaN is beyond all."""
        ratios = {mode: self.errors[mode] / self.bounds[mode] for mode in self.errors}
        return max(ratios, key=lambda mode: np.nan_to_num(ratios[mode], nan=np.inf))

    @property
    def ok(self) -> bool:
        """Whether every error is a number within its bound."""
        return all(self.errors[mode] <= self.bounds[mode] for mode in self.errors)


def primitive_errors(device: jax.Device) -> dict[str, float]:
    """Measures a device's own float32 functions: largest errors in ulp.

    The dot product's is relative to the sum of the absolute products.
    """
    grid = np.linspace(0, 1, 1 << 16)[1:]  # log(1) is 0, which has no ulp
    points = {
        "exp": -87 * grid,
        "log": np.exp(np.log(1e6) * grid),
        "log1p": np.exp(np.log(1e-30) * (1 - grid)),
    }
    errors = {}
    for name, exact in points.items():
        argument = exact.astype(np.float32)
        computed = jax.jit(getattr(jnp, name))(jax.device_put(argument, device))
        truth = getattr(np, name)(argument.astype(np.float64))
        spacing = np.spacing(np.abs(truth).astype(np.float32)).astype(np.float64)
        off = np.abs(np.asarray(computed).astype(np.float64) - truth) / spacing
        errors[name] = float(off.max())
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 64, 512)).astype(np.float32)
    computed = jax.jit(lambda a, b: jnp.dot(a, b.T))(
        jax.device_put(left, device), jax.device_put(right, device)
    )
    left, right = left.astype(np.float64), right.astype(np.float64)
    off = np.abs(np.asarray(computed) - left @ right.T)
    errors["dot"] = float((off / (np.abs(left) @ np.abs(right).T)).max() / _ULP)
    return errors


class _Run(NamedTuple):
    """A case on a device: its inputs there, and the law at the inputs as rounded."""

    case: Case
    inputs: jax.Array
    labels: jax.Array
    keep: jax.Array
    value: np.ndarray
    gradient: np.ndarray
    magnitude: np.ndarray

    def loss(self, inputs: jax.Array, labels: jax.Array, keep: jax.Array) -> jax.Array:
        """The loss of a batch, or of one example."""
        mask = {} if self.case.where is None else {"where": keep}
        return self.case.loss(inputs, labels, **mask, **self.case.options)

    def of_inputs(self, inputs: jax.Array) -> jax.Array:
        """The loss of the batch, by the inputs alone."""
        return self.loss(inputs, self.labels, self.keep)


def _prepare(case: Case, dtype: Any, device: jax.Device) -> _Run:
    integer = case.labels.dtype.kind in "iu"
    labels = case.labels if integer else case.labels.astype(np.float32)
    keep = np.ones(ROWS, bool) if case.where is None else case.where
    inputs = jax.device_put(jnp.asarray(case.inputs, dtype), device)
    options = case.options if case.where is None else case.options | {"where": keep}
    law = testing.law_of(case.loss) if case.law is None else case.law
    exact = np.asarray(inputs)
    return _Run(
        case,
        inputs,
        jax.device_put(jnp.asarray(labels), device),
        jax.device_put(jnp.asarray(keep), device),
        law.value(exact, labels, **options),
        law.gradient(exact, labels, **options),
        law.magnitude(exact, labels, **options),
    )


def _value_errors(run: _Run) -> dict[str, float]:
    scale = np.maximum(np.abs(run.value), run.case.scale)
    scale = np.where(scale == 0, 1, scale)
    forms = {
        "eager": run.loss,
        "jit": jax.jit(run.loss),
    }
    if not run.case.whole:
        forms["vmap"] = jax.jit(jax.vmap(run.loss))
    errors = {}
    for mode, form in forms.items():
        computed = np.asarray(form(run.inputs, run.labels, run.keep))
        off = np.abs(computed.astype(np.float64) - run.value) / scale
        errors[mode] = float(off.max() / _ULP)
    return errors


def _gradient_errors(run: _Run) -> dict[str, float]:
    dtype = run.inputs.dtype
    computed = jax.jit(jax.grad(lambda inputs: run.of_inputs(inputs).sum()))(run.inputs)
    off = np.asarray(computed).astype(np.float64) - run.gradient
    grad = np.abs(testing.in_magnitudes(off, run.magnitude)).max()
    slope, truth = testing.forward_mode(
        run.of_inputs, run.inputs, run.gradient, run.magnitude
    )
    jvp = np.abs(slope - truth).max()
    return {"grad": float(grad / jnp.finfo(dtype).eps), "jvp": float(jvp / _ULP)}


def check(
    case: Case, dtype: Any, device: jax.Device, allowance: float, dot: float
) -> Result:
    """Runs one case in every mode that it has.

    Args:
      case: the loss and its inputs.
      dtype: of the inputs of the loss.
      device: where to run.
      allowance: ulp of float32 to add to the bounds of the package.
      dot: the error of the device's dot product, in ulp of the absolute products.
    """
    run = _prepare(case, dtype, device)
    own_ulp = float(jnp.finfo(dtype).eps)
    allowance = allowance + dot * case.products
    slack = case.slack + allowance
    grad = (testing.gradient_bound(dtype) + slack * _ULP) / own_ulp
    if case.products and jnp.finfo(dtype).bits < 32:
        grad += _ROUNDED_SLOPES  # of the logits, before they are multiplied
    slope = 8 + slack
    if case.products and case.whole:
        # A sum's slope is of softmax − y, rounded once to the features' dtype.
        slope += 0.5 * own_ulp / _ULP
    errors = _value_errors(run) | _gradient_errors(run)
    return Result(
        name_of(device),
        case.name,
        jnp.dtype(dtype).name,
        errors,
        dict.fromkeys(errors, case.bound + allowance) | {"grad": grad, "jvp": slope},
    )


def name_of(device: jax.Device) -> str:
    """Returns the platform, number and kind of a device."""
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    return f"{device.platform}:{device.id}{kind}"


def allowance_of(device: jax.Device, measured: dict[str, float]) -> float:
    """Returns what a device's own functions add to the bounds, in ulp of float32.

    NaN, so that nothing passes, for a function that is further off than any that is in
    use: it is not an inaccuracy but a fault.
    """
    if any(not measured[name] <= _FAULT for name in _USES):
        return float("nan")
    if device.platform == "cpu":
        return 0.0
    return sum(
        uses * max(0.0, measured[name] - _REFERENCE[name])
        for name, uses in _USES.items()
    )


def check_laws() -> None:
    """Holds the laws themselves to finite differences, on the host.

    Raises:
      AssertionError: A law's gradient is not that of its value.
    """
    rng = np.random.default_rng(1)
    logits, soft = rng.standard_normal((3, 5)), rng.dirichlet(np.ones(5), 3)
    ids, probs = rng.integers(0, 5, 3), rng.dirichlet(np.ones(5), 3)
    options = {"label_smoothing": 0.2, "class_weights": np.arange(1, 6), "z_loss": 0.1}
    for labels in (ids, soft, 2 * soft):
        testing.assert_law_differentiates(testing.SOFTMAX_LAW, logits, labels)
        testing.assert_law_differentiates(
            testing.SOFTMAX_LAW, logits, labels, **options
        )
    testing.assert_law_differentiates(
        testing.SIGMOID_LAW, logits, soft, pos_weight=3.0, label_smoothing=0.1
    )
    testing.assert_law_differentiates(testing.NLL_LAW, logits, ids)
    testing.assert_law_differentiates(testing.CATEGORICAL_LAW, probs, soft)
    testing.assert_law_differentiates(testing.BINARY_LAW, probs, soft)


def find_devices(platform: str | None) -> list[jax.Device]:
    """Returns the devices of a platform, or of every platform that JAX has.

    Raises:
      LookupError: JAX has no device of that platform.
    """
    found: list[jax.Device] = []
    missing = []
    for name in PLATFORMS if platform is None else (platform,):
        try:
            found += jax.local_devices(backend=name)
        except RuntimeError as error:
            missing.append(str(error))
    if not found:
        seen = ", ".join(sorted({device.platform for device in jax.local_devices()}))
        raise LookupError(
            f"verify: JAX has no {platform or 'local'} device here, only: {seen}. "
            f"({'; '.join(missing)})"
        )
    return found


def verify(
    allowances: dict[jax.Device, tuple[float, float]], console: Console
) -> list[Result]:
    """Returns the result of every case, with a progress bar on the console.

    Args:
      allowances: the devices, and what each adds to the bounds, of heads by its dots.
      console: where the progress is shown.
    """
    check_laws()
    wide, narrow = cases(), cases(highest_margin=8.0)
    runs = [
        (case, dtype, device, *allowance)
        for device, allowance in allowances.items()
        for dtype in DTYPES
        for case in (narrow if dtype == jnp.float16 else wide)
    ]
    with Progress(console=console, transient=True) as progress:
        return [check(*run) for run in progress.track(runs, description="verifying")]


def show(results: Sequence[Result], console: Console) -> None:
    """Prints the table: a line a loss and dtype, with the mode nearest its bound."""
    table = Table(title=f"xent_jax {xent_jax.__version__}, jax {jax.__version__}")
    for heading in ("device", "loss", "dtype", "mode"):
        table.add_column(heading)
    for heading in ("error (ulp)", "bound (ulp)"):
        table.add_column(heading, justify="right")
    table.add_column("ok")
    for result in results:
        errors, bounds = result.errors, result.bounds
        failed = [mode for mode in errors if not errors[mode] <= bounds[mode]]
        for mode in failed or [result.worst]:
            table.add_row(
                result.device,
                result.loss,
                result.dtype,
                mode,
                f"{result.errors[mode]:.2f}",
                f"{result.bounds[mode]:.2f}",
                "[red]NO[/]" if failed else "yes",
            )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m xent_jax.verify",
        description="Check every loss of xent_jax on every device that JAX sees.",
    )
    parser.add_argument(
        "--platform", choices=PLATFORMS, help="only this one; an error if JAX lacks it"
    )
    options = parser.parse_args(arguments)
    console = Console()
    try:
        devices = find_devices(options.platform)
    except LookupError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False)
        return 2
    primitives = Table(title="float32 functions of each device, largest error in ulp")
    for heading in ("device", "exp", "log", "log1p", "dot", "allowance"):
        primitives.add_column(heading)
    allowances = {}
    for device in devices:
        measured = primitive_errors(device)
        own = allowance_of(device, measured)
        rough = max(0.0, measured["dot"] - _REFERENCE["dot"])
        allowances[device] = own, 0.0 if device.platform == "cpu" else rough
        names = (f"{measured[name]:.2f}" for name in ("exp", "log", "log1p", "dot"))
        primitives.add_row(name_of(device), *names, f"{own:.2f}")
    console.print(primitives)
    results = verify(allowances, console)
    show(results, console)
    wrong = sum(not result.ok for result in results)
    count = sum(len(result.errors) for result in results)
    console.print(
        f"{count} checks of values, gradients and forward mode, of every public "
        "function in three dtypes, against float64 on the host: "
        + (f"{wrong} out of bounds (NO)." if wrong else "all within their bounds.")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
