"""Inside a `jax.shard_map` over some axes of a mesh, or all: every function.

What is manual is what the body does itself; the other axes are left to the compiler, as
where data parallelism is written out and tensor parallelism is not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import (
    CASES,
    DATA,
    VOCAB,
    arrays_of,
    assert_same,
    derivatives,
    expected_of,
    marks_of,
    mesh_of,
    parted,
    spec_of,
    total_of,
)
from registry import Case

pytestmark = pytest.mark.usefixtures("unoptimized")

MANUAL = [(DATA,), (VOCAB,), (DATA, VOCAB)]


def _splits() -> list:
    """Every case over every subset of the axes, and once without `check_vma`."""
    every = []
    for index, case in enumerate(CASES):
        unchecked = MANUAL[index % len(MANUAL)]
        for manual, check_vma in [*((m, True) for m in MANUAL), (unchecked, False)]:
            most = len(manual) == 2 and check_vma
            # By default every second case, and the others on meshes of Explicit axes.
            most = most and index % 2 == 0
            marks = marks_of(case) if most else [pytest.mark.exhaustive]
            if not check_vma:
                marks = [pytest.mark.once, *marks]
            name = f"{case.name}-{'-'.join(manual)}-{check_vma}"
            every.append(pytest.param(case, manual, check_vma, id=name, marks=marks))
    return every


class Split:
    """How a `shard_map` over some axes of the mesh parts a case."""

    def __init__(self, case: Case, manual: tuple[str, ...], check_vma: bool):
        by_class = "class_axis_name" in case.mesh_axes
        self.case, self.manual, self.check_vma = case, manual, check_vma
        self.classes = VOCAB if by_class and VOCAB in manual else None
        # What has no name for its classes has its rows over all axes.
        self.rows = tuple(name for name in manual if name != self.classes)
        self.names: dict[str, Any] = {}
        if self.classes is not None:
            self.names["class_axis_name"] = self.classes
        if "batch_axis_name" in case.mesh_axes and self.rows:
            self.names["batch_axis_name"] = self.rows

    def spec(self, axes: str) -> jax.P:
        return spec_of(axes, self.rows or None, self.classes)

    def mapped(self, body: Any, mesh: Any, arguments: Any, results: Any) -> Any:
        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=arguments,
            out_specs=results,
            axis_names=set(self.manual),
            check_vma=self.check_vma,
        )

    def gradient_inside(self, moving: Any, rest: Any) -> Any:
        """Returns the gradient by what a device holds, of the total of all."""

        def total(moving: Any) -> jax.Array:
            value = total_of(self.case(moving | rest, **self.names))
            over_rows = self.case.result != "" and self.rows
            return jax.lax.psum(value, self.rows) if over_rows else value

        return jax.grad(total)(moving)


@pytest.mark.parametrize(("case", "manual", "check_vma"), _splits())
def test_is_unsharded(case, manual, check_vma):
    mesh = mesh_of((2, 4), "Auto")
    split = Split(case, manual, check_vma)
    specs = {name: split.spec(axes) for name, axes in case.axes.items()}
    moving_specs, rest_specs = parted(case, specs)
    losses = split.mapped(
        lambda arrays: case(arrays, **split.names),
        mesh,
        (specs,),
        split.spec(case.result),
    )
    inside = split.mapped(
        split.gradient_inside, mesh, (moving_specs, rest_specs), moving_specs
    )

    @jax.jit
    def run(moving, rest):
        # JAX sums a sum once more inside, where it does not check what varies.
        within = inside(moving, rest) if check_vma else None
        return derivatives(losses, moving, rest), within

    placed = {
        name: jax.device_put(
            array,
            jax.NamedSharding(mesh, spec_of(case.axes[name], DATA, VOCAB)),
        )
        for name, array in arrays_of(case).items()
    }
    results, within = run(*parted(case, placed))
    expected = expected_of(case)
    assert_same(results, expected)
    if check_vma:
        assert_same(within, expected[1])


def test_jax_makes_no_zeros_like_a_shape_that_it_infers():
    """What `_blocks.loop` goes around; jax 0.7.2 does not have the defect."""
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if not (0, 10) <= version <= (0, 12):
        pytest.skip("the defect is known of jax 0.10 to 0.12")

    def body(x):
        return jnp.zeros_like(jax.eval_shape(lambda: x + x))

    spec = jax.P(DATA)
    mapped = jax.shard_map(
        body,
        mesh=mesh_of((2, 4), "Auto"),
        in_specs=spec,
        out_specs=spec,
        axis_names={DATA},
    )
    with pytest.raises(AssertionError, match="ManualAxisType"):
        jax.jit(mapped)(np.ones(4, np.float32))
