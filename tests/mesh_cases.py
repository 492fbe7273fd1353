"""Cases for meshes of every kind: which axes of their arguments may be sharded.

They are made from the rows of `registry.py`, so that a new function or a new option is
among them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from registry import ASSIGNMENT, DENSE, HEAD, IDS, Case

ROWS, FEATURES, CLASSES = 8, 6, 16
DATA, VOCAB = "data", "vocab"  # the mesh axes
SHARDED = {"rows": (DATA, None), "classes": (None, VOCAB), "both": (DATA, VOCAB)}
SIZES = registry.Sizes((ROWS,), CLASSES, FEATURES)
# Of the others, what a mesh does to them with options it does without.
PLAIN = (IDS, HEAD)


def _options_of(row: registry.Function) -> list[tuple[str, ...]]:
    """Returns none of the options, all of them, and what has the classes alone."""
    alone = [
        (key,)
        for key in row.options
        if registry.ARGUMENTS[key].axes == "v" and row.name in (IDS, DENSE)
    ]
    return list(dict.fromkeys([(), *alone, *row.every()]))


CASES = [
    Case(row, options, form)
    for row in registry.ROWS
    for options in _options_of(row)
    for form in row.forms
]


def marks_of(case: Case) -> list:
    """Returns the marks of a test of the case."""
    most = case.options == case.row.every()[-1]
    none = case.row.key in PLAIN and not case.options
    few = most or none or not case.row.options
    kept = few or (case.row.name == ASSIGNMENT and "tol" in case.static)
    return [] if kept else [pytest.mark.exhaustive]


def each(cases: list[Case]) -> Any:
    """Returns the mark of a test of every one of the cases."""
    parameters = [pytest.param(c, id=c.name, marks=marks_of(c)) for c in cases]
    return pytest.mark.parametrize("case", parameters)


every_case = each(CASES)


@functools.cache
def arrays_of(case: Case) -> dict[str, np.ndarray]:
    """Returns the arguments by keyword, in float32."""
    return registry.narrow(case.draw(np.random.default_rng(11), SIZES))


def leading(case: Case) -> tuple[str, ...]:
    """Returns the keywords of what says how rows and classes are sharded."""
    return tuple(case.keys)[: 2 if "kernel" in case.keys else 1]


def parted(case: Case, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Returns what derivatives are taken by, and the rest."""
    return registry.parted(case.moving, arrays)


def mesh_of(shape: tuple[int, int], kind: str) -> jax.sharding.Mesh:
    """Returns a mesh, data x vocab, of one kind of axes."""
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    return jax.make_mesh(shape, (DATA, VOCAB), axis_types=types)


def spec_of(axes: str, rows: Any = None, classes: Any = None) -> jax.P:
    """Returns the partition of an array of these axes."""
    return jax.P(*({"n": rows, "v": classes}.get(axis) for axis in axes))


def total_of(results: Any) -> jax.Array:
    """Returns a scalar whose derivative by every entry is another number."""
    squares = [
        jnp.sum(leaf * leaf)
        for leaf in jax.tree.leaves(results)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.add, squares)


def derivatives(function: Callable[..., Any], moving: Any, rest: Any) -> Any:
    """Returns results, gradient of their total, and its tangent in a direction."""

    def total(moving: Any) -> Any:
        results = function(moving | rest)
        return total_of(results), results

    gradient, results = jax.grad(total, has_aux=True)(moving)
    directions = jax.tree.map(lambda array: jnp.cos(5 * array), moving)
    tangent = jax.jvp(lambda moving: total(moving)[0], (moving,), (directions,))[1]
    return results, gradient, tangent


@functools.cache
def expected_of(case: Case) -> Any:
    """Returns what `derivatives` are without a mesh."""
    run = jax.jit(functools.partial(derivatives, case))
    return jax.device_get(run(*parted(case, arrays_of(case))))


def assert_same(computed: Any, expected: Any) -> None:
    """Asserts equality of two trees to a few roundings of their largest entry."""
    assert jax.tree.structure(computed) == jax.tree.structure(expected)
    for got, want in zip(*map(jax.tree.leaves, (computed, expected)), strict=True):
        assert got.dtype == want.dtype
        scale = max(1.0, np.abs(want).max(initial=0))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=3e-6 * scale)
