"""What is computed by several processes and by one: the same functions on either.

A computation is a function of named arrays and of the names of two mesh axes, which are
`None` where there is no mesh. Another one is another row of `COMPUTATIONS`.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import registry
from mesh_cases import spec_of
from registry import FUNCTIONS, Case, Sizes

import xent_jax

P = jax.P
Arrays = dict[str, Any]


class Computation(NamedTuple):
    """A function, its arguments, and where they are.

    Attributes:
      function: of the arrays, the name of the axis of classes and that of rows.
      arrays: by name; the same in every process.
      specs: how each is sharded.
      out: how the result is.
      by: what the result, a scalar then, is differentiated by.
    """

    function: Callable[[Arrays, str | None, str | None], jax.Array]
    arrays: Arrays
    specs: dict[str, P]
    out: P = P()
    by: tuple[str, ...] = ()

    def run(self, mesh: jax.sharding.Mesh | None = None) -> list[np.ndarray]:
        """Returns the result and its gradients, whole, on one device or on a mesh."""
        function = functools.partial(self.function, classes=None, rows=None)
        arrays = self.arrays
        if mesh is not None:
            function = jax.shard_map(
                functools.partial(self.function, classes="classes", rows="rows"),
                mesh=mesh,
                in_specs=(self.specs,),
                out_specs=self.out,
            )
            arrays = {name: self._global(name, mesh) for name in arrays}

        def results(arrays):
            if not self.by:
                return function(arrays), {}

            def of(moving):
                return function(arrays | moving)

            return jax.value_and_grad(of)({name: arrays[name] for name in self.by})

        whole = None if mesh is None else jax.NamedSharding(mesh, P())
        leaves = jax.tree.leaves(jax.jit(results, out_shardings=whole)(arrays))
        return [np.asarray(leaf) for leaf in leaves]

    def _global(self, name: str, mesh: jax.sharding.Mesh) -> jax.Array:
        """An array of which every process holds its part."""
        array = self.arrays[name]
        return jax.make_array_from_callback(
            array.shape,
            jax.NamedSharding(mesh, self.specs[name]),
            lambda index: array[index],
        )


def main() -> None:
    """Runs in every process: prints all results.

    Classes are sharded over the processes, rows over the devices of each.
    """
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1).T
    assert len({device.process_index for device in devices[0]}) == jax.process_count()
    mesh = jax.sharding.Mesh(devices, ("rows", "classes"))
    results = {name: one.run(mesh) for name, one in COMPUTATIONS.items()}
    print(json.dumps(jax.tree.map(np.ndarray.tolist, results)))


def _of(case: Case, function: Callable[..., jax.Array]) -> Computation:
    """Returns a computation of a case's arguments, by all that it is smooth in."""
    return Computation(
        function,
        registry.narrow(case.draw(np.random.default_rng(3), Sizes((16,), 40))),
        {w: spec_of(axes, "rows", "classes") for w, axes in case.axes.items()},
        by=case.moving,
    )


def _integer_loss() -> Computation:
    row = FUNCTIONS[registry.IDS]
    case = Case(row, ("where", *row.unmasked()))

    def mean(arrays, classes, rows):
        loss = case(arrays, class_axis_name=classes)
        return xent_jax.weighted_mean(loss, arrays["where"], batch_axis_name=rows)

    return _of(case, mean)


def _head(reduction: str | None) -> Computation:
    row = FUNCTIONS[registry.HEAD]
    case = Case(row, row.unmasked(), {"reduction": reduction})

    def loss(arrays, classes, rows):
        names = {"class_axis_name": classes}
        if reduction is not None:
            names["batch_axis_name"] = rows
        losses = case(arrays, **names)
        # A loss per row is one number when the rows of all devices are added.
        local = reduction is None and rows is not None
        return jax.lax.psum(losses.sum(), rows) if local else losses.sum()

    return _of(case, loss)


def _sinkhorn(tol: float | None) -> Computation:
    scores = np.random.default_rng(3).standard_normal((32, 8)).astype(np.float32) / 3
    both = ("rows", "classes")

    def targets(arrays, classes, rows):
        return xent_jax.sinkhorn_targets(
            arrays["scores"],
            tol=tol,
            num_iters=6,
            batch_axis_name=None if rows is None else (rows, classes),
        )

    return Computation(targets, {"scores": scores}, {"scores": P(both)}, P(both))


COMPUTATIONS = {
    "integer-loss": _integer_loss(),
    "head-mean": _head("mean"),
    "head-rows": _head(None),
    "sinkhorn": _sinkhorn(None),
    "sinkhorn-early": _sinkhorn(0.1),
}
