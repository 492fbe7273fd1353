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
import registry
from jax.typing import DTypeLike
from registry import (
    BINARY,
    CATEGORICAL,
    DENSE,
    FUNCTIONS,
    IDS,
    LINEARIZED,
    NLL,
    SIGMOID,
    Sizes,
)

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of logits and what it takes besides them.

    Attributes:
      name: of the case.
      call: the public function, its options and how it is called. An option that is a
        number is a constant of the program.
      loss: takes the arguments in order, the inputs first.
    """

    name: str
    call: registry.Case
    loss: Callable[..., Any]

    @property
    def function(self) -> Callable[..., Any]:
        """The public function under test."""
        return self.call.row.call

    @property
    def by(self) -> int | tuple[int, ...]:
        """What the gradient is taken by: what the logits are, or are made of."""
        return (0, 1) if "kernel" in self.call.keys else 0

    def sizes(self, shape: Shape) -> Sizes:
        """How large the axes of the arguments are, for logits of a shape."""
        rows, classes = shape
        return Sizes((rows,), classes, ids=2)

    def shapes(self, shape: Shape, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of all arguments by keyword."""
        shapes = self.call.shapes(self.sizes(shape), jnp.dtype(dtype))
        return {word: one for word, one in shapes.items() if self.call.axes[word]}

    def arguments(
        self, shape: Shape, dtype: DTypeLike
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of all arguments, for logits of the given ones."""
        return tuple(self.shapes(shape, dtype).values())

    def value_and_grad(self, *arguments: jax.Array) -> tuple[jax.Array, Any]:
        """The mean result and its gradient by the inputs."""
        return jax.value_and_grad(lambda *a: mean(self.loss(*a)), self.by)(*arguments)


def loss_of(call: registry.Case, **static: Any) -> Callable[..., Any]:
    """Makes a function of the arguments in order; numbers are constants."""
    numbers = call.numbers
    words = [word for word in call.keys if word not in numbers]

    def loss(*arguments: jax.Array) -> Any:
        return call(dict(zip(words, arguments, strict=True)), **numbers, **static)

    return loss


def mean(results: Any) -> jax.Array:
    """One number that every differentiable result counts in."""
    means = [
        jnp.mean(array)
        for array in jax.tree.leaves(results)
        if jnp.issubdtype(array.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.add, means)


# Dense labels are read with the sum and with the gradient; an option adds no pass.
# Where nothing is normalized each element is read once, with its label; the gradient by
# log-probabilities does not depend on them.
PASSES = {
    IDS: 4,
    DENSE: 6,
    LINEARIZED: 6,
    CATEGORICAL: 6,
    SIGMOID: 3,
    BINARY: 3,
    NLL: 2,
}


@dataclasses.dataclass(frozen=True)
class LogitsCase(Case):
    """A loss of given logits.

    Attributes:
      passes: traffic of value and gradient of the mean loss, by the logits.
    """

    passes: int


def _case(name: str, function: str, *options: str) -> LogitsCase:
    call = registry.Case(FUNCTIONS[function], options)
    return LogitsCase(name, call, loss_of(call), PASSES[function])


def _with_class_mask(
    logits: jax.Array, labels: jax.Array, keep: jax.Array
) -> jax.Array:
    loss = FUNCTIONS[IDS].call
    return loss(logits, labels, where=jnp.broadcast_to(keep, logits.shape))


class _ClassMaskCase(LogitsCase):
    """Class ids with a mask of classes that all rows share."""

    def shapes(self, shape: Shape, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        mask = jax.ShapeDtypeStruct(shape[1:], jnp.bool_)
        return super().shapes(shape, dtype) | {"where": mask}


CASES = (
    _case("integer", IDS),
    _case("integer-where", IDS, "where"),
    _ClassMaskCase(
        "integer-class-mask",
        registry.Case(FUNCTIONS[IDS]),
        _with_class_mask,
        PASSES[IDS],
    ),
    _case("integer-smoothing-z-loss", IDS, "label_smoothing", "z_loss"),
    _case("integer-weights-smoothing", IDS, "label_smoothing", "class_weights"),
    _case("dense", DENSE),
    _case("dense-smoothing-z-loss", DENSE, "label_smoothing", "z_loss"),
    _case("dense-weights", DENSE, "label_smoothing", "class_weights"),
    _case("linearized", LINEARIZED),
    _case("categorical", CATEGORICAL),
    _case("sigmoid", SIGMOID),
    _case("sigmoid-smoothing-weight", SIGMOID, "pos_weight", "label_smoothing"),
    _case("binary", BINARY),
    _case("nll", NLL),
)
"""What the documentation's table shows."""

WITH_ALL = tuple(
    _case(f"{name}-all", name, *FUNCTIONS[name].unmasked()) for name in (IDS, DENSE)
)
"""A softmax loss with all of its options but masks."""


def _plain(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - label_logits


# The usual way to write the loss of class ids, which indexes an upcast copy: a case
# that must not pass.
PLAIN = dataclasses.replace(CASES[0], loss=_plain)
