"""What the rules of custom derivatives share."""

from collections.abc import Callable
from typing import Any

import jax


def unless_zero(tangent: Any) -> Any:
    """Returns a tangent, or `None` where it is known to be zero."""
    zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return None if zero else tangent


def known_tangents(tangents: Any) -> Any:
    """Returns a tree of tangents, `None` for those that are known to be zero."""
    zero = jax.custom_derivatives.SymbolicZero
    return jax.tree.map(
        unless_zero, tangents, is_leaf=lambda leaf: isinstance(leaf, zero)
    )


def tangent_of(
    function: Callable[..., Any], primals: Any, tangents: Any
) -> tuple[Any, Any]:
    """Returns `jax.jvp` of a function, `None` standing for an argument or no tangent.

    What has no tangent is a constant, so that nothing is computed for it.
    """
    values, structure = jax.tree.flatten(primals, is_leaf=lambda leaf: leaf is None)
    dots = structure.flatten_up_to(tangents)
    places = [place for place, dot in enumerate(dots) if dot is not None]

    def of_moving(*moving: jax.Array) -> Any:
        leaves = list(values)
        for place, value in zip(places, moving, strict=True):
            leaves[place] = value
        return function(*jax.tree.unflatten(structure, leaves))

    return jax.jvp(
        of_moving,
        tuple(values[place] for place in places),
        tuple(dots[place] for place in places),
    )
