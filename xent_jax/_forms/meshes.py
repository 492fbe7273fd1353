"""Linear heads on meshes of Explicit axes.

There the types of the arguments say how they are sharded. The rows follow the features
and the classes the kernel: each device takes its part of both under `jax.shard_map`,
and so no block of rows or classes is gathered.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from xent_jax._arguments import checks
from xent_jax._arguments.arrays import unwrapped_ids
from xent_jax._arguments.options import axes_of
from xent_jax._arguments.placement import resharded
from xent_jax._forms import head_arguments
from xent_jax._reductions.axis import AxisName

_OF_LOGITS = ("hidden", "kernel")


class Placement(NamedTuple):
    """How the arguments are sharded."""

    function: str
    sharded: jax.Array  # an argument whose type names the mesh
    rows: tuple[Any, ...]  # the mesh axes of every batch axis
    classes: Any  # the mesh axes of the classes

    @property
    def mesh(self) -> Any:
        """The mesh, an abstract one."""
        return jax.typeof(self.sharded).sharding.mesh

    @property
    def is_manual(self) -> bool:
        """Whether the call is in a `jax.shard_map` over other axes of the mesh."""
        return jax.sharding.AxisType.Manual in self.mesh.axis_types

    def spec(self, name: str) -> jax.P:
        """Returns how an argument is sharded."""
        mesh_axes = {"n": self.rows, "v": (self.classes,)}
        parts = (mesh_axes.get(axis, (None,)) for axis in axes_of(name))
        return jax.P(*(part for of_axis in parts for part in of_axis))


def placement_of(
    function: str, arguments: dict[str, Any], axis_names: dict[str, AxisName]
) -> Placement | None:
    """Returns how rows and classes are sharded, `None` where no type says so.

    Args:
      function: what messages call it.
      arguments: by name, as the caller gave them.
      axis_names: by argument, of a `jax.shard_map` that the call would have to be in.

    Raises:
      ValueError: the features are sharded, or rows and classes over the same mesh axis,
        or the call is in a `jax.shard_map` of other axes.
    """
    arrays = {
        name: checks.as_array(function, name, value)
        for name, value in arguments.items()
        if isinstance(value, jax.Array) or name in _OF_LOGITS
    }
    specs = {name: tuple(jax.typeof(a).sharding.spec) for name, a in arrays.items()}
    sharded = [name for name, spec in specs.items() if any(map(_names, spec))]
    if not sharded or not specs["hidden"] or len(specs["kernel"]) != 2:
        return None  # or an error that names the shape
    *rows, _ = specs["hidden"]
    placement = Placement(function, arrays[sharded[0]], tuple(rows), specs["kernel"][1])
    if not placement.is_manual:
        for argument, name in axis_names.items():
            checks.check_axis_name(function, argument, name)  # which there is none of
    for argument in _OF_LOGITS:
        expected = _unlike(placement, argument, specs[argument])
        if expected is not None:
            got = jax.P(*specs[argument])
            checks.fail(ValueError, function, argument, expected, got)
    return placement


def _unlike(placement: Placement, argument: str, spec: tuple[Any, ...]) -> str | None:
    """Returns what `hidden` or `kernel` must be and is not, `None` if it is."""
    whole = placement.spec(argument)
    if placement.is_manual and any(map(_names, spec)):
        return "not be sharded over Explicit axes inside a jax.shard_map of others"
    if spec != tuple(whole):
        gathered = f"jax.sharding.reshard({argument}, {whole}) gathers them"
        return f"not be sharded over its features ({gathered})"
    if argument == "kernel" and set(_names(placement.rows)) & set(_names(spec)):
        return "be sharded over other mesh axes than the rows of hidden"
    return None


def _names(spec: Any) -> tuple[str, ...]:
    """Returns the mesh axes that a part of a partition names."""
    if spec is None or isinstance(spec, str):
        return () if spec is None else (spec,)
    return tuple(name for part in spec for name in _names(part))


def apply(
    function: str,
    compute: Callable[..., Any],
    arguments: dict[str, Any],
    axis_names: dict[str, AxisName],
    *,
    read: Callable[..., Any] = head_arguments.read_head,
    results: Any = "n",
) -> Any:
    """Returns what is computed of the arguments, by each device on its part.

    Args:
      function: what messages call it.
      compute: takes the arguments and the `axis_names`.
      arguments: by name, as the caller gave them.
      axis_names: `class_axis_name` and, if the function has it, `batch_axis_name`, as
        the caller gave them.
      read: checks the arguments.
      results: the axes of the results, as of the arguments: a tree.
    """
    arguments = {name: checks.resolved(value) for name, value in arguments.items()}
    placement = placement_of(function, arguments, axis_names)
    if placement is None:
        return compute(**arguments, **axis_names)
    _check(function, read, arguments)
    arrays = _placed(placement, arguments)
    rest = {name: value for name, value in arguments.items() if name not in arrays}
    if placement.is_manual:
        return compute(**arrays, **rest, **axis_names)
    names = {"class_axis_name": _names(placement.classes) or None}
    rows = jax.P(*placement.rows)
    if "" in jax.tree.leaves(results):
        names["batch_axis_name"] = _names(placement.rows) or None
    return jax.shard_map(
        lambda arrays: compute(**arrays, **rest, **names),
        mesh=placement.mesh,
        in_specs=(
            {name: _part(placement, name, array) for name, array in arrays.items()},
        ),
        out_specs=jax.tree.map(lambda axes: rows if axes else jax.P(), results),
    )(arrays)


def _placed(placement: Placement, arguments: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns the arguments that are arrays, where the rows and classes are."""
    arguments = dict(arguments)
    if "labels" in arguments:
        arguments["labels"] = unwrapped_ids(arguments["labels"])
    arrays = {
        name: checks.as_real(placement.function, name, value)
        for name, value in arguments.items()
        if isinstance(value, jax.Array) or (axes_of(name) and np.ndim(value))
    }
    return {
        name: resharded(array, _part(placement, name, array), placement.sharded)
        for name, array in arrays.items()
    }


def _part(placement: Placement, name: str, array: jax.Array) -> jax.P:
    """Returns how an array is sharded, which may lack the last of its axes."""
    return jax.P(*placement.spec(name)[: array.ndim])


def _check(function: str, read: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Raises for bad arguments what is raised without a mesh: of their whole shapes."""
    shapes = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in arguments.items()
        if isinstance(value, jax.Array)
    }
    rest = {name: value for name, value in arguments.items() if name not in shapes}

    def check(**arrays: Any) -> None:
        read(function, **arrays, **rest)

    jax.eval_shape(check, **shapes)
