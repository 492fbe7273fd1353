"""What is asked of a compiled program, whatever it was compiled for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aot.cases import LogitsCase
from aot.compilers import Compiled

MEBIBYTE = 2**20

# 268 million logits, as of 8192 tokens over a vocabulary of 32768.
SHAPE = (8192, 32768)
FEATURES = 1024


def logits_bytes(dtype: DTypeLike) -> int:
    """The size of the logits, and so of one pass."""
    return SHAPE[0] * SHAPE[1] * jnp.dtype(dtype).itemsize


def check_loss(
    compiled: Compiled,
    case: LogitsCase,
    dtype: DTypeLike,
    *,
    temp_bytes: int,
    extra_bytes: int,
) -> None:
    """Fails unless value and gradient cost what they must and no more.

    Args:
      compiled: `case.value_and_grad` at `SHAPE`.
      case: the loss.
      dtype: of the logits.
      temp_bytes: the most memory it may need beyond arguments and results.
      extra_bytes: the traffic it may have above the floor: numbers per row and per
        class, and what a chip's way to reduce a row costs.
    """
    module = compiled.module
    floor = case.passes * logits_bytes(dtype)
    # The gradient itself is an array of the logits' size and dtype, one.
    written = module.buffers("f32", SHAPE[0] * SHAPE[1])
    allowed = 1 if jnp.dtype(dtype) == jnp.float32 else 0
    problems = []
    if compiled.temp_bytes > temp_bytes:
        problems.append(f"needs {compiled.temp_bytes / MEBIBYTE:.2f} MiB")
    if len(written) > allowed:
        problems.append(f"writes {written}")
    if "scatter" in module.opcodes:
        problems.append("scatters")
    if module.traffic > floor + extra_bytes:
        largest = module.traffic_by_instruction.most_common(6)
        passes = module.traffic / logits_bytes(dtype)
        problems.append(f"takes {passes:.2f} passes, not {case.passes}: {largest}")
    if problems:
        raise AssertionError(f"{case.name}: " + "; ".join(problems))


def head_value_and_grad(loss: Callable) -> Callable:
    """Makes the value and gradients of a linear layer followed by a loss."""

    def mean(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(loss(hidden @ kernel, labels))

    return jax.value_and_grad(mean, argnums=(0, 1))


def head_arguments(dtype: DTypeLike) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments of `head_value_and_grad`, for logits of `SHAPE`."""
    rows, classes = SHAPE
    return (
        jax.ShapeDtypeStruct((rows, FEATURES), dtype),
        jax.ShapeDtypeStruct((FEATURES, classes), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


def check_head(compiled: Compiled, *, slack: float) -> None:
    """Fails unless a bfloat16 layer's logits and their gradient are all that is held.

    Args:
      compiled: `head_value_and_grad` of a loss, with bfloat16 arguments.
      slack: temporary memory above the two arrays, as a fraction of one.
    """
    module = compiled.module
    written = module.buffers("f32", SHAPE[0] * SHAPE[1])
    problems = []
    if written:
        problems.append(f"writes {written}")
    if compiled.temp_bytes > (2 + slack) * logits_bytes(jnp.bfloat16):
        problems.append(f"needs {compiled.temp_bytes / MEBIBYTE:.0f} MiB")
    if module.matmul_dtypes != {("bf16", "bf16")}:
        problems.append(f"multiplies {sorted(module.matmul_dtypes)}")
    if "scatter" in module.opcodes:
        problems.append("scatters")
    if problems:
        raise AssertionError("head: " + "; ".join(problems))
