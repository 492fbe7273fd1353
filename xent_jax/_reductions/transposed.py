"""A linear function whose transpose is another program where that is known to be good.

JAX transposes a linear function by its equations. Where a whole is faster than its
equations one by one, as a kernel is, the transpose is written out, and chosen when it
is lowered: `jax.custom_derivatives.linear_call` would take it, but can be neither
mapped nor differentiated again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from xent_jax._reductions.lowering import Choose, Place, by_place, is_sharded

_linear = Primitive("transposed_by_place")
_linear.multiple_results = True


def transposed_by_place(
    linear: Callable[[Any, Any], Any], at: Choose
) -> Callable[[Any, Any], Any]:
    """Returns a linear function whose transpose is chosen when that is lowered.

    What is mapped by `jax.vmap`, transposed by a part of the tangents only, or
    differentiated by the constants goes by the equations of `linear`, and so do the
    derivatives of the transpose.

    Args:
      linear: of a pytree of constants and one of tangents, in which it is linear.
      at: returns the transpose for a place, a function of the constants and of the
        cotangents of the results, to those of the tangents; or `None` for that of
        `linear`. It closes over no traced array.
    """

    @functools.wraps(linear)
    def chosen(constants: Any, dots: Any) -> Any:
        leaves, structure = jax.tree.flatten(constants)
        dot_leaves = jax.tree.leaves(dots)
        if any(map(is_sharded, leaves + dot_leaves)):
            return linear(constants, dots)
        jaxpr, shape = jax.make_jaxpr(linear, return_shape=True)(constants, dots)
        count, results = len(leaves), jax.tree.structure(shape)

        def flat_at(place: Place) -> Callable[..., Any] | None:
            found = at(place)
            if found is None:
                return None
            return lambda known, bars: jax.tree.leaves(
                found(
                    jax.tree.unflatten(structure, known),
                    jax.tree.unflatten(results, bars),
                )
            )

        dots = _linear.bind(*leaves, *dot_leaves, jaxpr=jaxpr, count=count, at=flat_at)
        return jax.tree.unflatten(results, dots)

    return chosen


def _differentiate(
    primals: Any, tangents: Any, *, jaxpr: ClosedJaxpr, count: int, **options: Any
) -> tuple[Any, Any]:
    fixed = all(isinstance(tangent, ad.Zero) for tangent in tangents[:count])
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    if not fixed:
        return jax.jvp(jaxpr_as_fun(jaxpr), tuple(primals), tangents)
    linear = functools.partial(
        _linear.bind, *primals[:count], jaxpr=jaxpr, count=count, **options
    )
    return linear(*primals[count:]), linear(*tangents[count:])


def _transpose(
    bars: Any, *operands: Any, jaxpr: ClosedJaxpr, count: int, at: Choose
) -> list[Any]:
    moving = [ad.is_undefined_primal(operand) for operand in operands]
    known = [o for o, moves in zip(operands, moving, strict=True) if not moves]
    avals = [o.aval for o, moves in zip(operands, moving, strict=True) if moves]

    def transpose(known: list[Any], bars: list[Any]) -> Any:
        def linear(*dots: Any) -> Any:
            parts = {True: iter(dots), False: iter(known)}
            return jaxpr_as_fun(jaxpr)(*(next(parts[moves]) for moves in moving))

        return jax.linear_transpose(linear, *avals)(bars)

    if moving == [place >= count for place in range(len(moving))]:
        transpose = by_place(transpose, at, maps=False)
    found = iter(transpose(known, list(map(ad.instantiate_zeros, bars))))
    return [next(found) if moves else None for moves in moving]


def _batch(
    operands: Any, axes: Any, *, jaxpr: ClosedJaxpr, **options: Any
) -> tuple[Any, Any]:
    del options
    results = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


def _equations(*operands: Any, jaxpr: ClosedJaxpr, **options: Any) -> Any:
    del options
    return jaxpr_as_fun(jaxpr)(*operands)


_linear.def_impl(_equations)
_linear.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
ad.primitive_jvps[_linear] = _differentiate
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_equations, multiple_results=True))
