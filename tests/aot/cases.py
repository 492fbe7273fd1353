"""The losses to compile, those of logits with the traffic that none can go below.

The unit of traffic is a pass: one read or one write of an array of the logits' size.
Where rows are normalized, one pass has to end before the next can begin:

1. the maximum (or the sum, for probabilities) reads the logits,
2. the sum of exponentials reads them again, with the dense labels if there are any,
3. the gradient reads all of that once more and writes an array.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import xent_jax

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of logits and what it takes besides them.

    Attributes:
      name: of the case.
      function: the public function under test.
      loss: calls it with the inputs and the other arguments, and with options.
      others: the other arguments, of `arguments`' kinds.
    """

    name: str
    function: Callable[..., Any]
    loss: Callable[..., Any]
    others: tuple[str, ...]

    def inputs(
        self, shape: Shape, dtype: DTypeLike
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What makes the logits and what the gradient is taken by: the logits."""
        return (jax.ShapeDtypeStruct(shape, dtype),)

    def arguments(
        self, shape: Shape, dtype: DTypeLike
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of all arguments, for logits of the given ones."""
        rows, classes = shape
        kinds = {
            "class ids": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "row mask": jax.ShapeDtypeStruct((rows,), jnp.bool_),
            "row weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
            "class mask": jax.ShapeDtypeStruct((classes,), jnp.bool_),
            "class weights": jax.ShapeDtypeStruct((classes,), jnp.float32),
            "targets": jax.ShapeDtypeStruct(shape, dtype),
        }
        return (*self.inputs(shape, dtype), *(kinds[kind] for kind in self.others))

    def value_and_grad(self, *arguments: jax.Array) -> tuple[jax.Array, Any]:
        """The mean result and its gradient by the inputs."""
        inputs = len(arguments) - len(self.others)
        by = 0 if inputs == 1 else tuple(range(inputs))
        return jax.value_and_grad(lambda *a: mean(self.loss(*a)), by)(*arguments)


def mean(results: Any) -> jax.Array:
    """One number that every differentiable result counts in."""
    means = [
        jnp.mean(array)
        for array in jax.tree.leaves(results)
        if jnp.issubdtype(array.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.add, means)


@dataclasses.dataclass(frozen=True)
class LogitsCase(Case):
    """A loss of given logits.

    Attributes:
      passes: traffic of value and gradient of the mean loss, by the logits.
    """

    passes: int


_integer = xent_jax.softmax_cross_entropy_with_integer_labels
_dense = xent_jax.softmax_cross_entropy
_sigmoid = xent_jax.sigmoid_binary_cross_entropy
_linearized = xent_jax.linearized_softmax_cross_entropy
_nll = xent_jax.nll_loss
_categorical = xent_jax.categorical_cross_entropy
_binary = xent_jax.binary_cross_entropy

CASES = (
    # Class ids add no pass, and neither does an option: three reads and a write.
    LogitsCase("integer", _integer, _integer, ("class ids",), 4),
    LogitsCase(
        "integer-where",
        _integer,
        lambda x, y, keep: _integer(x, y, where=keep),
        ("class ids", "row mask"),
        4,
    ),
    LogitsCase(
        "integer-class-mask",
        _integer,
        lambda x, y, keep: _integer(x, y, where=jnp.broadcast_to(keep, x.shape)),
        ("class ids", "class mask"),
        4,
    ),
    LogitsCase(
        "integer-smoothing-z-loss",
        _integer,
        lambda x, y: _integer(x, y, label_smoothing=0.1, z_loss=1e-4),
        ("class ids",),
        4,
    ),
    LogitsCase(
        "integer-weights-smoothing",
        _integer,
        lambda x, y, w: _integer(x, y, class_weights=w, label_smoothing=0.1),
        ("class ids", "class weights"),
        4,
    ),
    # Dense labels are read with the sum and with the gradient: two passes more.
    LogitsCase("dense", _dense, _dense, ("targets",), 6),
    LogitsCase(
        "dense-smoothing-z-loss",
        _dense,
        lambda x, y: _dense(x, y, label_smoothing=0.1, z_loss=1e-4),
        ("targets",),
        6,
    ),
    LogitsCase(
        "dense-weights",
        _dense,
        lambda x, y, w: _dense(x, y, class_weights=w, label_smoothing=0.1),
        ("targets", "class weights"),
        6,
    ),
    LogitsCase("linearized", _linearized, _linearized, ("targets",), 6),
    LogitsCase("categorical", _categorical, _categorical, ("targets",), 6),
    # Nothing is normalized: each element is read once, with its label.
    LogitsCase("sigmoid", _sigmoid, _sigmoid, ("targets",), 3),
    LogitsCase(
        "sigmoid-smoothing-weight",
        _sigmoid,
        lambda x, y, w: _sigmoid(x, y, pos_weight=w, label_smoothing=0.1),
        ("targets", "class weights"),
        3,
    ),
    LogitsCase("binary", _binary, _binary, ("targets",), 3),
    # The gradient does not depend on the log-probabilities: one read, one write.
    LogitsCase("nll", _nll, _nll, ("class ids",), 2),
)


def _plain(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - label_logits


# The usual way to write the loss of class ids, which indexes an upcast copy: a case
# that must not pass.
PLAIN = dataclasses.replace(CASES[0], loss=_plain)
