"""What the linear head costs: matmuls, their dtypes, memory, residuals, skipped work.

Read from the programs, so that nothing here is timed.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import shortened
from heads import LOSS, OPTIONS, STATISTICS, cast, head_inputs, parted

# No two products of the sizes are the same.
ROWS, FEATURES, CLASSES = 192, 24, 1280
BLOCKS = {
    None: {"class_block": 160},
    "mean": {"row_block": 48},
    "sum": {"row_block": 48},
}
ARRAY = re.compile(r"\b(?:f|bf|s|u)(\d+)\[([\d,]+)\]")
DOT = re.compile(
    r"stablehlo\.dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>"
)
CALLS = re.compile(r"(?:custom_call_target=\"[^\"]*matmul[^\"]*\"|\bdot\()")


def head(rng, options=(), dtype="float32", kernel=None):
    inputs = head_inputs(rng, (ROWS,), FEATURES, CLASSES, options)
    inputs = cast(inputs, dtype, "float32")
    inputs["kernel"] = inputs["kernel"].astype(jnp.dtype(kernel or dtype))
    return inputs


def program(inputs, reduction, wanted, platform="cpu", **options):
    """Returns the lowered loss, or its gradients by the wanted inputs."""
    names = wanted or ("hidden",)
    moving = {name: inputs[name] for name in names}
    rest = {name: inputs[name] for name in inputs if name not in names}

    def total(moving, rest):
        blocks = BLOCKS[reduction] | options
        return LOSS(**moving, **rest, reduction=reduction, **blocks).sum()

    function = jax.value_and_grad(total) if wanted else total
    traced = jax.jit(function).trace(moving, rest)
    return traced.lower(lowering_platforms=(platform,))


def elements(text):
    """Returns the number of elements of the largest array of a compiled program."""
    shapes = (match.group(2) for match in ARRAY.finditer(text))
    return max(int(np.prod([int(size) for size in s.split(",")])) for s in shapes)


BOTH = ("hidden", "kernel")


@pytest.mark.parametrize(
    ("reduction", "wanted", "products"),
    [
        ("mean", (), 1),
        ("mean", BOTH, 3),
        ("mean", (*BOTH, "bias"), 3),
        ("mean", ("hidden",), 2),
        ("mean", ("kernel",), 2),
        ("mean", ("bias",), 1),
        ("sum", BOTH, 3),
        (None, (), 1),
        (None, BOTH, 4),
        (None, ("hidden",), 3),
        (None, ("kernel",), 3),
    ],
)
def test_matmuls_of_a_program(reduction, wanted, products, rng):
    """Every instruction is in the loop over the blocks: together one N·D·V product."""
    lowered = program(head(rng, ("bias",)), reduction, wanted)
    assert len(CALLS.findall(lowered.compile().as_text())) == products


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("kernel", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
def test_matmuls_run_in_the_dtype_of_the_features(
    options, kernel, reduction, platform, rng
):
    """No float32 product for bfloat16 features, but backward per row on a CPU."""
    inputs = head(rng, options, "bfloat16", kernel)
    lowered = program(inputs, reduction, BOTH, platform)
    products = DOT.findall(lowered.as_text())
    assert len(products) >= (3 if reduction is not None else 4)
    narrow = products
    if reduction is None and platform == "cpu":
        # Forward, and forward again for the gradient.
        narrow = [found for found in products if "xbf16" in found[0]]
        assert len(narrow) == 2
    for left, right, result in narrow:
        assert left.endswith("xbf16")
        assert right.endswith("xbf16")
        if reduction is not None:
            assert result.endswith("xf32")
    # The forward product of either form.
    assert products[0][2].endswith("xf32")


@pytest.mark.parametrize("reduction", [None, "mean"])
def test_the_kernels_gradient_is_not_rounded_on_the_way(reduction, rng):
    """bfloat16 features and a float32 kernel: on a CPU it is float32 in both forms."""
    inputs = head(rng, (), "bfloat16", "float32")
    gradient = program(inputs, reduction, BOTH).compile()(
        {name: inputs[name] for name in BOTH}, {"labels": inputs["labels"]}
    )[1]["kernel"]
    assert gradient.dtype == jnp.float32
    rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(gradient != rounded)) > 0.9


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("wanted", [(), BOTH], ids=["value", "gradient"])
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
def test_the_logits_are_in_no_buffer(options, wanted, reduction, rng):
    text = program(head(rng, options), reduction, wanted).compile().as_text()
    block = BLOCKS[reduction]
    tile = block.get("row_block", ROWS) * block.get("class_block", CLASSES)
    assert elements(text) <= max(tile, FEATURES * CLASSES) < ROWS * CLASSES


def test_the_logits_are_in_no_buffer_of_the_statistics(rng):
    inputs = head(rng, ("bias",))
    moving = {name: inputs.pop(name) for name in BOTH}

    def total(moving):
        return sum(a.sum() for a in STATISTICS(**moving, **inputs, class_block=160)[:3])

    text = jax.jit(jax.grad(total)).lower(moving).compile().as_text()
    assert elements(text) <= max(ROWS * 160, FEATURES * CLASSES)
    assert len(CALLS.findall(text)) == 4


@pytest.mark.parametrize("reduction", shortened([None, "mean"], kept=[None]))
def test_residuals(reduction, rng):
    """The scalar forms keep the gradients, the form per row its inputs."""
    inputs = head(rng, OPTIONS)
    moving, rest = parted(inputs)
    _, pullback = jax.vjp(
        lambda m: LOSS(**m, **rest, reduction=reduction, **BLOCKS[reduction]),
        jax.tree.map(jnp.asarray, moving),
    )
    kept = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "size")]
    assert max(leaf.size for leaf in kept) == FEATURES * CLASSES
    large = [leaf for leaf in kept if leaf.size >= ROWS * FEATURES]
    assert len(large) <= 4
    few = sum(leaf.size for leaf in kept) - sum(leaf.size for leaf in large)
    assert few <= 20 * ROWS + 6 * CLASSES


@pytest.mark.parametrize("reduction", [None, "mean"])
def test_memory_is_that_of_a_tile(reduction, rng):
    """Temporary bytes: at most 6 tiles of logits, and the gradients once over.

    Twice the rows, or twice the classes, add what they add to the gradients.
    """
    inputs = head(rng, ("bias", "where"))
    bytes_of = {}
    for rows, classes in ((ROWS, CLASSES), (4 * ROWS, CLASSES)):
        inputs = cast(head_inputs(rng, (rows,), FEATURES, classes), "float32")
        compiled = program(inputs, reduction, BOTH).compile()
        bytes_of[rows] = compiled.memory_analysis().temp_size_in_bytes
        block = BLOCKS[reduction]
        tile = 4 * block.get("row_block", rows) * block.get("class_block", classes)
        arrays = 4 * FEATURES * (rows + classes) + 40 * (rows + classes)
        assert bytes_of[rows] <= 6 * tile + 3 * arrays + 2**16
        if reduction is not None:
            assert bytes_of[rows] < 4 * rows * classes
    if reduction is not None:
        added = bytes_of[4 * ROWS] - bytes_of[ROWS]
        assert added <= 4 * 3 * ROWS * (3 * FEATURES + 20)


@pytest.mark.parametrize("reduction", [None, "mean"])
def test_compiles_once_a_shape(reduction, rng):
    moving, rest = parted(head(rng, ("bias", "where")))
    chex.clear_trace_counter()

    def total(moving):
        return LOSS(**moving, **rest, reduction=reduction, **BLOCKS[reduction]).sum()

    gradient = jax.jit(jax.grad(chex.assert_max_traces(total, n=1)))
    for scale in (1.0, 0.5):
        gradient(jax.tree.map(lambda a, s=scale: np.float32(s) * a, moving))


def products_in(jaxpr, *, guarded=False):
    """Yields of every matmul whether it is inside a branch that may not run."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield guarded
        inside = guarded or equation.primitive.name == "cond"
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from products_in(inner, guarded=inside)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("wanted", [(), BOTH], ids=["value", "gradient"])
def test_blocks_of_dropped_rows_are_skipped(wanted, reduction, rng):
    """Every matmul is in a branch, forward and backward, if there is a `where`."""
    for options in (("where",), ()):
        inputs = head(rng, options)
        names = wanted or BOTH
        moving = {name: inputs[name] for name in names}
        rest = {name: inputs[name] for name in inputs if name not in names}

        def total(moving, rest=rest):
            return LOSS(**moving, **rest, reduction=reduction, **BLOCKS[reduction])

        function = jax.grad(total) if wanted else total
        products = list(products_in(jax.make_jaxpr(function)(moving).jaxpr))
        assert products
        assert all(guarded == bool(options) for guarded in products)
        if options:
            text = jax.jit(function).lower(moving).compile().as_text()
            assert "conditional(" in text


@pytest.mark.parametrize("reduction", shortened(["mean", "sum"], kept=["mean"]))
def test_values_do_not_depend_on_what_is_skipped(reduction, rng):
    """Dropped blocks at the start, in the middle, at the end; and under vmap."""
    inputs = head(rng, ("bias", "weights"))
    moving = {name: inputs.pop(name) for name in (*BOTH, "bias")}

    @jax.jit
    def both(moving, where):
        def total(moving):
            options = {"where": where, "reduction": reduction}
            return LOSS(**moving, **inputs, **options, **BLOCKS[reduction])

        return jax.value_and_grad(total)(moving)

    @jax.jit
    def by_weights(moving, where):
        def total(moving):
            weights = jnp.where(where, inputs["weights"], 0)
            options = {"weights": weights, "reduction": reduction}
            return LOSS(
                **moving, labels=inputs["labels"], **options, **BLOCKS[reduction]
            )

        return jax.value_and_grad(total)(moving)

    block = np.arange(ROWS) // BLOCKS[reduction]["row_block"]
    masks = np.stack([block != 0, block != 2, block != 3, block == 1, block < 0])
    together = jax.jit(jax.vmap(both, in_axes=(None, 0)))(moving, masks)
    for index, where in enumerate(masks):
        alone = both(moving, where)
        for other in (
            by_weights(moving, where),
            jax.tree.map(lambda a, i=index: a[i], together),
        ):
            chex.assert_trees_all_close(alone, other, rtol=2e-5, atol=1e-5)
