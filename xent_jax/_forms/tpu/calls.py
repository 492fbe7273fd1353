"""How a TPU kernel that goes over tiles of classes is called."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xent_jax._forms.tpu.tiling import LANES, Tiling

# Of 32 bits where Python's would be of 64, with `jax_enable_x64`.
_ZERO = np.int32(0)
IN_MAIN_MEMORY = pl.BlockSpec(memory_space=pl.ANY)


class References:
    """The references of a kernel by the names of its operands."""

    def __init__(self, references: dict[str, Any]):
        self._references = references

    def __getattr__(self, name: str) -> Any:
        """Returns a reference, `None` for an operand that is not there."""
        return self._references.get(name)


class Operand(NamedTuple):
    """An array that a kernel reads, or the shape of one that it writes."""

    array: Any
    spec: pl.BlockSpec


def uninitialized(
    shape: tuple[int, ...], dtype: Any, reference: jax.Array, tiling: Tiling
) -> jax.Array:
    """Returns an array that nothing has been written to, which takes no time.

    It varies over a mesh as `reference` does.
    """
    return pl.pallas_call(
        lambda out_ref: None,
        out_shape=shape_like(jax.ShapeDtypeStruct(shape, dtype), reference),
        out_specs=IN_MAIN_MEMORY,
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0),
        interpret=tiling.interpret,
        name="xent_uninitialized",
    )()


def whole(array: Any) -> Operand:
    """Returns an operand that is in vector memory from the first tile to the last."""
    spec = pl.BlockSpec(
        array.shape, lambda j, place: (_ZERO, _ZERO), pipeline_mode=pl.Buffered(1)
    )
    return Operand(array, spec)


def tile_at(
    shape: tuple[int, int], when: str = "always", axis: int = 1
) -> pl.BlockSpec:
    """Returns where the block of a tile of classes is, but the first while not wanted.

    A block that stays the same from tile to tile is moved once, not for every tile.

    Args:
      shape: of a tile.
      when: it is wanted.
      axis: of the classes.
    """
    wanted = {
        "always": lambda place: 1,
        "not first": lambda place: 1 - place[0],
        "not last": lambda place: 1 - place[1],
        "last": lambda place: place[1],
    }[when]
    if axis == 0:
        return pl.BlockSpec(shape, lambda j, place: (j * wanted(place), _ZERO))
    return pl.BlockSpec(shape, lambda j, place: (_ZERO, j * wanted(place)))


def column_at(tiling: Tiling) -> pl.BlockSpec:
    """Returns where the numbers a row of a tile are."""
    return pl.BlockSpec((tiling.rows, LANES), lambda j, place: (_ZERO, j // LANES))


def shape_like(array: Any, reference: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the shape of an output that varies over a mesh as `reference` does."""
    kind, options = jax.typeof(reference), {}
    if hasattr(kind, "manual_axis_type"):
        options["manual_axis_type"] = kind.manual_axis_type
    elif getattr(kind, "vma", None):  # its name before jax 0.8
        options["vma"] = kind.vma
    return jax.ShapeDtypeStruct(array.shape, array.dtype, **options)


def call(
    body: Callable[[Any], None],
    tiling: Tiling,
    place: jax.Array,
    operands: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
    aliases: dict[str, str],
    cost: pl.CostEstimate,
    name: str,
) -> dict[str, jax.Array]:
    """Returns the outputs of a kernel that goes over the tiles of classes.

    Args:
      body: takes a namespace of references, `None` for an operand that is not there.
      tiling: static.
      place: int32[2], which the index maps see.
      operands: inputs, outputs and scratch memory by name.
      aliases: which input an output is written over.
      cost: what XLA is to know of it.
      name: of the kernel, in profiles.
    """
    inputs, outputs, scratch = operands
    names = ["place", *inputs, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        body(References(dict(zip(names, refs, strict=True))))

    like = inputs["hidden"].array
    classes = tiling.sizes(inputs["kernel"].array)[1]
    if tiling.interpret and classes % tiling.classes:
        # JAX's interpreters return an output over a ragged input as they pad it. No
        # result depends on what is in an output before.
        aliases = {}
    results = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiling.tiles(classes),),
            in_specs=[operand.spec for operand in inputs.values()],
            out_specs=[operand.spec for operand in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape_like(o.array, like) for o in outputs.values()],
        input_output_aliases={
            names.index(source): list(outputs).index(target)
            for source, target in aliases.items()
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=tiling.memory
        ),
        cost_estimate=cost,
        interpret=tiling.interpret,
        name=name,
    )(place, *(operand.array for operand in inputs.values()))
    return dict(zip(outputs, results, strict=True))
