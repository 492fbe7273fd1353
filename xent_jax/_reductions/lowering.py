"""Two programs for one function: which one is known only when it is lowered.

Tracing sees neither the platform nor, under plain `jax.jit`, how an array is sharded. A
form that is fast on one device, and would gather the shards of an array on several, is
therefore chosen when the program is lowered, and traced only then: no other platform
pays for it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.backend import get_default_device
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

CPU, TPU = "cpu", "tpu"


class Place(NamedTuple):
    """What a program is lowered for.

    Attributes:
      chip: `CPU`; a TPU's `jax.Device.device_kind`, or `TPU` where that is not known,
        as of a program that is exported; `None` for other platforms.
      whole: whether arrays are whole: in a program for one device, and inside a
        `jax.shard_map` over all axes of the mesh.
    """

    chip: str | None
    whole: bool


Choose = Callable[[Place], Callable[..., Any] | None]

_choice = Primitive("one_device_choice")
_choice.multiple_results = True


def on_one_device(
    default: Callable[..., Any], alone: Callable[..., Any], *, only_cpu: bool = True
) -> Callable[..., Any]:
    """Returns a function of arrays that is `alone` where arrays are whole.

    They are in a program for one device, and inside a `jax.shard_map` over all axes of
    the mesh. `default` runs where they may be sharded, where nothing is lowered, and on
    an axis of an Explicit mesh, on which types say that they are.

    Args:
      default: of pytrees of arrays, to a pytree; derivatives are of it.
      alone: the same function, written in another way. It closes over no traced array.
      only_cpu: whether `alone` is for a CPU only.
    """

    def at(place: Place) -> Callable[..., Any] | None:
        suits = place.whole and (place.chip == CPU or not only_cpu)
        return alone if suits else None

    return by_place(default, at)


def by_place(
    default: Callable[..., Any], at: Choose, *, maps: bool = True
) -> Callable[..., Any]:
    """Returns a function of arrays that is chosen when it is lowered.

    Args:
      default: of pytrees of arrays, to a pytree; derivatives are of it. It runs where
        nothing is lowered, and on an axis of an Explicit mesh.
      at: returns the same function, written in another way, for a place, or `None` for
        `default`. It closes over no traced array.
      maps: whether `jax.vmap` may be taken of it. If not, what is mapped is `default`,
        and so is what is differentiated, value and derivative at once.
    """

    @functools.wraps(default)
    def chosen(*operands: Any) -> Any:
        leaves, structure = jax.tree.flatten(operands)
        if any(map(is_sharded, leaves)):
            return default(*operands)

        def flat(function: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
            return lambda *leaves: jax.tree.leaves(
                function(*jax.tree.unflatten(structure, leaves))
            )

        def flat_at(place: Place) -> Callable[..., Any] | None:
            found = at(place)
            return None if found is None else flat(found)

        jaxpr, shape = jax.make_jaxpr(default, return_shape=True)(*operands)
        results = _choice.bind(*leaves, jaxpr=jaxpr, at=flat_at, maps=maps)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return chosen


def is_sharded(array: jax.Array) -> bool:
    """Whether an array is known to be sharded: on a mesh of Explicit axes."""
    return any(name is not None for name in jax.typeof(array).sharding.spec)


def _are_whole(context: mlir.LoweringRuleContext) -> bool:
    axes = context.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        return set(axes.manual_axes) == set(axes.mesh.axis_names)
    if isinstance(axes, mlir.ShardingContext):
        return axes.num_devices == 1
    return True  # jax.pmap


def _tpu(context: mlir.LoweringRuleContext) -> str:
    """Returns which TPU a program is lowered for, `TPU` if that is not known.

    A lowering is not told. It is the default device, which Pallas, too, takes for the
    chip that it makes a kernel for; what is exported may run on any.
    """
    device = get_default_device()
    exported = context.module_context.lowering_parameters.for_export
    return TPU if exported or device.platform != TPU else device.device_kind


def _lower(
    platform: str | None,
    context: mlir.LoweringRuleContext,
    *operands: Any,
    jaxpr: ClosedJaxpr,
    at: Choose,
    maps: bool,
) -> Any:
    del maps
    chip = _tpu(context) if platform == TPU else platform
    found = at(Place(chip, _are_whole(context)))
    function = jaxpr_as_fun(jaxpr) if found is None else found
    return mlir.lower_fun(function, multiple_results=True)(context, *operands)


def _batch(
    operands: Any, axes: Any, *, jaxpr: ClosedJaxpr, at: Choose, maps: bool
) -> tuple[Any, Any]:
    def mapped_at(place: Place) -> Callable[..., Any] | None:
        found = at(place)
        return None if found is None else jax.vmap(found, in_axes=tuple(axes))

    default = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes))
    batched = by_place(default, mapped_at) if maps else default
    results = batched(*operands)
    return results, [0] * len(results)


def _differentiate(
    primals: Any, tangents: Any, *, jaxpr: ClosedJaxpr, at: Choose, maps: bool
) -> tuple[Any, Any]:
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    results, dots = jax.jvp(jaxpr_as_fun(jaxpr), tuple(primals), tangents)
    if maps:
        results = _choice.bind(*primals, jaxpr=jaxpr, at=at, maps=maps)
    return results, dots


_choice.def_impl(lambda *operands, jaxpr, **_: jaxpr_as_fun(jaxpr)(*operands))
_choice.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
batching.primitive_batchers[_choice] = _batch
ad.primitive_jvps[_choice] = _differentiate
mlir.register_lowering(_choice, functools.partial(_lower, None))
for _platform in (CPU, TPU):
    mlir.register_lowering(
        _choice, functools.partial(_lower, _platform), platform=_platform
    )


def one_device() -> jax.Array:
    """Returns whether arrays are whole: on one device, or a shard that is one's own.

    A constant of the compiled program, so that a `jax.lax.cond` of it costs nothing.
    """
    choose = on_one_device(
        lambda: jax.numpy.asarray(False),
        lambda: jax.numpy.asarray(True),
        only_cpu=False,
    )
    return choose()
