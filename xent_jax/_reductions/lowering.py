"""Two programs for one function: which one is known only when it is lowered.

Tracing sees neither the platform nor, under plain `jax.jit`, how an array is sharded. A
form that is fast on one device, and would gather the shards of an array on several, is
therefore chosen when the program is lowered, and traced only then: no other platform
pays for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.backend import get_default_device
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

CPU, TPU = "cpu", "tpu"

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

    def alone_on(chip: str | None) -> Callable[..., Any] | None:
        return alone if chip == CPU or not only_cpu else None

    return on_one_chip(default, alone_on)


def on_one_chip(
    default: Callable[..., Any],
    alone_on: Callable[[str | None], Callable[..., Any] | None],
    *,
    maps: bool = True,
) -> Callable[..., Any]:
    """Like `on_one_device`, with a function that depends on the chip.

    Args:
      default: as of `on_one_device`.
      alone_on: returns what is `alone` on a chip, `None` for `default`. A chip is
        `CPU`, or a TPU's `jax.Device.device_kind`, or `None`: another platform, or a
        program that is exported, or of which it is not known what it will run on.
      maps: whether `jax.vmap` may be taken of `alone`. If not, what is mapped is
        `default`.
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

        def flat_on(chip: str | None) -> Callable[..., Any] | None:
            alone = alone_on(chip)
            return None if alone is None else flat(alone)

        jaxpr, shape = jax.make_jaxpr(default, return_shape=True)(*operands)
        results = _choice.bind(*leaves, jaxpr=jaxpr, alone_on=flat_on, maps=maps)
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


def _tpu(context: mlir.LoweringRuleContext) -> jax.Device | None:
    """Returns the TPU that a program is lowered for, `None` if that is not known.

    A program for one device names it. In a `jax.shard_map` nothing does, and it is the
    default device, which Pallas, too, takes for the chip that it makes a kernel for.
    """
    module = context.module_context
    if module.lowering_parameters.for_export:
        return None
    devices = getattr(module.axis_context, "device_assignment", None)
    device = devices[0] if devices else get_default_device()
    return device if device.platform == TPU else None


def _lower(
    platform: str | None,
    context: mlir.LoweringRuleContext,
    *operands: Any,
    jaxpr: ClosedJaxpr,
    alone_on: Callable[[str | None], Callable[..., Any] | None],
    maps: bool,
) -> Any:
    del maps
    alone, device = None, None
    if _are_whole(context):
        device = _tpu(context) if platform == TPU else None
        chip = device.device_kind if device is not None else None
        alone = alone_on(CPU if platform == CPU else chip)
    function = jaxpr_as_fun(jaxpr) if alone is None else alone
    lower = mlir.lower_fun(function, multiple_results=True)
    if alone is None or device is None:
        return lower(context, *operands)
    with jax.default_device(device):
        return lower(context, *operands)


def _batch(
    operands: Any,
    axes: Any,
    *,
    jaxpr: ClosedJaxpr,
    alone_on: Callable[[str | None], Callable[..., Any] | None],
    maps: bool,
) -> tuple[Any, Any]:
    def mapped_on(chip: str | None) -> Callable[..., Any] | None:
        alone = alone_on(chip)
        return None if alone is None else jax.vmap(alone, in_axes=tuple(axes))

    default = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes))
    batched = on_one_chip(default, mapped_on) if maps else default
    results = batched(*operands)
    return results, [0] * len(results)


def _differentiate(
    primals: Any, tangents: Any, *, jaxpr: ClosedJaxpr, **options: Any
) -> tuple[Any, Any]:
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    _, dots = jax.jvp(jaxpr_as_fun(jaxpr), tuple(primals), tangents)
    return _choice.bind(*primals, jaxpr=jaxpr, **options), dots


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
