"""On meshes of Explicit axes, what comes with the logits may be placed anywhere.

Types say there how arrays are sharded, and JAX combines those that are sharded alike
only: labels, targets, masks and weights are brought to the logits by the functions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import (
    CASES,
    CLASSES,
    DATA,
    ROWS,
    SHARDED,
    VOCAB,
    arrays_of,
    assert_same,
    derivatives,
    expected_of,
    leading,
    marks_of,
    mesh_of,
    parted,
    spec_of,
)
from registry import Case

import xent_jax

pytestmark = pytest.mark.usefixtures("unoptimized")

LARGE = pytest.mark.exhaustive
# Where companions are: (mesh axis of rows, of classes), `None` for NumPy.
COMPANIONS = {
    "numpy": None,
    "replicated": (None, None),
    "alike": "alike",
    "otherwise": (VOCAB, DATA),
}
MOST = ("both", "otherwise")  # what is moved most


def _placements() -> list:
    """Every case in four placements; every placement with a third of the cases.

    A case has every sharding and the farthest placement; the others go round.
    """
    every = []
    for index, case in enumerate(CASES):
        found = [
            (how, list(COMPANIONS)[(index + place) % len(COMPANIONS)])
            for place, how in enumerate(SHARDED)
        ]
        for how, where in dict.fromkeys([MOST, *found]):
            most = (how, where) == MOST
            marks = marks_of(case) if most else [pytest.mark.once, LARGE]
            if most and index % 2 == 0:  # by default, those are partly manual
                marks = [LARGE]
            name = f"{case.name}-{how}-{where}"
            every.append(pytest.param(case, how, where, id=name, marks=marks))
    return every


@pytest.fixture(scope="module")
def mesh():
    return mesh_of((2, 4), "Explicit")


def placed(case: Case, mesh: Any, how: str, where: str) -> dict[str, Any]:
    """Returns the arguments where the test wants them."""

    def put(name: str, array: np.ndarray) -> Any:
        at = SHARDED[how] if name in leading(case) else COMPANIONS[where]
        if at is None:
            return array
        at = SHARDED[how] if at == "alike" else at
        spec = spec_of(case.axes[name], *at)
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    return {name: put(name, array) for name, array in arrays_of(case).items()}


def check(case: Case, mesh: Any, how: str, arrays: Any, computed: Any) -> None:
    """Results are those of one device, sharded as the rows; gradients as arguments."""
    assert_same(computed, expected_of(case))
    results, gradient, _ = computed
    sharding = jax.NamedSharding(mesh, spec_of(case.result, *SHARDED[how]))
    for result in jax.tree.leaves(results):
        assert result.sharding.is_equivalent_to(sharding, result.ndim)
    for name, slope in gradient.items():
        if isinstance(arrays[name], jax.Array):
            assert slope.sharding.is_equivalent_to(arrays[name].sharding, slope.ndim)


@functools.cache
def program(case: Case) -> Any:
    return jax.jit(functools.partial(derivatives, case))


@pytest.mark.parametrize(("case", "how", "where"), _placements())
def test_jitted_is_unsharded(case, how, where, mesh):
    with jax.set_mesh(mesh):
        arrays = placed(case, mesh, how, where)
        computed = program(case)(*parted(case, arrays))
    check(case, mesh, how, arrays, computed)


@pytest.mark.once
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "where"),
    [
        # A head is compiled for every call: the placement that is farthest suffices.
        pytest.param(case, where, id=f"{case.name}-{where}")
        for index, case in enumerate(CASES)
        for where in dict.fromkeys(["otherwise", list(COMPANIONS)[index % 4]])
        if "kernel" not in case.keys or where == "otherwise"
    ],
)
def test_eager_is_unsharded(case, where, mesh):
    """Every companion with every function; over the functions, every sharding."""
    how = list(SHARDED)[(CASES.index(case) + list(COMPANIONS).index(where)) % 3]
    with jax.set_mesh(mesh):
        arrays = placed(case, mesh, how, where)
        computed = derivatives(case, *parted(case, arrays))
    check(case, mesh, how, arrays, computed)


@pytest.mark.parametrize("options", ["", "label_smoothing", "class_weights"])
@pytest.mark.parametrize("how", SHARDED)
def test_one_hot_of_ids_that_are_sharded_as_rows(how, options, mesh):
    """What drop-in users write: JAX shards its rows, and not its classes."""
    numbers = {
        "label_smoothing": 0.1,
        "class_weights": np.linspace(0.5, 2.0, CLASSES, dtype=np.float32),
    }
    more = {options: numbers[options]} if options else {}

    def total(logits, ids):
        targets = jax.nn.one_hot(ids, CLASSES)
        return jnp.sum(xent_jax.softmax_cross_entropy(logits, targets, **more) ** 2)

    logits, ids = arrays_of(CASES[0]).values()
    expected = jax.value_and_grad(total)(logits, ids)
    rows, classes = SHARDED[how]
    with jax.set_mesh(mesh):
        ids = jax.device_put(ids, jax.P(rows))
        logits = jax.device_put(logits, jax.P(rows, classes))
        jitted = jax.jit(jax.value_and_grad(total))(logits, ids)
        eager = jax.value_and_grad(total)(logits, ids)
    assert_same(jitted, expected)
    assert_same(eager, expected)


@pytest.mark.parametrize("axis", [1, (1, 2), (2, 1)])
def test_classes_on_other_axes(axis, mesh):
    """The classes of several axes are sharded as the first of them that is."""
    shape = (ROWS, 4, 3)
    rng = np.random.default_rng(3)
    logits = np.float32(rng.standard_normal(shape))
    targets = np.float32(rng.uniform(0.1, 1.0, shape))
    weights = np.float32(rng.uniform(0.5, 2.0, 12 if isinstance(axis, tuple) else 4))

    def total(logits, targets, weights):
        loss = xent_jax.softmax_cross_entropy(
            logits, targets, axis, class_weights=weights
        )
        return jnp.sum(loss**2)

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    expected = run(logits, targets, weights)
    with jax.set_mesh(mesh):
        computed = run(jax.device_put(logits, jax.P(DATA)), targets, weights)
    assert_same(computed, expected)


@pytest.mark.parametrize("where", COMPANIONS)
def test_values_need_no_mesh_around_the_call(where, mesh):
    """The logits say which devices there are: `jax.set_mesh` is for gradients."""
    for case in CASES[:2]:
        arrays = placed(case, mesh, "both", where)
        expected = expected_of(case)[0]
        assert_same(case(arrays), expected)
        assert_same(jax.jit(case)(arrays), expected)


@pytest.mark.parametrize("where", ["replicated", "otherwise"])
def test_logits_that_are_not_on_a_mesh(where, mesh):
    """What comes with them is, and is gathered."""
    for case in (CASES[1], CASES[5], CASES[-1]):
        arrays = arrays_of(case)
        companions = {
            name: jax.device_put(
                array,
                jax.NamedSharding(mesh, spec_of(case.axes[name], *COMPANIONS[where])),
            )
            for name, array in arrays.items()
            if name not in leading(case)
        }
        with jax.set_mesh(mesh):
            results = jax.jit(case)(arrays | companions)
        assert_same(results, expected_of(case)[0])


def test_without_an_explicit_mesh_nothing_is_added():
    """By this package, that is: `jnp.where` reshards on its own account."""
    for case in CASES:
        auto = jax.make_jaxpr(case)(
            placed(case, mesh_of((2, 4), "Auto"), "both", "numpy")
        )
        assert "_resharded" not in str(auto)
        assert "_resharded" not in str(jax.make_jaxpr(case)(arrays_of(case)))


def test_inside_a_shard_map_nothing_is_added(mesh):
    for case in CASES:
        specs = {name: jax.P() for name in case.axes}
        mapped = jax.shard_map(case, mesh=mesh, in_specs=(specs,), out_specs=jax.P())
        with jax.set_mesh(mesh):
            assert "_resharded" not in str(jax.make_jaxpr(mapped)(arrays_of(case)))


def test_what_is_placed_alike_is_left_alone(mesh):
    for case in CASES:
        if "kernel" not in case.keys:
            with jax.set_mesh(mesh):
                text = str(jax.make_jaxpr(case)(placed(case, mesh, "both", "alike")))
            assert "_resharded" not in text
