"""Static checks of the public functions: one form of message for every mistake.

A message names the function, the argument, what was expected and what came:
`nll_loss: labels must have shape (5,) (log_probs without axis -1), got (1,).`
A hint may follow: what to call instead, or how to convert.
Everything here looks at shapes, dtypes and concrete Python numbers only, so it costs
nothing under `jax.jit` and raises at trace time.
"""

import contextlib
import operator
from collections.abc import Sequence
from typing import Any, NoReturn, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Shape = tuple[int, ...]


def fail(
    kind: type[Exception],
    function: str,
    argument: str,
    expected: str,
    got: object,
    hint: str = "",
) -> NoReturn:
    """Raises `kind` with the one message form of the package, and a hint if any."""
    rest = f"; {hint}" if hint else ""
    raise kind(f"{function}: {argument} must {expected}, got {got}{rest}.")


def resolved(value: Any) -> Any:
    """Returns the array that a wrapper stands for, or the value itself.

    A wrapper, such as `flax.nnx.Param`, has `__jax_array__` and is no `jax.Array`, so
    whoever looks at types resolves it first.
    """
    while hasattr(value, "__jax_array__") and not isinstance(value, jax.Array):
        value = value.__jax_array__()
    return value


def as_array(function: str, argument: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array; a list or NumPy float64 gets JAX's default dtype."""
    try:
        return jnp.asarray(resolved(value))
    except (TypeError, ValueError, OverflowError) as error:
        hint = f"; give its {argument}" if hasattr(value, argument) else ""
        message = (
            f"{function}: {argument} must be an array of numbers, "
            f"got {type(value).__name__} ({error}){hint}."
        )
        raise TypeError(message) from error


def check_shape(
    function: str,
    argument: str,
    array: jax.Array,
    shape: Shape,
    meaning: str,
    hint: str = "",
) -> None:
    """Raises unless `array` has exactly `shape`: nothing is broadcast silently."""
    if array.shape != shape:
        expected = f"have shape {shape} ({meaning})"
        fail(ValueError, function, argument, expected, array.shape, hint)


def check_floating(function: str, argument: str, array: jax.Array) -> None:
    """Raises unless `array` holds floating-point numbers."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        fail(TypeError, function, argument, "have a floating dtype", array.dtype)


def check_class_ids(
    function: str, argument: str, array: jax.Array, hint: str = ""
) -> None:
    """Raises unless `array` holds integers; floats and booleans are not class ids."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        expected = "have an integer dtype (class ids)"
        fail(TypeError, function, argument, expected, array.dtype, hint)


def as_real(function: str, argument: str, value: ArrayLike) -> jax.Array:
    """Returns real numbers as an array; integers beyond 32 bits as floats.

    Without 64-bit types JAX would keep the low 32 bits of NumPy's integers.
    """
    value = resolved(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iu":
        limits = np.iinfo(np.int32)
        if np.any((value < limits.min) | (value > limits.max)):
            value = value.astype(np.float64)
    array = as_array(function, argument, value)
    check_real(function, argument, array)
    return array


def check_real(function: str, argument: str, array: jax.Array) -> None:
    """Raises unless `array` holds real numbers (floating, integer or boolean)."""
    dtype = array.dtype
    numeric = jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_
    if not numeric or jnp.issubdtype(dtype, jnp.complexfloating):
        fail(TypeError, function, argument, "have a real dtype", array.dtype)


def check_boolean(function: str, argument: str, array: jax.Array) -> None:
    """Raises unless `array` is a boolean mask."""
    if array.dtype != jnp.bool_:
        hint = f"give {argument} != 0"
        fail(TypeError, function, argument, "have dtype bool", array.dtype, hint)


def read_number(
    function: str,
    argument: str,
    value: ArrayLike,
    dtype: jnp.dtype,
    *,
    lowest: float = 0,
    highest: float = float("inf"),
    inside: bool = False,
) -> jax.Array | np.floating:
    """Returns a scalar of [lowest, highest] (inside: strictly) in the given dtype.

    A number is a NumPy scalar of that dtype, in which it has to lie there too: one that
    overflows, or that is to be positive and is below the normal numbers, which
    compilers take for 0, is refused.

    A traced or device value cannot be looked at without waiting for it: only its
    shape and dtype are checked, and it is used as it is.
    """
    value = resolved(value)
    if isinstance(value, jax.Array):
        if value.shape != ():
            fail(ValueError, function, argument, "be a scalar", f"shape {value.shape}")
        check_real(function, argument, value)
        return value.astype(dtype)
    given = np.asarray(value)
    if isinstance(value, int) and given.dtype == object:  # beyond 64 bits
        with contextlib.suppress(OverflowError):
            given = np.asarray(float(value))
    kinds = (jnp.integer, jnp.floating)
    if given.shape or not any(jnp.issubdtype(given.dtype, kind) for kind in kinds):
        fail(TypeError, function, argument, "be a real number", repr(value))
    number = dtype.type(narrowed(given, dtype))
    edges = "()" if inside else "[)" if np.isinf(highest) else "[]"
    expected = f"lie in {edges[0]}{lowest}, {highest}{edges[1]}"

    def lies(number: Any) -> bool:
        if inside:
            return bool(lowest < number < highest)
        return bool(lowest <= number <= highest and np.isfinite(number))

    if not lies(given[()]):
        fail(ValueError, function, argument, expected, repr(value))
    if not lies(number) or (inside and abs(number) < jnp.finfo(dtype).tiny):
        expected = f"{expected} as a normal number of {dtype}"
        fail(ValueError, function, argument, expected, repr(value))
    return number


def narrowed(numbers: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """Returns numbers in another dtype; what overflows is infinite, without warning."""
    with np.errstate(over="ignore", under="ignore"):
        return numbers.astype(dtype)


def read_count(function: str, argument: str, value: SupportsIndex) -> int:
    """Returns a static number of things, at least 1, as a Python integer."""
    value = resolved(value)
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        fail(TypeError, function, argument, "be an integer", repr(value))
    if count < 1:
        fail(ValueError, function, argument, "be at least 1", count)
    return count


def check_flag(function: str, argument: str, value: object) -> None:
    """Raises unless `value` is a Python boolean, which decides what is traced."""
    if not isinstance(value, bool):
        fail(TypeError, function, argument, "be True or False", repr(value))


def check_axis_name(function: str, argument: str, name: object) -> None:
    """Raises unless `name` is `None` or names mesh axes of this `jax.shard_map`."""
    if name is None:
        return
    names = name if isinstance(name, tuple) else (name,)
    if not all(isinstance(one, str) for one in names):
        expected = "be the name of a mesh axis or a tuple of them"
        fail(TypeError, function, argument, expected, repr(name))
    if not names or len(set(names)) != len(names):
        fail(ValueError, function, argument, "name different mesh axes", repr(name))
    # Not by what `jax.lax.axis_size` knows: the axes of a `jax.vmap` have names too.
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for one in names:
        if kinds.get(one) != jax.sharding.AxisType.Manual:
            expected = "name a mesh axis of the jax.shard_map that the call is in"
            fail(ValueError, function, argument, expected, repr(one))


def canonical_axes(
    function: str, axis: int | Sequence[int] | None, ndim: int
) -> tuple[int, ...]:
    """Returns the class axes as non-negative integers; `None` stands for all of them.

    Raises:
      TypeError: `axis` is neither an integer nor a sequence of integers.
      ValueError: an axis lies outside the array, or is named twice, or none is named.
    """
    try:
        named = tuple(range(ndim)) if axis is None else axis
        named = tuple(named) if isinstance(named, Sequence) else (named,)
        if any(isinstance(index, bool) for index in named):
            raise TypeError
        indices = [operator.index(index) for index in named]
    except TypeError:
        kind = "be an integer or a tuple of integers"
        fail(TypeError, function, "axis", kind, repr(axis))
    expected = f"name different axes of a {ndim}-dimensional array"
    axes = tuple(index % ndim if -ndim <= index < ndim else -1 for index in indices)
    if not axes or -1 in axes or len(set(axes)) != len(axes):
        fail(ValueError, function, "axis", expected, repr(axis))
    return axes
