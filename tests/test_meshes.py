"""Rows and classes sharded under plain `jax.jit`, on Auto and on Explicit meshes."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import hlo

import xent_jax

INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels
DENSE = xent_jax.softmax_cross_entropy
ROWS, CLASSES = 8, 16
WEIGHTS = np.linspace(0.5, 2.0, CLASSES, dtype=np.float32)

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weights": WEIGHTS},
    "z_loss": {"z_loss": 0.1},
    "all": {"label_smoothing": 0.1, "class_weights": WEIGHTS, "z_loss": 0.1},
}
LOSSES = {
    **{f"integer-{k}": (INTEGER, "ids", v) for k, v in OPTIONS.items()},
    **{f"dense-{k}": (DENSE, "targets", v) for k, v in OPTIONS.items()},
    "sigmoid": (
        xent_jax.sigmoid_binary_cross_entropy,
        "targets",
        {"pos_weight": WEIGHTS, "label_smoothing": 0.1},
    ),
    "nll": (xent_jax.nll_loss, "ids", {"class_weights": WEIGHTS}),
    "categorical": (xent_jax.categorical_cross_entropy, "targets", {}),
    "binary": (xent_jax.binary_cross_entropy, "targets", {}),
    "linearized": (xent_jax.linearized_softmax_cross_entropy, "targets", {}),
}
# On every version of JAX an option runs with all the others, and alone on one.
ALONE = ("smoothing", "weights", "z_loss")
KINDS = ("Auto", "Explicit")
LARGE = pytest.mark.exhaustive
WITHOUT = [("linearized", "rows"), ("linearized", "classes")]
WITHOUT += [("sigmoid", "rows"), ("binary", "rows")]


def _shardings() -> list:
    """Every loss with every mask it takes, sharded over both axes and over each.

    Both axes have all there is to go wrong; each alone, on one kind of mesh, tells what
    did.
    """
    every = []
    for name, mask in itertools.product(LOSSES, (None, "rows", "classes")):
        # The linearized loss takes no mask; an elementwise loss one of its shape.
        if (name, mask) in WITHOUT:
            continue
        index = len(every) // 4 % 2
        once = [pytest.mark.once, LARGE] if name.endswith(ALONE) else []
        for spec, kind, marks in (
            ("both", "Auto", []),
            ("both", "Explicit", []),
            ("rows", KINDS[index], [LARGE]),
            ("classes", KINDS[1 - index], [LARGE]),
        ):
            every.append(pytest.param(name, mask, spec, kind, marks=[*once, *marks]))
    return every


SPECS = {"rows": ("a", None), "classes": (None, "a"), "both": ("a", "b")}


class Program(NamedTuple):
    """A loss of fixed rows: its arguments, and value, gradient and tangent of its sum.

    Attributes:
      arguments: logits (or what stands for them), labels, mask, and a direction.
      run: jitted, of these four.
    """

    arguments: tuple
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


def program(name, mask, rows, classes) -> Program:
    loss, labels_kind, options = LOSSES[name]
    if "class_weights" in options:
        options = options | {"class_weights": np.resize(WEIGHTS, classes)}
    if "pos_weight" in options:
        options = options | {"pos_weight": np.resize(WEIGHTS, classes)}
    rng = np.random.default_rng(8)
    logits = rng.uniform(0.1, 0.9, (rows, classes)).astype(np.float32)
    targets = rng.random((rows, classes)).astype(np.float32)
    kept = classes * 3 // 4
    labels = rng.integers(0, kept, rows) if labels_kind == "ids" else targets
    where = {
        None: None,
        "rows": np.arange(rows) % 3 > 0,
        "classes": np.broadcast_to(np.arange(classes) < kept, (rows, classes)),
    }[mask]
    direction = rng.standard_normal((rows, classes)).astype(np.float32)

    @jax.jit
    def run(logits, labels, where, direction):
        masked = {} if where is None else {"where": where}

        def total(logits):
            return loss(logits, labels, **masked, **options).sum()

        value, gradient = jax.value_and_grad(total)(logits)
        return value, gradient, jax.jvp(total, (logits,), (direction,))[1]

    return Program((logits, labels, where, direction), run)


@functools.cache
def program_and_results(name, mask=None, rows=ROWS, classes=CLASSES):
    """Returns a program and what it gives on one device."""
    of = program(name, mask, rows, classes)
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
@pytest.mark.parametrize("name", ["integer-all", "dense-all", "nll", "linearized"])
@pytest.mark.parametrize(("shards", "classes"), [(8, 2048), (8, 2560), (4, 8192)])
def test_many_classes_over_any_number_of_shards(shards, classes, name, kind):
    """2560 classes are 20 blocks of 128: not as many for each of 8 shards."""
    types = (getattr(jax.sharding.AxisType, kind),)
    devices = jax.devices()[:shards]
    mesh = jax.make_mesh((shards,), ("a",), axis_types=types, devices=devices)
    loss, expected = program_and_results(name, rows=3, classes=classes)
    results, module = loss.on(mesh, (None, "a"))
    check(loss, results, expected)
    assert module.collective_kinds == {"all-reduce"}


@pytest.mark.parametrize(("name", "mask", "spec", "kind"), _shardings())
def test_sharded_is_unsharded(name, mask, spec, kind):
    shape = (8, 1) if spec == "rows" else (1, 8) if spec == "classes" else (2, 4)
    names = ("a", "b") if spec != "classes" else ("b", "a")
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh(shape, names, axis_types=types)
    loss, expected = program_and_results(name, mask)
    results, module = loss.on(mesh, SPECS[spec])
    check(loss, results, expected)
    assert module.collective_kinds == {"all-reduce"}
