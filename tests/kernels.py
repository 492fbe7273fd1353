"""What the tests of all TPU kernels of the head share: options, inputs, assertions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from heads import OPTIONS, cast, head_inputs, parted
from registry import NO_KERNEL

from xent_jax import verify
from xent_jax._checking.cases import cases
from xent_jax._forms.tpu.tiling import Tiling

TILING = Tiling(32, 16, 128, 0, interpret=True)
ALL = tuple(option for option in OPTIONS if option not in NO_KERNEL)
# Every option alone and with all others, and what of uniform targets goes together.
EACH = [
    (),
    *((name,) for name in ALL),
    ("label_smoothing", "class_weights"),
    ("label_smoothing", "class_mask"),
    ("bias", "where", "z_loss"),
    ALL,
]


def bfloat16_inputs(rng, shape, options=(), kernel="bfloat16", margin=0.0):
    """Returns inputs whose labels are ahead of all rivals by about a margin.

    The kernel has the digits of bfloat16, whatever its dtype.
    """
    rows, features, classes = shape
    inputs = head_inputs(rng, (rows,), features, classes, options)
    columns = inputs["kernel"][:, inputs["labels"]].T
    steps = columns / np.sum(columns**2, axis=1, keepdims=True)
    inputs["hidden"] = inputs["hidden"] + margin * steps
    inputs = cast(inputs, "bfloat16", "float32")
    narrow = inputs["kernel"].astype(jnp.bfloat16)
    return inputs | {"kernel": narrow.astype(jnp.dtype(kernel))}


def parts_of(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the kernels differentiate by, and the rest."""
    moving, rest = parted(inputs)
    if "class_weights" in moving:
        rest["class_weights"] = moving.pop("class_weights")
    return jax.tree.map(jnp.asarray, moving), rest


def assert_gradients(
    inputs: dict[str, Any],
    gradients: dict[str, Any],
    truth: oracle.LinearLoss,
    rtol: float,
) -> None:
    """Asserts dtypes, shapes, and the digits of half-precision numbers."""
    for name, gradient in gradients.items():
        wanted = np.asarray(getattr(truth, name), np.float64)
        assert gradient.dtype == inputs[name].dtype
        assert gradient.shape == wanted.shape
        size = max(np.linalg.norm(wanted), 1e-4)
        assert np.linalg.norm(np.asarray(gradient, np.float64) - wanted) <= rtol * size


def assert_verify_takes(name: str, programs: list[Any]) -> None:
    """Asserts that a case of verify passes, by kernels in bfloat16 alone."""
    (case,) = [case for case in cases() if case.name == name]
    device = jax.devices()[0]
    for dtype, taken in ((jnp.float32, False), (jnp.bfloat16, True)):
        assert verify.check(case, dtype, device, allowance=0.0, dot=0.0).ok
        assert bool(programs) == taken
