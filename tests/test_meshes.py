"""Rows and classes sharded under plain `jax.jit`, on Auto and on Explicit meshes."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
import registry
from aot import hlo
from registry import Case

ROWS, CLASSES = 8, 16
LOSSES = (registry.IDS, registry.DENSE)
OTHERS = (
    registry.SIGMOID,
    registry.NLL,
    registry.CATEGORICAL,
    registry.BINARY,
    registry.LINEARIZED,
)


KINDS = ("Auto", "Explicit")
LARGE = pytest.mark.exhaustive


def _shardings():
    """Yields every loss with options and a mask, sharded over both axes and over each.

    Both axes have all there is to go wrong; each alone, on one kind of mesh, tells what
    did. On every version of JAX an option runs with all the others, alone on one.
    """
    for index, (case, alone) in enumerate(_cases()):
        once = [pytest.mark.once, LARGE] if alone else []
        for spec, kind, marks in (
            ("both", "Auto", []),
            ("both", "Explicit", []),
            ("rows", KINDS[index % 2], [LARGE]),
            ("classes", KINDS[1 - index % 2], [LARGE]),
        ):
            name = f"{case.name}-{spec}-{kind}"
            yield pytest.param(case, spec, kind, id=name, marks=[*once, *marks])


def _cases():
    """Yields every loss with options and a mask, and whether one option is alone."""
    for name in (*LOSSES, *OTHERS):
        row = registry.FUNCTIONS[name]
        options = row.unmasked()
        alone = [(), *((key,) for key in options)] if name in LOSSES else []
        masks = [(), *((key,) for key in row.options if key in registry.MASKS)]
        for some, mask in itertools.product([*alone, options], masks):
            yield Case(row, (*mask, *some)), len(some) == 1 and name in LOSSES


SPECS = {"rows": ("a", None), "classes": (None, "a"), "both": ("a", "b")}


class Program(NamedTuple):
    """A loss of fixed rows: its arguments, and value, gradient and tangent of its sum.

    Attributes:
      arguments: logits (or what stands for them), labels and masks by keyword, and a
        direction.
      run: jitted, of arguments and direction.
    """

    arguments: tuple[dict[str, np.ndarray], np.ndarray]
    run: Any

    def on(self, mesh, spec) -> tuple[Any, hlo.Module]:
        """Returns the results with all arrays sharded, and the compiled program."""
        full, row = jax.P(*spec), jax.P(spec[0])

        def put(array):
            return jax.device_put(jnp.asarray(array), full if array.ndim > 1 else row)

        with jax.set_mesh(mesh):
            arguments = jax.tree.map(put, self.arguments)
            compiled = self.run.lower(*arguments).compile()
            results = compiled(*arguments)
        sharding = jax.NamedSharding(mesh, full)
        assert results[1].sharding.is_equivalent_to(sharding, 2)
        return jax.device_get(results), hlo.parse(compiled.as_text())


def program(case, rows, classes) -> Program:
    rng = np.random.default_rng(8)
    arrays = registry.narrow(case.draw(rng, registry.Sizes((rows,), classes)))
    direction = rng.standard_normal((rows, classes)).astype(np.float32)
    given = ("where", *Case(case.row).keys)
    of_rows = {word: arrays.pop(word) for word in given if word in arrays}
    first = next(iter(case.keys))

    @jax.jit
    def run(of_rows, direction):
        def total(inputs):
            return case(arrays | of_rows | {first: inputs}).sum()

        inputs = of_rows[first]
        value, gradient = jax.value_and_grad(total)(inputs)
        return value, gradient, jax.jvp(total, (inputs,), (direction,))[1]

    return Program((of_rows, direction), run)


@functools.cache
def program_and_results(case, rows=ROWS, classes=CLASSES):
    """Returns a program and what it gives on one device."""
    of = program(case, rows, classes)
    return of, jax.device_get(of.run(*of.arguments))


def check(of, results, expected):
    value, gradient, tangent = results
    np.testing.assert_allclose(value, expected[0], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)
    # A sum of many products of either sign.
    size = np.abs(of.arguments[-1] * expected[1]).sum()
    np.testing.assert_allclose(tangent, expected[2], rtol=0, atol=1e-6 * size)


@pytest.mark.once
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", [*LOSSES, registry.NLL, registry.LINEARIZED])
@pytest.mark.parametrize(("shards", "classes"), [(8, 2048), (8, 2560), (4, 8192)])
def test_many_classes_over_any_number_of_shards(shards, classes, name, kind):
    """2560 classes are 20 blocks of 128: not as many for each of 8 shards."""
    types = (getattr(jax.sharding.AxisType, kind),)
    devices = jax.devices()[:shards]
    mesh = jax.make_mesh((shards,), ("a",), axis_types=types, devices=devices)
    row = registry.FUNCTIONS[name]
    case = Case(row, row.unmasked())
    loss, expected = program_and_results(case, rows=3, classes=classes)
    results, module = loss.on(mesh, (None, "a"))
    check(loss, results, expected)
    assert module.collective_kinds == {"all-reduce"}


@pytest.mark.parametrize(("case", "spec", "kind"), list(_shardings()))
def test_sharded_is_unsharded(case, spec, kind):
    shape = (8, 1) if spec == "rows" else (1, 8) if spec == "classes" else (2, 4)
    names = ("a", "b") if spec != "classes" else ("b", "a")
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh(shape, names, axis_types=types)
    loss, expected = program_and_results(case)
    results, module = loss.on(mesh, SPECS[spec])
    check(loss, results, expected)
    assert module.collective_kinds == {"all-reduce"}


LATER = ("sparse_targets", "kl_divergence", "statistics", "label_probs")


@pytest.mark.once
@pytest.mark.exhaustive
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("how", mesh_cases.SHARDED)
@mesh_cases.each([c for c in mesh_cases.CASES if any(word in c.name for word in LATER)])
def test_functions_that_came_later(case, how):
    """On Auto axes alone: on Explicit ones every function has tests of its own."""
    mesh = mesh_cases.mesh_of((2, 4), "Auto")
    specs = {
        word: mesh_cases.spec_of(axes, *mesh_cases.SHARDED[how])
        for word, axes in case.axes.items()
    }
    arrays = {
        word: jax.device_put(array, jax.NamedSharding(mesh, specs[word]))
        for word, array in mesh_cases.arrays_of(case).items()
    }
    run = jax.jit(functools.partial(mesh_cases.derivatives, case))
    computed = jax.device_get(run(*mesh_cases.parted(case, arrays)))
    mesh_cases.assert_same(computed, mesh_cases.expected_of(case))
