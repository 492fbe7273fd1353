"""Whether a program is compiled for one device: known only when it is lowered.

Tracing cannot see how an array under plain `jax.jit` is sharded, so a form that is fast
on one device, and would gather the shards of an array on several, is chosen there.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

_one_device = Primitive("one_device")


def one_device() -> jax.Array:
    """Returns whether arrays are whole: on one device, or a shard that is one's own.

    A constant of the compiled program, so that a `jax.lax.cond` of it costs nothing.
    `False` where nothing is lowered, and where arrays may be sharded: compiled for
    several devices, and not inside a `jax.shard_map` over all axes of the mesh.
    """
    return _one_device.bind()


def _lower(context: mlir.LoweringRuleContext) -> Any:
    axes = context.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        alone = set(axes.manual_axes) == set(axes.mesh.axis_names)
    elif isinstance(axes, mlir.ShardingContext):
        alone = axes.num_devices == 1
    else:  # jax.pmap
        alone = True
    return mlir.lower_fun(lambda: jax.numpy.asarray(alone), multiple_results=False)(
        context
    )


_one_device.def_impl(lambda: jax.numpy.asarray(False))
_one_device.def_abstract_eval(lambda: jax.core.ShapedArray((), jax.numpy.bool_))
mlir.register_lowering(_one_device, _lower)
