"""Every function as one row: its arguments, and which of their axes a mesh may shard.

The tests of meshes run every row over every kind of mesh. A new function, or a new
argument, is a new row here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xent_jax

ROWS, FEATURES, CLASSES = 8, 6, 16
DATA, VOCAB = "data", "vocab"  # the mesh axes
MESH_SHAPES = {"rows": (8, 1), "classes": (1, 8), "both": (2, 4)}

IDS = 3  # of sparse targets, a row

# What an argument's axes are: rows (n), classes (v), features (d), ids of a row (k).
AXES = {
    "logits": "nv",
    "log_probs": "nv",
    "probs": "nv",
    "scores": "nv",
    "hidden": "nd",
    "kernel": "dv",
    "values": "n",
    "ids": "n",
    "indices": "nk",
    "label_indices": "nk",
    "id_probs": "nk",
    "label_probs": "nk",
    "targets": "nv",
    "teacher_logits": "nv",
    "teacher_hidden": "nd",
    "teacher_kernel": "dv",
    "teacher_bias": "v",
    "row_temperature": "n",
    "where": "n",
    "where_classes": "nv",
    "weights": "n",
    "class_mask": "v",
    "bias": "v",
    "class_weights": "v",
    "prior": "v",
    "pos_weight": "v",
    "pos_weight_full": "nv",
    "pos_weight_one": "",
    "label_smoothing": "",
    "z_loss": "",
    "softcap": "",
    "temperature": "",
}
# The others are named as the argument that they are given as.
ARGUMENT = {
    "ids": "labels",
    "label_indices": "labels",
    "id_probs": "probs",
    "row_temperature": "temperature",
    "targets": "labels",
    "where_classes": "where",
    "pos_weight_full": "pos_weight",
    "pos_weight_one": "pos_weight",
}
DISCRETE = ("ids", "indices", "label_indices", "where", "where_classes", "class_mask")


@dataclasses.dataclass(frozen=True, eq=False)
class MeshCase:
    """A function with what it is given.

    Attributes:
      name: of the test.
      function: the public function.
      inputs: keys of `AXES`; the first, or for a head the first two, say how rows and
        classes are sharded.
      result: the axes of what it returns.
      names: the options it takes that name a mesh axis.
      static: other options.
      constant: inputs without a derivative, or with one of 0.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    result: str
    names: tuple[str, ...]
    static: dict[str, Any]
    constant: tuple[str, ...]

    @property
    def leading(self) -> tuple[str, ...]:
        return self.inputs[: 2 if "kernel" in self.inputs else 1]

    @property
    def moving(self) -> tuple[str, ...]:
        """What derivatives are taken by."""
        return tuple(n for n in self.inputs if n not in (*DISCRETE, *self.constant))

    def axes(self) -> dict[str, str]:
        """Returns the axes of every input."""
        return {name: AXES[name] for name in self.inputs}

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the inputs."""
        return {name: _numbers()[name] for name in self.inputs}

    def __call__(self, arrays: dict[str, Any], **names: Any) -> Any:
        named = {ARGUMENT.get(name, name): array for name, array in arrays.items()}
        return self.function(**named, **self.static, **names)


@functools.cache
def _numbers() -> dict[str, np.ndarray]:
    """Returns an array for every key of `AXES`."""
    rng = np.random.default_rng(11)
    shapes = {"n": ROWS, "v": CLASSES, "d": FEATURES, "k": IDS}
    numbers: dict[str, Any] = {
        name: rng.uniform(0.2, 0.9, [shapes[axis] for axis in axes])
        for name, axes in AXES.items()
    }
    signed = ("logits", "scores", "hidden", "kernel", "bias")
    for name in (*signed, *(name for name in AXES if name.startswith("teacher"))):
        numbers[name] = rng.standard_normal(numbers[name].shape)
    numbers["log_probs"] = np.log(numbers["probs"])
    kept = CLASSES * 3 // 4
    floats = {name: np.float32(array) for name, array in numbers.items()}
    return floats | {
        "ids": np.int32(rng.integers(0, kept, ROWS)),
        "indices": np.int32(rng.integers(0, kept, (ROWS, IDS))),
        "label_indices": np.int32(rng.integers(0, kept, (ROWS, IDS))),
        "where": np.arange(ROWS) % 3 > 0,
        "where_classes": np.tile(np.arange(CLASSES) < kept, (ROWS, 1)),
        "class_mask": np.arange(CLASSES) < kept,
        "label_smoothing": np.float32(0.1),
        "z_loss": np.float32(0.05),
    }


def _case(
    function: str,
    inputs: str,
    result: str = "n",
    names: tuple[str, ...] = (),
    constant: tuple[str, ...] = (),
    **static: Any,
) -> MeshCase:
    keys = tuple(inputs.split())
    options = "-".join([*keys[1:], *(f"{k}={v}" for k, v in static.items())])
    return MeshCase(
        f"{function}-{options}",
        getattr(xent_jax, function),
        keys,
        result,
        names,
        static,
        constant,
    )


_OPTIONS = "label_smoothing class_weights z_loss"
_CLASSES, _BATCH = ("class_axis_name",), ("batch_axis_name",)
_HEAD = "hidden kernel ids"
_HEAD_OPTIONS = f"bias where weights class_mask {_OPTIONS} softcap"
_TEACHER = ("teacher_hidden", "teacher_kernel", "teacher_bias")
_SPARSE = "softmax_cross_entropy_with_sparse_targets"
_IDS = "softmax_cross_entropy_with_integer_labels"
CASES = [
    *(
        _case(function, f"logits {labels}{more}", names=_CLASSES)
        for function, labels in ((_IDS, "ids"), ("softmax_cross_entropy", "targets"))
        for more in ("", " class_weights", f" where {_OPTIONS}")
    ),
    *(
        _case(function, f"logits {labels} where_classes {_OPTIONS}", names=_CLASSES)
        for function, labels in ((_IDS, "ids"), ("softmax_cross_entropy", "targets"))
    ),
    *(
        _case(_SPARSE, f"logits indices id_probs{more}", names=_CLASSES)
        for more in ("", f" where {_OPTIONS}", f" where_classes {_OPTIONS}")
    ),
    *(
        _case(
            "softmax_kl_divergence",
            f"logits teacher_logits{more}",
            names=_CLASSES,
            constant=("teacher_logits",),
            direction=direction,
        )
        for direction in ("forward", "reverse")
        for more in ("", " where_classes")
    ),
    _case("softmax_statistics", "logits ids where_classes", names=_CLASSES),
    _case("nll_loss", "log_probs ids where class_weights"),
    _case("nll_loss", "log_probs ids where_classes"),
    _case("categorical_cross_entropy", "probs targets where"),
    _case("categorical_cross_entropy", "probs targets where_classes"),
    _case("binary_cross_entropy", "probs targets where_classes", "nv"),
    _case("sigmoid_binary_cross_entropy", "logits targets", "nv"),
    *(
        _case(
            "sigmoid_binary_cross_entropy",
            f"logits targets where_classes {weight} label_smoothing",
            "nv",
        )
        for weight in ("pos_weight", "pos_weight_full", "pos_weight_one")
    ),
    _case("linearized_softmax_cross_entropy", "logits targets", constant=("targets",)),
    _case("sinkhorn_targets", "scores where prior", "nv", _BATCH, num_iters=4),
    _case("sinkhorn_targets", "scores", "nv", _BATCH, num_iters=4, tol=0.1),
    _case(
        "sinkhorn_cross_entropy",
        "logits scores where prior temperature",
        names=_BATCH,
        constant=("scores", "prior"),
    ),
    _case("weighted_mean", "values weights", "", _BATCH),
    _case("weighted_mean", "values", "", _BATCH),
    _case("linear_softmax_cross_entropy", _HEAD, names=_CLASSES),
    _case("linear_softmax_cross_entropy", f"{_HEAD} {_HEAD_OPTIONS}", names=_CLASSES),
    *(
        _case(
            "linear_softmax_cross_entropy",
            f"{_HEAD}{more}",
            "",
            (*_CLASSES, *_BATCH),
            reduction=reduction,
        )
        for reduction in ("mean", "sum")
        for more in ("", f" {_HEAD_OPTIONS}")
    ),
    _case(
        "linear_softmax_statistics",
        f"{_HEAD} bias where class_mask softcap row_temperature",
        names=_CLASSES,
    ),
    *(
        _case(
            "linear_softmax_cross_entropy",
            f"hidden kernel label_indices label_probs row_temperature {_HEAD_OPTIONS}",
            "" if reduction else "n",
            (*_CLASSES, *_BATCH) if reduction else _CLASSES,
            **({"reduction": reduction} if reduction else {}),
        )
        for reduction in (None, "mean")
    ),
    *(
        _case(
            "linear_softmax_kl_divergence",
            f"hidden kernel {' '.join(_TEACHER)} bias where weights class_mask",
            "" if reduction else "n",
            (*_CLASSES, *_BATCH) if reduction else _CLASSES,
            constant=_TEACHER,
            **({"reduction": reduction} if reduction else {}),
        )
        for reduction in (None, "mean")
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def mesh_of(shape: tuple[int, int], kind: str) -> jax.sharding.Mesh:
    """Returns a mesh, data x vocab, of one kind of axes."""
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    return jax.make_mesh(shape, (DATA, VOCAB), axis_types=types)


def spec_of(axes: str, rows: Any = None, classes: Any = None) -> jax.P:
    """Returns the partition of an array of these axes."""
    return jax.P(*({"n": rows, "v": classes}.get(axis) for axis in axes))


def total_of(results: Any) -> jax.Array:
    """Returns a scalar whose derivative by every entry is another number."""
    squares = [
        jnp.sum(leaf * leaf)
        for leaf in jax.tree.leaves(results)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.add, squares)


def parted(case: MeshCase, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Returns what derivatives are taken by, and the rest."""
    moving = {name: arrays[name] for name in case.moving}
    return moving, {name: arrays[name] for name in arrays if name not in moving}


def derivatives(function: Callable[..., Any], moving: Any, rest: Any) -> Any:
    """Returns results, gradient of their total, and its tangent in a direction."""

    def total(moving: Any) -> Any:
        results = function(moving | rest)
        return total_of(results), results

    gradient, results = jax.grad(total, has_aux=True)(moving)
    directions = jax.tree.map(lambda array: jnp.cos(5 * array), moving)
    tangent = jax.jvp(lambda moving: total(moving)[0], (moving,), (directions,))[1]
    return results, gradient, tangent


@functools.cache
def expected_of(case: MeshCase) -> Any:
    """Returns what `derivatives` are without a mesh."""
    run = jax.jit(functools.partial(derivatives, case))
    return jax.device_get(run(*parted(case, case.arrays())))


def assert_same(computed: Any, expected: Any) -> None:
    """Asserts equality of two trees to a few roundings of their largest entry."""
    assert jax.tree.structure(computed) == jax.tree.structure(expected)
    for got, want in zip(*map(jax.tree.leaves, (computed, expected)), strict=True):
        assert got.dtype == want.dtype
        scale = max(1.0, np.abs(want).max(initial=0))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=3e-6 * scale)
