"""Losses with their classes, and rows, sharded by `jax.shard_map`: rows and programs.

A program takes all that is differentiable as one dict and gives value, gradients,
tangent and a Hessian-vector product at once, so that one compilation answers all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import registry
from mesh_cases import spec_of
from registry import DENSE
from registry import IDS as INTEGER

import xent_jax

CLASSES, ROWS = 32, 32
P = jax.P


class Setting(NamedTuple):
    """A mesh (rows x classes), the type of its axes, and how strict `shard_map` is."""

    shape: tuple[int, int]
    kind: str
    check_vma: bool

    @property
    def mesh(self) -> jax.sharding.Mesh:
        types = (getattr(jax.sharding.AxisType, self.kind),) * 2
        return jax.make_mesh(self.shape, ("rows", "classes"), axis_types=types)


# Every value of every choice with every value of any other one.
SETTINGS = [
    Setting((1, 8), "Auto", True),
    Setting((1, 8), "Explicit", False),
    Setting((2, 4), "Explicit", True),
    Setting((2, 4), "Auto", False),
    Setting((8, 1), "Explicit", True),
    Setting((8, 1), "Auto", False),
]


class Case(NamedTuple):
    """A loss of logits with what it is given."""

    name: str
    loss: Any
    oracle: Any
    dense: bool
    mask: str | None  # rows or classes
    with_options: registry.Case

    @property
    def options(self) -> tuple[str, ...]:
        return self.with_options.words


OPTIONS = registry.FUNCTIONS[INTEGER].unmasked()


def case(name: str, mask: str | None, *options: str) -> Case:
    loss, truth = getattr(xent_jax, name), getattr(oracle, name)
    label = "-".join([name, *options, f"{mask}-masked"])
    given = registry.Case(registry.FUNCTIONS[name], options)
    return Case(label, loss, truth, name == DENSE, mask, given)


class Batch(NamedTuple):
    """Arguments of a case; only `moving` is differentiated."""

    moving: dict[str, np.ndarray]  # the logits and the options
    labels: np.ndarray
    where: np.ndarray | None


def batch(case: Case, special: bool, classes: int = CLASSES) -> Batch:
    """Makes rows: all ordinary, or one of each kind that there is."""
    rng = np.random.default_rng(5)
    logits = 3 * rng.standard_normal((ROWS, classes))
    # A label on every shard, whatever their number.
    ids = np.arange(ROWS) * classes // ROWS
    labels = rng.dirichlet(np.ones(classes), ROWS) * rng.uniform(0.5, 2, (ROWS, 1))
    rows = np.ones(ROWS, bool)
    kept = rng.random((ROWS, classes)) < 0.8
    kept[np.arange(ROWS), ids] = True
    # What a vocabulary that is padded to the size of the mesh looks like.
    kept[:, -classes // 8 :] = False
    ids[-4:] = 0
    kept[-4:, 0] = True
    if special:
        _make_special(logits, ids, labels, rows, kept)
    drawn = case.with_options.draw(rng, registry.Sizes((ROWS,), classes))
    drawn["logits"] = logits
    return Batch(
        {name: np.float32(drawn[name]) for name in ("logits", *case.options)},
        np.float32(labels) if case.dense else np.int32(ids),
        {None: None, "rows": rows, "classes": kept}[case.mask],
    )


def _make_special(logits, ids, labels, rows, kept) -> None:
    """Puts into the first rows whatever is not a number, or is no class."""
    size = logits.shape[1]
    first, middle, last = 0, size // 2, size - 1 - size // 8
    logits[0, ids[0]] += 40  # wins
    logits[1, ids[1]] -= 40  # loses
    ids[2], ids[3] = size, -1
    logits[4, [first, last]] = -np.inf
    ids[5] = middle
    logits[5, middle] = -np.inf
    ids[6] = middle
    logits[6, first] = np.nan
    ids[7] = middle
    logits[7, middle] = np.nan
    logits[8] = -np.inf
    ids[9], ids[10] = first, middle
    logits[[9, 10], middle] = np.inf
    ids[11] = middle
    logits[11, np.arange(size) != middle] = -np.inf
    logits[12, : size // 8] = -np.inf  # all of one shard
    logits[13, [first, middle, last]] = logits[13].max()
    labels[[0, 1, 4, 11, 13]] = np.eye(size)[ids[[0, 1, 4, 11, 13]]]
    labels[12, : size // 8] = 0
    kept[np.arange(14), np.clip(ids[:14], 0, last)] = True
    ids[14] = last
    kept[14, last] = False  # a label on a dropped class
    kept[15] = False
    kept[16, : size // 8] = False  # all of one shard
    ids[16] = middle
    kept[16, middle] = True
    kept[17, first] = False
    ids[17] = middle
    kept[17, middle] = True
    logits[17, first] = np.nan
    rows[18:20] = False
    logits[18], ids[18] = np.nan, size
    # What is bad of rows that a mask of classes keeps is no part of its question.
    kept[18] = False


def call(case: Case, moving: Any, labels: Any, where: Any, **more: Any) -> jax.Array:
    """Returns the losses."""
    options = dict(moving)
    return case.loss(options.pop("logits"), labels, where=where, **options, **more)


def losses_of(case: Case, batch: Batch, setting: Setting | None) -> Any:
    """Returns the function from `moving`, labels and mask to the losses."""

    if setting is None:
        return functools.partial(call, case)
    specs = specs_of(case, batch)
    return jax.shard_map(
        functools.partial(call, case, class_axis_name="classes"),
        mesh=setting.mesh,
        in_specs=tuple(specs),
        out_specs=P("rows"),
        check_vma=setting.check_vma,
    )


def specs_of(case: Case, batch: Batch, rows: str | None = "rows") -> Batch:
    """Returns how the arguments are sharded."""
    full, row = P(rows, "classes"), P(rows)
    axes = case.with_options.axes
    moving = {name: spec_of(axes[name], rows, "classes") for name in batch.moving}
    where = {None: None, "rows": row, "classes": full}[case.mask]
    return Batch(moving, full if case.dense else row, where)


def placed(case: Case, batch: Batch, setting: Setting | None) -> Batch:
    """Returns the arguments where they belong."""
    if setting is None:
        return jax.tree.map(jnp.asarray, batch)
    return jax.tree.map(
        lambda array, spec: jax.device_put(
            array, jax.NamedSharding(setting.mesh, spec)
        ),
        batch,
        specs_of(case, batch),
    )


def program(case: Case, batch: Batch, setting: Setting | None) -> Any:
    """Returns the jitted jvp of value and gradient, by all of `moving`."""
    losses = losses_of(case, batch, setting)

    @jax.jit
    def run(batch, directions):
        def total(moving):
            values = losses(moving, batch.labels, batch.where)
            return values.sum(), values

        both = jax.value_and_grad(total, has_aux=True)
        ((_, values), gradient), ((_, values_dot), gradient_dot) = jax.jvp(
            both, (batch.moving,), (directions,)
        )
        return values, gradient, values_dot, gradient_dot

    return run
