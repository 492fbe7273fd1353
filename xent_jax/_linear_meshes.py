"""Linear heads on meshes of Explicit axes.

There the types of the arguments say how they are sharded. The rows follow the features
and the classes the kernel: each device takes its part of both under `jax.shard_map`,
and so no block of rows or classes is gathered.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from xent_jax import _arguments, _checks, _linear_arguments
from xent_jax._reductions.axis import AxisName

# By the axes that an argument has.
_OF_ROWS = ("labels", "where", "weights")
_OF_CLASSES = ("bias", "class_mask", "class_weights")


class Placement(NamedTuple):
    """How the arguments are sharded."""

    function: str
    mesh: Any
    rows: tuple[Any, ...]  # the mesh axes of every batch axis
    classes: Any  # the mesh axes of the classes

    def spec(self, name: str) -> jax.P:
        """Returns how an argument is sharded."""
        if name == "hidden":
            return jax.P(*self.rows, None)
        if name == "kernel":
            return jax.P(None, self.classes)
        if name in _OF_ROWS:
            return jax.P(*self.rows)
        return jax.P(self.classes) if name in _OF_CLASSES else jax.P()


def placement_of(
    function: str, hidden: Any, kernel: Any, axis_names: dict[str, AxisName]
) -> Placement | None:
    """Returns how rows and classes are sharded, `None` where no type says so.

    Args:
      function: what messages call it.
      hidden: as the caller gave it.
      kernel: as the caller gave it.
      axis_names: by argument, of a `jax.shard_map` that the call would have to be in.

    Raises:
      ValueError: the features are sharded, or rows and classes over the same mesh axis,
        or the call is in a `jax.shard_map` of other axes.
    """
    mesh, specs = None, {}
    for argument, value in (("hidden", hidden), ("kernel", kernel)):
        kind = jax.typeof(_checks.as_array(function, argument, value))
        spec = tuple(kind.sharding.spec)
        specs[argument] = spec + (None,) * (len(kind.shape) - len(spec))
        if any(name is not None for name in spec):
            mesh = kind.sharding.mesh
    if mesh is None or not specs["hidden"] or len(specs["kernel"]) != 2:
        return None  # or an error that names the shape
    if jax.sharding.AxisType.Manual in mesh.axis_types:
        expected = "not be sharded over Explicit axes inside a jax.shard_map of others"
        for argument, spec in specs.items():
            if any(name is not None for name in spec):
                _checks.fail(ValueError, function, argument, expected, jax.P(*spec))
    for argument, name in axis_names.items():
        _checks.check_axis_name(function, argument, name)  # which there is none of
    *rows, of_hidden = specs["hidden"]
    of_kernel, classes = specs["kernel"]
    for argument, features in (("hidden", of_hidden), ("kernel", of_kernel)):
        if features is not None:
            expected = "not be sharded over its features"
            got = jax.P(*specs[argument])
            _checks.fail(ValueError, function, argument, expected, got)
    if set(_names(tuple(rows))) & set(_names(classes)):
        expected = "be sharded over other mesh axes than the rows of hidden"
        got = jax.P(*specs["kernel"])
        _checks.fail(ValueError, function, "kernel", expected, got)
    return Placement(function, mesh, tuple(rows), classes)


def _names(spec: Any) -> tuple[str, ...]:
    """Returns the mesh axes that a part of a partition names."""
    if spec is None or isinstance(spec, str):
        return () if spec is None else (spec,)
    return tuple(name for part in spec for name in _names(part))


def mapped(
    placement: Placement,
    compute: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    total: bool = False,
) -> Any:
    """Returns what is computed of the arguments, by each device on its part.

    Args:
      placement: how they are sharded.
      compute: takes the arguments, `class_axis_name` and, if `total`, also
        `batch_axis_name`.
      arguments: by name, as the caller gave them.
      total: whether the result is a scalar; otherwise it is one, or more, a row.
    """
    arguments = {name: _checks.resolved(value) for name, value in arguments.items()}
    _check(placement.function, arguments)
    of_axes = ("hidden", "kernel", *_OF_ROWS, *_OF_CLASSES)
    unwrapped = {"labels": _arguments.unwrapped_ids(arguments["labels"])}
    arrays = {
        name: jax.sharding.reshard(
            _checks.as_real(placement.function, name, value),
            jax.sharding.NamedSharding(placement.mesh, placement.spec(name)),
        )
        for name, value in (arguments | unwrapped).items()
        if isinstance(value, jax.Array) or (name in of_axes and value is not None)
    }
    rest = {name: value for name, value in arguments.items() if name not in arrays}
    names = {"class_axis_name": _names(placement.classes) or None}
    if total:
        names["batch_axis_name"] = _names(placement.rows) or None
    return jax.shard_map(
        lambda arrays: compute(**arrays, **rest, **names),
        mesh=placement.mesh,
        in_specs=({name: placement.spec(name) for name in arrays},),
        out_specs=jax.P() if total else jax.P(*placement.rows),
    )(arrays)


def _check(function: str, arguments: dict[str, Any]) -> None:
    """Raises for bad arguments what is raised without a mesh: of their whole shapes."""
    others = ("label_smoothing", "z_loss")
    read = {name: value for name, value in arguments.items() if name not in others}
    shapes = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in read.items()
        if isinstance(value, jax.Array)
    }
    rest = {name: value for name, value in read.items() if name not in shapes}

    def check(**arrays: Any) -> None:
        _linear_arguments.read_head(function, **arrays, **rest)

    jax.eval_shape(check, **shapes)
