"""Under plain `jax.jit` on meshes of Auto axes, sharded arguments change no result.

The losses of class ids and of dense targets have grids of their own (`test_meshes.py`,
`test_linear_sharding.py`); here are the functions that came after them.
"""

import functools

import jax
import pytest
from mesh_cases import (
    CASES,
    DATA,
    VOCAB,
    assert_same,
    derivatives,
    expected_of,
    mesh_of,
    parted,
    spec_of,
)

pytestmark = pytest.mark.once

SHARDED = {"rows": (DATA, None), "classes": (None, VOCAB), "both": (DATA, VOCAB)}
LATER = ("sparse_targets", "kl_divergence", "statistics", "label_probs")
SOME = [case for case in CASES if any(word in case.name for word in LATER)]


@pytest.fixture(autouse=True)
def unoptimized():
    """Compiles in a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_is_unsharded(case, how):
    mesh = mesh_of((2, 4), "Auto")
    axes = case.axes()
    arrays = {
        name: jax.device_put(
            array, jax.NamedSharding(mesh, spec_of(axes[name], *SHARDED[how]))
        )
        for name, array in case.arrays().items()
    }
    run = jax.jit(functools.partial(derivatives, case))
    assert_same(jax.device_get(run(*parted(case, arrays))), expected_of(case))


def test_there_are_such_functions():
    names = {case.function.__name__ for case in SOME}
    assert len(names) == 6
