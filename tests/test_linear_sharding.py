"""The linear head with its classes, and its rows, sharded over a mesh."""

import functools
import re

import heads
import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import oracle
import pytest
import shards
from aot import hlo
from differences import slopes
from grids import shortened
from heads import (
    LOSS,
    OF_ROWS,
    OF_STATISTICS,
    OPTIONS,
    STATISTICS,
    assert_close,
    cast,
    head_inputs,
    parted,
    relative_error,
    truth_of,
)
from registry import FUNCTIONS, HEAD_STATISTICS, Case

P = jax.P
ROWS, FEATURES, CLASSES = 16, 3, 32
# Blocks that divide neither the rows nor the classes of a shard.
BLOCKS = {None: {"class_block": 3}, "mean": {"row_block": 3}, "sum": {"row_block": 16}}
ALL, PLAIN = OPTIONS, ()


def inputs_of(options, rows=ROWS, features=FEATURES, classes=CLASSES):
    """Returns arguments with a label on every shard, whatever their number."""
    rng = np.random.default_rng(7)
    inputs = head_inputs(rng, (rows,), features, classes, options)
    kept = classes - classes // 4 if "class_mask" in options else classes
    inputs["labels"] = np.arange(rows) * kept // rows
    if "weights" in options:
        inputs["labels"][inputs["weights"] == 0] = -100
    return inputs


def spec_of(name, rows="rows", classes="classes"):
    return mesh_cases.spec_of(heads.ALL.axes[name], rows, classes)


def placed(inputs, setting):
    return {
        name: jax.device_put(value, jax.NamedSharding(setting.mesh, spec_of(name)))
        for name, value in inputs.items()
    }


def sharded(function, setting, names, out_specs, **static):
    """Returns a function of the arguments named, mapped over the setting's mesh."""
    return jax.shard_map(
        lambda inputs: function(**inputs, class_axis_name="classes", **static),
        mesh=setting.mesh,
        in_specs=({name: spec_of(name) for name in names},),
        out_specs=out_specs,
        check_vma=setting.check_vma,
    )


def loss_of(reduction, setting, names):
    """Returns the sharded loss of the arguments."""
    if reduction is None:
        return sharded(LOSS, setting, names, P("rows"), **BLOCKS[None])
    static = BLOCKS[reduction] | {"reduction": reduction, "batch_axis_name": "rows"}
    return sharded(LOSS, setting, names, P(), **static)


def program(function):
    """Returns a jitted function: values, gradients, and the tangents of both."""

    @jax.jit
    def run(moving, rest, directions):
        def total(moving):
            values = function(moving | rest)
            return values.sum(), values

        both = jax.value_and_grad(total, has_aux=True)
        ((_, values), gradients), ((_, values_dot), gradients_dot) = jax.jvp(
            both, (moving,), (directions,)
        )
        return values, gradients, values_dot, gradients_dot

    return run


def moved(inputs, directions, step):
    return inputs | {k: inputs[k] + step * directions[k] for k in directions}


def marks_of(setting):
    return () if setting == shards.SETTINGS[3] else pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("reduction", "options", "setting"),
    [
        *(
            pytest.param(r, ALL, setting, marks=marks_of(setting))
            for r in (None, "mean")
            for setting in shards.SETTINGS
        ),
        # The mesh has no part in what the options change.
        *(
            pytest.param(r, PLAIN, setting, marks=pytest.mark.exhaustive)
            for r in (None, "sum")
            for setting in shards.SETTINGS[2:4]
        ),
    ],
    ids=str,
)
def test_sharded_is_the_oracle(reduction, options, setting, rng, x64, unoptimized):
    """In float64, where a wrong term cannot hide behind rounding."""
    inputs = inputs_of(options)
    moving, rest = parted(inputs)
    directions = {
        name: np.asarray(rng.standard_normal(np.shape(value)))
        for name, value in moving.items()
    }
    if "weights" in directions:
        directions["weights"] *= moving["weights"] != 0  # they stay dropped
    run = program(loss_of(reduction, setting, inputs))
    arguments = (placed(x, setting) for x in (moving, rest, directions))
    values, gradients, values_dot, gradients_dot = jax.device_get(run(*arguments))
    truth = truth_of(inputs, reduction)
    assert_close(values, truth.value, 1e-12)

    def at(step):
        return truth_of(moved(inputs, directions, step), reduction)

    assert_close(values_dot, slopes(lambda step: at(step).value), 1e-8)
    for name, gradient in gradients.items():
        assert_close(gradient, getattr(truth, name), 1e-12, name)
        curved = slopes(functools.partial(lambda n, step: getattr(at(step), n), name))
        if name == "weights":  # a row of weight 0 has one only by itself
            curved = np.where(moving["weights"] == 0, gradients_dot[name], curved)
        assert_close(gradients_dot[name], curved, 1e-7, name)


@pytest.mark.parametrize("setting", shards.SETTINGS[1:4], ids=str)
def test_statistics(setting, x64, unoptimized):
    inputs = inputs_of(OF_STATISTICS)
    # Equal logits on several shards: the lowest id is predicted.
    inputs["hidden"][-1] = 0
    inputs["bias"][[3, 11, 12, 23]] = 9.0
    inputs["where"][-1] = True
    factors = (0.3, 0.8, -1.7)
    find = sharded(STATISTICS, setting, inputs, P("rows"), class_block=3)

    @jax.jit
    def both(moving, rest):
        def total(moving):
            found = find(moving | rest)
            return sum(
                f * a.sum() for f, a in zip(factors, found[:3], strict=True)
            ), found

        return jax.grad(total, has_aux=True)(moving)

    moving, rest = parted(inputs)
    gradients, found = both(placed(moving, setting), placed(rest, setting))
    truth = oracle.linear_softmax_statistics(**inputs, factors=factors)
    for name, computed in found._asdict().items():
        assert_close(computed, getattr(truth, name), 1e-12, name)
    assert np.asarray(found.prediction)[-1] == 3
    for name in ("hidden", "kernel", "bias"):
        assert_close(gradients[name], getattr(truth, name), 1e-12, name)


@pytest.mark.parametrize("reduction", [None, "mean"])
def test_special_values(reduction, rng):
    """Ids that are no class, logits that are not finite: as on one device."""
    setting = shards.Setting((1, 8), "Auto", True)
    inputs = cast(inputs_of(("bias", "class_mask")), "float32")
    inputs["labels"] = inputs["labels"].copy()
    inputs["labels"][:3] = -1, CLASSES, CLASSES - 1  # the last is a dropped class
    inputs["hidden"][3] = np.nan
    inputs["hidden"][4] = 1e30
    inputs["bias"][5] = -np.inf
    inputs["bias"][8:12] = -np.inf  # all of two shards
    inputs["labels"][5] = 5
    sums = {}
    for where in (np.arange(ROWS) >= 5, np.ones(ROWS, bool)):
        inputs["where"] = where
        moving, rest = parted(inputs)

        def run(moving, function, rest=rest):
            values = function(**moving, **rest)
            return values.sum(), values

        for name, function in (
            ("one", functools.partial(LOSS, reduction=reduction)),
            ("all", lambda **x: loss_of(reduction, setting, x)(x)),
        ):
            total = functools.partial(run, function=function)
            sums[name] = jax.jit(jax.grad(total, has_aux=True))(moving)
        for one, many in zip(*map(jax.tree.leaves, sums.values()), strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    assert np.isnan(sums["all"][1]).any()


@pytest.mark.parametrize("reduction", [None, "mean"])
def test_half_precision_features(reduction, rng):
    """bfloat16 features, a float32 kernel: as accurate as on one device."""
    inputs = cast(inputs_of(("where",), 64, 32, 256), "bfloat16", "float32")
    moving, rest = parted(inputs)
    setting = shards.Setting((2, 4), "Auto", True)
    block = {"row_block": 8} if reduction else {"class_block": 16}
    alone = functools.partial(LOSS, reduction=reduction, **block)
    names = {"batch_axis_name": "rows"} if reduction else {}
    out = P() if reduction else P("rows")
    mapped = sharded(LOSS, setting, inputs, out, reduction=reduction, **block, **names)
    truth = truth_of(inputs, reduction)
    errors = []
    for function in (lambda x: alone(**x), mapped):
        grad = jax.jit(jax.grad(lambda m, f=function: f(m | rest).sum()))
        gradients = grad(moving)
        assert gradients["kernel"].dtype == jnp.float32
        assert gradients["hidden"].dtype == jnp.bfloat16
        errors.append(
            [relative_error(gradients[k], getattr(truth, k)) for k in gradients]
        )
    assert np.all(np.divide(errors[1], errors[0]) <= 1.1)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("reduction", [None, "mean"])
def test_collectives(reduction, check_vma):
    """Two all-reduces a block of rows, one of the features' gradient."""
    rows, features, classes, block = 64, 24, 256, 16
    setting = shards.Setting((2, 4), "Auto", check_vma)
    inputs = cast(inputs_of((), rows, features, classes), "float32")
    moving, rest = parted(inputs)
    static = {"class_block": 16}
    if reduction:
        static = {"row_block": block, "reduction": "mean", "batch_axis_name": "rows"}
    out = P() if reduction else P("rows")
    loss = sharded(LOSS, setting, inputs, out, **static)
    step = jax.jit(jax.value_and_grad(lambda m, r: loss(m | r).sum()))
    text = step.lower(placed(moving, setting), placed(rest, setting)).compile()
    module = hlo.parse(text.as_text())
    sizes = sorted((size // 4 for _, size in module.collectives), reverse=True)
    assert module.collective_kinds == {"all-reduce"}
    local = rows // 2
    of_hidden, of_kernel = local * features, features * classes // 4
    # Each of the two large ones once, with or without numbers that are combined.
    assert of_kernel <= sizes[0] < of_kernel + 8
    assert of_hidden <= sizes[1] < of_hidden + 8
    blocks = local // block if reduction else 1
    # Of a row: its best rival; the sum of its rivals and its label's logit; and, where
    # JAX transposes a sum over the mesh to another, the cotangents of two tangents.
    a_row = [size for size in sizes[2:] if size > 2]
    transposed = reduction is None and not check_vma
    assert len(a_row) <= 2 * blocks + transposed
    assert sum(a_row) == local * (3 + 2 * transposed)


@pytest.mark.parametrize("check_vma", [True, False])
def test_where_gradients_may_be_taken(check_vma):
    """Outside of the body always; inside only where JAX knows what varies."""
    setting = shards.Setting((2, 4), "Auto", check_vma)
    inputs = cast(inputs_of(("weights",)), "float32")
    moving, rest = parted(inputs)
    specs = {name: spec_of(name) for name in moving}
    truth = truth_of(inputs, "mean")

    def total(moving, rest):
        names = {"class_axis_name": "classes", "batch_axis_name": "rows"}
        per_row = LOSS(**moving, **rest, class_axis_name="classes")
        scalar = LOSS(**moving, **rest, **names, reduction="mean")
        return scalar + 0 * jax.lax.psum(per_row.sum(), "rows")

    def mapped(function, out_specs):
        return jax.shard_map(
            function,
            mesh=setting.mesh,
            in_specs=(specs, {name: spec_of(name) for name in rest}),
            out_specs=out_specs,
            check_vma=check_vma,
        )

    outside = jax.grad(mapped(total, P()))
    inside = mapped(jax.grad(total), specs)
    found = jax.jit(lambda *x: (outside(*x), inside(*x)))(moving, rest)
    for name in moving:
        assert_close(found[0][name], getattr(truth, name), 1e-5, name)
    error = relative_error(found[1]["kernel"], truth.kernel)
    assert (error < 1e-5) == check_vma
    if not check_vma:  # summed once more: 4 shards of the classes, 2 of the rows
        assert error > 1


@pytest.mark.parametrize("reduction", [None, "mean"])
def test_rows_that_are_gathered_over_the_classes(reduction, unoptimized):
    """As sequence parallelism does: JAX takes them to differ over the shards."""
    setting = shards.Setting((1, 8), "Auto", True)
    inputs = cast(inputs_of(("where", "weights")), "float32")
    moving, rest = parted(inputs)
    gathered = ("hidden", "labels", "where")

    def total(inputs):
        whole = {
            name: jax.lax.all_gather(value, "classes", tiled=True)
            if name in gathered
            else value
            for name, value in inputs.items()
        }
        loss = LOSS(**whole, reduction=reduction, class_axis_name="classes")
        return jax.lax.pmean(loss.sum(), "classes")

    specs = {name: spec_of(name, None) for name in inputs}
    specs |= {name: P("classes") for name in gathered}
    mapped = jax.shard_map(total, mesh=setting.mesh, in_specs=(specs,), out_specs=P())
    both = jax.jit(jax.value_and_grad(lambda moving: mapped(moving | rest)))
    value, gradients = both(moving)
    truth = truth_of(inputs, reduction)
    assert_close(value, truth.value.sum(), 1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, getattr(truth, name), 1e-5, name)


def test_one_class_a_shard(unoptimized):
    setting = shards.Setting((1, 8), "Auto", True)
    inputs = cast(inputs_of(("bias", "class_weights"), classes=8), "float32")
    for reduction in (None, "mean"):
        value = loss_of(reduction, setting, inputs)(placed(inputs, setting))
        assert_close(value, truth_of(inputs, reduction).value, 1e-5)


MESHES = {
    "neither": (None, None),
    "rows": ("rows", None),
    "classes": (None, "classes"),
    "both": ("rows", "classes"),
    "two axes": (None, ("rows", "classes")),
}
EACH_MESH = [
    pytest.param(how, marks=() if how == "both" else pytest.mark.exhaustive)
    for how in MESHES
]


@pytest.mark.parametrize("kind", shortened(["Auto", "Explicit"], kept=["Explicit"]))
@pytest.mark.parametrize("how", EACH_MESH)
def test_without_axis_names(how, kind, unoptimized):
    """Under plain jit; types say how arrays are sharded on a mesh of Explicit axes."""
    setting = shards.Setting((2, 4), kind, True)
    inputs = cast(inputs_of(ALL), "float32")
    # Leading axes, and a row's argument that is sharded as it likes.
    shape = {name: (4, 4) if name in OF_ROWS else () for name in inputs}
    inputs = {
        name: np.reshape(value, (*shape[name], *np.shape(value)[1:]))
        if name in OF_ROWS
        else value
        for name, value in inputs.items()
    }
    moving, rest = parted(inputs)

    @jax.jit
    def run(moving, rest):
        def totals(moving):
            plain = {k: v for k, v in (moving | rest).items() if k in STATISTICS_TAKE}
            losses = [LOSS(**moving, **rest, reduction=r) for r in (None, "mean")]
            found = STATISTICS(**plain)
            sums = losses[0].sum() + losses[1] + found.entropy.sum()
            return sums, (losses, found)

        return jax.grad(totals, has_aux=True)(moving)

    expected = run(moving, rest)
    put = {
        name: jax.NamedSharding(setting.mesh, spec_of(name, *MESHES[how]))
        for name in inputs
    }
    if kind == "Explicit":
        put["where"] = jax.NamedSharding(setting.mesh, P())
    with jax.set_mesh(setting.mesh):
        moving, rest = (
            {name: jax.device_put(x[name], put[name]) for name in x}
            for x in (moving, rest)
        )
        found = run(moving, rest)
    for name, gradient in found[0].items():
        assert gradient.sharding.is_equivalent_to(put[name], gradient.ndim)
        assert_close(gradient, expected[0][name], 1e-5, name)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (found[1], expected[1])), strict=True
    ):
        assert_close(ours, theirs, 1e-5)


STATISTICS_TAKE = Case(FUNCTIONS[HEAD_STATISTICS], OF_STATISTICS).axes


@pytest.mark.parametrize(
    ("kind", "how", "reduction"),
    [
        ("Auto", "rows", "mean"),
        ("Auto", "both", "mean"),
        ("Explicit", "both", "mean"),
        ("Explicit", "both", None),
    ],
)
def test_no_rows_or_classes_are_gathered(kind, how, reduction):
    """A block of rows has its part on every shard, and none is sent around."""
    setting = shards.Setting((2, 4), kind, True)
    inputs = cast(inputs_of((), 64, 24, 256), "float32")
    with jax.set_mesh(setting.mesh):
        moving, rest = (
            {
                name: jax.device_put(
                    value,
                    jax.NamedSharding(setting.mesh, spec_of(name, *MESHES[how])),
                )
                for name, value in part.items()
            }
            for part in parted(inputs)
        )
        block = {"row_block": 16} if reduction else {"class_block": 16}
        step = jax.value_and_grad(
            lambda m, r: LOSS(**m, **r, reduction=reduction, **block).sum()
        )
        text = jax.jit(step).lower(moving, rest).compile().as_text()
    module = hlo.parse(text)
    assert module.collective_kinds == {"all-reduce"}
    # Shards share the work.
    parts = 2 if how == "rows" else 8
    products = 3 if reduction else 4
    assert module.matmul_flops * parts == products * 2 * 64 * 24 * 256


@pytest.mark.parametrize(
    ("hidden", "kernel", "message"),
    [
        (
            P(None, "rows"),
            P(),
            "hidden must not be sharded over its features "
            "(jax.sharding.reshard(hidden, PartitionSpec(None, None)) gathers them), "
            "got PartitionSpec(None, 'rows').",
        ),
        (
            P(),
            P("rows", "classes"),
            "kernel must not be sharded over its features "
            "(jax.sharding.reshard(kernel, PartitionSpec(None, 'classes')) gathers "
            "them), got PartitionSpec('rows', 'classes').",
        ),
        (
            P("rows"),
            P(None, ("rows", "classes")),
            "kernel must be sharded over other mesh axes than the rows of hidden, got "
            "PartitionSpec(None, ('rows', 'classes')).",
        ),
    ],
)
@pytest.mark.parametrize("function", [LOSS, STATISTICS], ids=lambda f: f.__name__)
def test_what_an_explicit_mesh_cannot_have(function, hidden, kernel, message):
    mesh = shards.Setting((2, 4), "Explicit", True).mesh
    with jax.set_mesh(mesh):
        features = jax.device_put(np.ones((4, 8), np.float32), hidden)
        matrix = jax.device_put(np.ones((8, 8), np.float32), kernel)
        with pytest.raises(ValueError, match="must") as error:
            function(features, matrix, np.zeros(4, np.int32))
    # jax 0.12 writes a partition in short.
    said = re.sub(r"\bP\(", "PartitionSpec(", str(error.value))
    assert said == f"{function.__name__}: {message}"


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_shard_map_of_the_rows_alone(kind, unoptimized):
    """The classes then are left to the compiler, which Explicit axes do not allow."""
    setting = shards.Setting((2, 4), kind, True)
    inputs = cast(inputs_of(()), "float32")
    loss = jax.shard_map(
        lambda h, k, y: LOSS(h, k, y, reduction="mean", batch_axis_name="rows"),
        mesh=None,
        in_specs=(P("rows"), P(), P("rows")),
        out_specs=P(),
        axis_names={"rows"},
    )
    with jax.set_mesh(setting.mesh):
        arrays = placed(inputs, setting)
        arguments = (arrays["hidden"], arrays["kernel"], arrays["labels"])
        if kind == "Explicit":
            expected = "kernel must not be sharded over Explicit axes inside a jax"
            with pytest.raises(ValueError, match=re.escape(expected)):
                jax.jit(loss)(*arguments)
            return
        value, gradient = jax.jit(jax.value_and_grad(loss, 1))(*arguments)
    truth = truth_of(inputs, "mean")
    assert_close(value, truth.value, 1e-5)
    assert_close(gradient, truth.kernel, 1e-5)


def test_a_name_outside_of_shard_map_on_an_explicit_mesh():
    setting = shards.Setting((2, 4), "Explicit", True)
    inputs = cast(inputs_of(()), "float32")
    with jax.set_mesh(setting.mesh), pytest.raises(ValueError, match="class_axis_name"):
        LOSS(**placed(inputs, setting), class_axis_name="classes")


def test_shapes_are_those_of_all_shards_in_messages():
    mesh = shards.Setting((2, 4), "Explicit", True).mesh
    with jax.set_mesh(mesh):
        features = jax.device_put(np.ones((4, 8), np.float32), P("rows"))
        expected = re.escape("bias must have shape (6,)")
        with pytest.raises(ValueError, match=expected):
            LOSS(features, np.ones((8, 6)), np.zeros(4, np.int32), bias=np.ones(5))


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (
            {"class_axis_name": "v"},
            ValueError,
            "class_axis_name must name a mesh axis of the jax.shard_map that the call "
            "is in, got 'v'.",
        ),
        (
            {"class_axis_name": 3},
            TypeError,
            "class_axis_name must be the name of a mesh axis or a tuple of them, "
            "got 3.",
        ),
        (
            {"batch_axis_name": "v", "reduction": "sum"},
            ValueError,
            "batch_axis_name must name a mesh axis of the jax.shard_map that the call "
            "is in, got 'v'.",
        ),
        (
            {"batch_axis_name": "rows"},
            ValueError,
            "batch_axis_name must be None with reduction=None, which sums over no "
            "rows, got 'rows'.",
        ),
        (
            {
                "batch_axis_name": ("rows", "classes"),
                "class_axis_name": "classes",
                "reduction": "mean",
            },
            ValueError,
            "batch_axis_name must name other mesh axes than "
            "class_axis_name='classes', got ('rows', 'classes').",
        ),
        (
            {"class_axis_name": "classes", "bias": np.ones(8, np.float32)},
            ValueError,
            "bias must have shape (2,) (one value a class, as the kernel's columns), "
            "got (8,).",
        ),
    ],
)
def test_names_of_axes(names, kind, message):
    mesh = shards.Setting((2, 4), "Auto", True).mesh

    def call(hidden, kernel):
        return LOSS(hidden, kernel, jnp.zeros(hidden.shape[0], jnp.int32), **names)

    mapped = jax.shard_map(
        call, mesh=mesh, in_specs=(P("rows"), P(None, "classes")), out_specs=P()
    )
    with pytest.raises(kind) as error:
        mapped(np.ones((4, 3), np.float32), np.ones((3, 8), np.float32))
    assert str(error.value) == f"linear_softmax_cross_entropy: {message}"


def test_wide_numpy_ids_do_not_wrap_on_an_explicit_mesh(rng):
    setting = shards.Setting((2, 4), "Explicit", True)
    hidden = rng.standard_normal((4, 3)).astype(np.float32)
    kernel = rng.standard_normal((3, 8)).astype(np.float32)
    ids = np.array([2**32 + 1, 1, -(2**32) + 2, 3], np.int64)
    alone = LOSS(hidden, kernel, ids)
    with jax.set_mesh(setting.mesh):
        arrays = [
            jax.device_put(array, jax.NamedSharding(setting.mesh, spec_of(name)))
            for name, array in (("hidden", hidden), ("kernel", kernel))
        ]
        sharded = LOSS(*arrays, ids)
    assert np.isnan(alone).tolist() == [True, False, True, False]
    np.testing.assert_allclose(sharded, alone, rtol=1e-6)


def test_features_without_an_axis_on_an_explicit_mesh():
    setting = shards.Setting((2, 4), "Explicit", True)
    with jax.set_mesh(setting.mesh):
        sharding = jax.NamedSharding(setting.mesh, P(None, "classes"))
        kernel = jax.device_put(jnp.ones((3, 8)), sharding)
        with pytest.raises(ValueError, match="hidden must have"):
            LOSS(jnp.float32(1), kernel, jnp.int32(0))
