"""The fused linear head: calls to compile, and what their programs may cost.

Costs are stated for the head of a model with 128256 classes, and the unit of work is
one matrix product of the size of the layer: the layer itself is one, its two gradients
are one each. A scalar loss should take three and hold, beyond its arguments and
results, the kernel's gradient in float32 and a block of logits. A loss per row should
take four, since its backward pass makes the logits again, and hold a block of logits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import registry
from jax.typing import DTypeLike
from registry import FUNCTIONS

import xent_jax
from aot.cases import Case, Shape, loss_of, mean
from aot.compilers import Compiled, compile_for_mesh, compile_for_tpu, tpu_mesh
from aot.contracts import MEBIBYTE


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a head: rows of features that become rows of classes."""

    rows: int
    features: int
    classes: int

    @property
    def matmul_flops(self) -> int:
        """The work of one matrix product, the layer's."""
        return 2 * self.rows * self.features * self.classes

    @property
    def kernel_bytes(self) -> int:
        """The size of a bfloat16 kernel."""
        return 2 * self.features * self.classes

    @property
    def hidden_bytes(self) -> int:
        """The size of the features in bfloat16."""
        return 2 * self.rows * self.features

    def scalar_bytes(self, row_block: int) -> float:
        """What a scalar loss may hold: with a tenth for all else, the kernel's gradient
        and the logits of a block in float32.
        """
        return 1.1 * 4 * (self.features + row_block) * self.classes


# 8192 tokens through the head of Llama 3.2 1B: 4 GB of float32 logits.
LLAMA = Sizes(8192, 2048, 128256)
LONG = dataclasses.replace(LLAMA, rows=32768)
# The vocabulary of GPT-2, and as many rows, divide by nothing.
ODD = Sizes(1000, 768, 50257)


@dataclasses.dataclass(frozen=True)
class LinearCase(Case):
    """A function of a linear head.

    Attributes:
      features: the width of the rows.
      kernel_dtype: of the kernel; `None` for the dtype of the features.
    """

    features: int = LLAMA.features
    kernel_dtype: DTypeLike | None = None

    def sizes(self, shape: Shape) -> registry.Sizes:
        """How large the axes of the arguments are, for logits of a shape."""
        return super().sizes(shape)._replace(features=self.features)

    def shapes(self, shape: Shape, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of all arguments by keyword."""
        shapes = super().shapes(shape, dtype)
        if self.kernel_dtype is not None:
            kernel = shapes["kernel"].shape
            shapes["kernel"] = jax.ShapeDtypeStruct(kernel, self.kernel_dtype)
        return shapes


_ROW = FUNCTIONS[registry.HEAD]
OPTIONS = {"plain": (), **{option: (option,) for option in _ROW.options}}
"""Of a head, by name: every option by itself."""


def linear_case(
    reduction: str | None,
    option: str = "plain",
    without: tuple[str, ...] = (),
    **options: Any,
) -> Case:
    """The loss of one form, with a key of `OPTIONS` or "every", and more options.

    Args:
      reduction: of the form.
      option: what it is given.
      without: options that are left out of every one.
      **options: further keywords of the loss.
    """
    keys = _ROW.options if option == "every" else OPTIONS[option]
    keys = tuple(key for key in keys if key not in without)
    call = registry.Case(_ROW, keys, {"reduction": reduction})
    name = f"linear-{reduction or 'rows'}-{option}"
    return LinearCase(name, call, loss_of(call, **options))


def _plain_case(name: str, function: str) -> LinearCase:
    call = registry.Case(FUNCTIONS[function])
    return LinearCase(name, call, loss_of(call))


STATISTICS = _plain_case("linear-statistics", registry.HEAD_STATISTICS)
DIVERGENCE = _plain_case("linear-divergence", registry.HEAD_DIVERGENCE)


def gradient(case: Case, by: int | tuple[int, ...]) -> Callable[..., Any]:
    """The mean loss and its gradient by the features (0), the kernel (1) or both."""
    return jax.value_and_grad(lambda *a: mean(case.loss(*a)), by)


# What is computed, with the products that a scalar loss and a loss per row take for it.
PROGRAMS: Mapping[str, tuple[Callable[[Case], Callable[..., Any]], int, int]] = {
    "value": (lambda case: case.loss, 1, 1),
    "both-gradients": (lambda case: gradient(case, (0, 1)), 3, 4),
    "frozen-kernel": (lambda case: gradient(case, 0), 2, 3),
    "frozen-features": (lambda case: gradient(case, 1), 2, 3),
}


def arguments(
    case: Case, sizes: Sizes, **changes: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Arguments of bfloat16 features."""
    case = dataclasses.replace(case, features=sizes.features, **changes)
    return case.arguments((sizes.rows, sizes.classes), jnp.bfloat16)


def compiled_for(chip: str, case: Case, sizes: Sizes, **changes: Any) -> Compiled:
    """Returns value and gradients by hidden and kernel, compiled for a TPU."""
    return compile_for_tpu(
        chip, gradient(case, (0, 1)), *arguments(case, sizes, **changes)
    )


def compiled_without_kernels(change: str, case: Case, monkeypatch: Any) -> Compiled:
    """Returns the same for a v6e, but for a change that leaves TPU kernels out."""
    sizes = Sizes(64, 256, 1200)
    if change == "switch":
        monkeypatch.setenv("XENT_JAX_TPU_KERNELS", "0")
        return compiled_for("v6e", case, sizes)
    if change == "chip":
        return compiled_for("v4", case, sizes)
    assert change == "two devices"
    mesh = tpu_mesh((8,), ("data",))
    specs = jax.P("data", None), jax.P(), jax.P("data")
    function = gradient(case, (0, 1))
    return compile_for_mesh(mesh, function, arguments(case, sizes), specs)


def check(
    compiled: Compiled,
    sizes: Sizes,
    *,
    matmuls: int,
    temp_bytes: float,
    traffic: float = float("inf"),
    kernel_padding: int = 0,
) -> None:
    """Fails unless a program costs what it should and no more.

    Args:
      compiled: a head with bfloat16 features.
      sizes: of the head.
      matmuls: how many products of the layer's size it should do. Classes that the
        last block shares with the one before it, or rows that fill it up, may add to
        them in proportion.
      temp_bytes: the most memory it may need beyond arguments and results.
      traffic: the most bytes it may move.
      kernel_padding: the columns that a compiler may add to a copy of the kernel.
    """
    module = compiled.module
    problems = []
    done = module.matmul_flops / sizes.matmul_flops
    if not 0.99 * matmuls <= done <= 1.05 * matmuls:
        problems.append(f"does {done:.3f} products of the layer's size, not {matmuls}")
    if module.matmul_dtypes != {("bf16", "bf16")}:
        problems.append(f"multiplies {sorted(module.matmul_dtypes)}")
    # Nothing is larger than the larger operand: neither logits nor a padded kernel.
    largest = sizes.features * max(sizes.rows, sizes.classes + kernel_padding)
    if written := module.buffers(None, largest + 1):
        problems.append(f"writes {written}")
    if compiled.temp_bytes > temp_bytes:
        problems.append(f"needs {compiled.temp_bytes / MEBIBYTE:.1f} MiB")
    if module.traffic > traffic:
        most = module.traffic_by_instruction.most_common(6)
        problems.append(f"moves {module.traffic / 1e9:.1f} GB: {most}")
    if "scatter" in module.opcodes:
        problems.append("scatters")
    if problems:
        raise AssertionError("; ".join(problems))


def _unfused(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(xent_jax.softmax_cross_entropy_with_integer_labels(logits, labels))


# The same loss the usual way: a case that must not pass.
UNFUSED = LinearCase("unfused", registry.Case(_ROW), _unfused)
