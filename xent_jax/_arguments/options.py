"""The table of options: what each is, how it is read, what it does to logits.

Losses of given logits and linear heads read their options by it, and meshes shard them
by it. A new option is a row of `OPTIONS`; one that changes the logits is a field and a
line of `LogitOptions` too, which both forms of a head and its gradients go by.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from xent_jax._arguments import checks
from xent_jax._arguments.arrays import Layout
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._reductions.softcap import quotient, softcapped


class Option(NamedTuple):
    """What an option is.

    Attributes:
      axes: `n` for one a row, `v` for one a class, none for a number.
      mask: whether it is boolean; real otherwise.
      number: whether a number may stand for one a row.
      highest: what a number may be at most.
      positive: whether a number must be more than 0, and not only 0 or more.
      least: the least number of a dtype, where not every normal one does.
      unused: the number that is as good as no option.
      none: whether `None` is, too.
      dropped: what stands in a row or a class that is dropped, whatever it holds.
    """

    axes: str = ""
    mask: bool = False
    number: bool = False
    highest: float = float("inf")
    positive: bool = False
    least: Callable[[jnp.dtype], float] | None = None
    unused: float | None = None
    none: bool = True
    dropped: float | None = None


def _least_softcap(dtype: jnp.dtype) -> float:
    """Returns the softcap below which capped logits would not be normal numbers."""
    return float(jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps)


OPTIONS = {
    "class_mask": Option("v", mask=True),
    "weights": Option("n"),
    "bias": Option("v", dropped=0),
    "softcap": Option(positive=True, least=_least_softcap),
    "temperature": Option("n", number=True, positive=True, unused=1, dropped=1),
    "class_weights": Option("v"),
    "label_smoothing": Option(highest=1, unused=0, none=False),
    "z_loss": Option(unused=0, none=False),
}

# The other arguments of heads by their axes: `d` stands for features and `k` for the
# ids of a row, which may be missing.
_ARRAYS = {
    "hidden": "nd",
    "kernel": "dv",
    "labels": "nk",
    "label_probs": "nk",
    "where": "n",
}
_TEACHER = "teacher_"


def axes_of(argument: str) -> str:
    """Returns the axes of an argument of a head, a teacher's being those of a head."""
    name = argument.removeprefix(_TEACHER)
    return OPTIONS[name].axes if name in OPTIONS else _ARRAYS[name]


class LogitOptions(NamedTuple):
    """What logits are changed by, in this order; `None` for what is not used.

    Each is a number, or has size 1 along the axes that it does not have, in the
    accumulation dtype.
    """

    bias: Any = None
    softcap: Any = None
    temperature: Any = None

    @classmethod
    def of(cls, options: dict[str, Any], axes: str) -> "LogitOptions":
        """Returns those of the options that have these axes."""
        return cls(
            **{
                name: options[name]
                for name in cls._fields
                if name in options and OPTIONS[name].axes == axes
            }
        )

    def each(self, change: Callable[[Any], Any], axes: str) -> "LogitOptions":
        """Returns the options, those with the axes changed."""
        return self._replace(
            **{name: change(value) for name, value in self._along(axes)}
        )

    def where(self, keep: jax.Array | None, axes: str) -> "LogitOptions":
        """Returns the options, those with the axes as dropped where `keep` is false."""
        return self._replace(
            **{name: where_kept(name, value, keep) for name, value in self._along(axes)}
        )

    def _along(self, axes: str) -> list[tuple[str, Any]]:
        return [
            (name, value)
            for name, value in self._asdict().items()
            if value is not None and OPTIONS[name].axes == axes
        ]


def merged(*parts: LogitOptions) -> LogitOptions:
    """Returns all options of the parts, of which one at most has each."""
    return LogitOptions(
        *(
            next((value for value in values if value is not None), None)
            for values in zip(*parts, strict=True)
        )
    )


def changed(logits: jax.Array, *parts: LogitOptions) -> jax.Array:
    """Returns what logits become by the options."""
    bias, softcap, temperature = merged(*parts)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcapped(logits, softcap)
    return logits if temperature is None else quotient(logits, temperature)


def where_kept(name: str, value: Any, keep: jax.Array | None) -> Any:
    """Returns an option, as dropped where `keep` is false; `None` keeps all."""
    dropped = OPTIONS[name].dropped
    if value is None or keep is None or dropped is None:
        return value
    return jnp.where(keep, value, dropped)


def read_options(
    layout: Layout, dtype: jnp.dtype, options: dict[str, ArrayLike | None]
) -> dict[str, jax.Array | None]:
    """Returns the options of a call by name, `None` for one that is not used.

    Args:
      layout: of the logits; a head's is that of the logits it would have.
      dtype: of the logits; numbers are of its accumulation dtype.
      options: by name, as the caller gave them.
    """
    return {
        name: read_option(layout, dtype, name, value) for name, value in options.items()
    }


def read_option(
    layout: Layout,
    dtype: jnp.dtype,
    name: str,
    value: Any,
    argument: str = "",
) -> jax.Array | None:
    """Returns an option that messages call `argument`, of its own name by default.

    It has size 1 along the axes of the layout that it does not have. A traced or device
    number is used as it is, as good as no option or not.
    """
    option, dtype = OPTIONS[name], accumulation_dtype(dtype)
    function, argument = layout.function, argument or name
    if value is None and option.none:
        return None
    if not option.axes or (option.number and np.ndim(checks.resolved(value)) == 0):
        return read_number(function, name, value, dtype, argument)
    if option.mask:
        array = checks.as_array(function, argument, value)
        checks.check_boolean(function, argument, array)
    else:
        array = checks.as_real(function, argument, value).astype(dtype)
    if option.axes == "v":
        shape, meaning = (layout.num_classes,), layout.class_meaning
        checks.check_shape(function, argument, array, shape, meaning)
        return layout.one_a_class(array)
    meaning = f"{'a number, or ' if option.number else ''}{layout.batch_meaning}"
    checks.check_shape(function, argument, array, layout.batch_shape, meaning)
    return layout.rows(layout.rows_beside(array))


def read_number(
    function: str, name: str, value: ArrayLike, dtype: jnp.dtype, argument: str = ""
) -> jax.Array | None:
    """Returns an option that is a number, in the dtype, as `read_option` does."""
    option, argument = OPTIONS[name], argument or name
    number = checks.read_number(
        function, argument, value, dtype, highest=option.highest, inside=option.positive
    )
    if isinstance(number, jax.Array):
        return number
    if option.unused is not None and number == option.unused:
        return None
    if option.least is not None and number < option.least(dtype):
        expected = f"be at least {option.least(dtype):.2g} for {dtype}"
        checks.fail(ValueError, function, argument, expected, repr(value))
    return jnp.asarray(number)
