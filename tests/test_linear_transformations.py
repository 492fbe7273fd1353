"""The linear head under every transformation, each against float64 without JAX.

The function is ½ s², where s is the mean, or a weighted sum over the rows of the losses
or of the statistics, so that a chain rule is part of every derivative. Its gradient is
the oracle's closed form, its Hessian the differences of that gradient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import shortened
from heads import ALL, LOSS, OF_STATISTICS, OPTIONS, STATISTICS, head_inputs, parted
from jax.flatten_util import ravel_pytree

ROWS, FEATURES, CLASSES = 4, 2, 5
FACTORS = (0.7, 0.4, -1.3)
# Of the rows of the losses, which the oracle takes as weights.
SHARES = np.array([1.0, -0.5, 2.0, 0.3])
FORMS = ("mean", "rows", "statistics")
# The statistics share the scan of the losses per row: of their modes, the kinds.
OF_STATISTICS_ALONE = (
    "grad",
    "remat",
    "jacfwd",
    "vmap of grad",
    "grad inside scan",
    "jvp",
    "linearize",
    "forward over reverse",
    "reverse over reverse",
    "forward over forward",
)


def every(modes):
    """Returns the parameters of a test of every mode of every form.

    By default the forms share the modes, but for the gradient.
    """
    pairs = [
        (form, mode)
        for form in FORMS
        for mode in modes
        if form != "statistics" or mode in OF_STATISTICS_ALONE
    ]
    kept = [
        (form, mode)
        for form, mode in pairs
        if mode == "grad" or list(modes).index(mode) % 3 == FORMS.index(form)
    ]
    return pytest.mark.parametrize(("form", "mode"), shortened(pairs, kept=kept))


class Problem(NamedTuple):
    """A function of a vector, and what it is."""

    function: Any  # of the vector
    by_hidden: Any  # of hidden, labels, where: before the square
    point: np.ndarray
    direction: np.ndarray
    inputs: dict[str, Any]
    value: float
    gradient: np.ndarray
    hessian: np.ndarray


def outputs(form, moving, rest):
    """Returns s."""
    if form == "statistics":
        found = STATISTICS(**moving, **rest, class_block=2)
        pairs = zip(FACTORS, found[:3], strict=True)
        return sum((factor * array).sum() for factor, array in pairs)
    if form == "rows":
        losses = LOSS(**moving, **rest, class_block=2)
        return (jnp.asarray(SHARES, losses.dtype)[: losses.size] * losses).sum()
    return LOSS(**moving, **rest, reduction=form, row_block=3)


@functools.cache
def truth(form):
    """Returns the inputs, and value, gradient and Hessian of ½ s²."""
    rng = np.random.default_rng(7)
    options = OF_STATISTICS if form == "statistics" else OPTIONS
    inputs = head_inputs(rng, (ROWS,), FEATURES, CLASSES, options)
    inputs["where"] = np.array([True, True, False, True])
    if form == "statistics":
        softcap = {"softcap": inputs.pop("softcap")}
    else:
        softcap, inputs["weights"] = {}, np.array([1.0, 0.5, 1.5, 0.0])
    # Rows whose label has the largest logit, and rows whose label has not.
    logits = inputs["hidden"] @ inputs["kernel"] + inputs["bias"]
    first = np.where(inputs["class_mask"], logits, -np.inf).argmax(-1)
    inputs["labels"] = np.where([True, False, False, True], first, (first + 1) % 3)
    moving, rest = parted(inputs)
    point = np.concatenate([np.ravel(moving[name]) for name in sorted(moving)])
    sizes = {name: np.shape(value) for name, value in moving.items()}

    def unpack(vector):
        parts, start = {}, 0
        for name in sorted(sizes):
            size = int(np.prod(sizes[name]))
            parts[name] = vector[start : start + size].reshape(sizes[name])
            start += size
        return parts

    def value_and_gradient(vector):
        arrays = {**unpack(vector), **rest, **softcap}
        if form == "statistics":
            found = oracle.linear_softmax_statistics(**arrays, factors=FACTORS)
            value = sum(f * a.sum() for f, a in zip(FACTORS, found[:3], strict=True))
            slopes = found._asdict()
        elif form == "rows":
            arrays["weights"] = arrays["weights"] * SHARES
            found = oracle.linear_softmax_cross_entropy(**arrays, reduction="sum")
            slopes = found._asdict() | {"weights": found.weights * SHARES}
            value = found.value
        else:
            found = oracle.linear_softmax_cross_entropy(**arrays, reduction=form)
            slopes, value = found._asdict(), found.value
        slope = np.concatenate([np.ravel(slopes[name]) for name in sorted(sizes)])
        return value**2 / 2, value * slope

    columns, step = [], 1e-4
    for entry in np.eye(point.size):
        near, far = (
            value_and_gradient(point + k * step * entry)[1]
            - value_and_gradient(point - k * step * entry)[1]
            for k in (1, 2)
        )
        columns.append((8 * near - far) / (12 * step))
    value, gradient = value_and_gradient(point)
    return inputs | softcap, point, value, gradient, np.stack(columns, -1)


@pytest.fixture
def problem(form, x64):
    """In float64, compiled without the optimisations that take the most time."""
    inputs, point, value, gradient, hessian = truth(form)
    softcap = {}
    if form == "statistics":
        softcap = {"softcap": inputs["softcap"]}
    moving, rest = parted({k: v for k, v in inputs.items() if k not in softcap})
    unravel = ravel_pytree(jax.tree.map(jnp.asarray, moving))[1]
    rest |= softcap

    def function(vector):
        return outputs(form, unravel(vector), rest) ** 2 / 2

    def by_hidden(hidden, labels, where):
        others = {k: v for k, v in moving.items() if k not in ("hidden", "weights")}
        fixed = {k: v for k, v in rest.items() if k not in ("labels", "where")}
        arrays = {"hidden": hidden, "labels": labels, "where": where, **fixed}
        return outputs(form, others, arrays)

    direction = np.random.default_rng(8).standard_normal(point.size)
    jax.config.update("jax_disable_most_optimizations", True)
    yield Problem(
        function, by_hidden, point, direction, inputs, value, gradient, hessian
    )
    jax.config.update("jax_disable_most_optimizations", False)


def forward(function, tangent):
    """Returns the derivative along a tangent, a function of the point."""
    return lambda x: jax.jvp(function, (x,), (tangent,))[1]


def reverse(function, tangent):
    """Returns the same by reverse mode."""
    return lambda x: jax.grad(function)(x) @ tangent


FIRST = {
    "grad": lambda f, x, v: jax.grad(f)(x),
    "remat": lambda f, x, v: jax.grad(jax.checkpoint(f))(x),
    "dots_saveable": lambda f, x, v: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)
    )(x),
    "jacfwd": lambda f, x, v: jax.jacfwd(f)(x),
    "jacrev": lambda f, x, v: jax.jacrev(f)(x),
    "grad inside scan": lambda f, x, v: jax.lax.scan(
        lambda c, w: (c + w * jax.grad(f)(x), None), jnp.zeros_like(x), jnp.ones(2) / 2
    )[0],
    "grad of scan": lambda f, x, v: jax.grad(
        lambda x: jax.lax.scan(
            lambda c, w: (c + w * f(x), None), jnp.zeros(()), jnp.ones(2) / 2
        )[0]
    )(x),
    "grad of scan, checkpointed": lambda f, x, v: jax.grad(
        lambda x: jax.lax.scan(
            jax.checkpoint(lambda c, w: (c + w * f(x), None)),
            jnp.zeros(()),
            jnp.ones(2) / 2,
        )[0]
    )(x),
    "vmap of grad": lambda f, x, v: jax.vmap(jax.grad(f))(jnp.stack([x, x])).mean(0),
    "grad of vmap": lambda f, x, v: jax.grad(
        lambda x: jax.vmap(f)(jnp.stack([x, x])).mean()
    )(x),
}


@every(FIRST)
def test_gradient(mode, problem):
    gradient = jax.jit(functools.partial(FIRST[mode], problem.function))
    computed = gradient(problem.point, problem.direction)
    np.testing.assert_allclose(computed, problem.gradient, rtol=1e-9, atol=1e-11)


ALONG = {
    "jvp": lambda f, x, v: forward(f, v)(x),
    "linearize": lambda f, x, v: jax.linearize(f, x)[1](v),
    "jvp in scan": lambda f, x, v: jax.lax.scan(
        lambda c, w: (c + w * forward(f, v)(x), None), jnp.zeros(()), jnp.ones(2) / 2
    )[0],
    "vmap of jvp": lambda f, x, v: (
        jax.vmap(lambda v: forward(f, v)(x))(jnp.stack([v, 3 * v])).mean() / 2
    ),
}


@every(ALONG)
def test_derivative_along_a_direction(mode, problem):
    along = jax.jit(functools.partial(ALONG[mode], problem.function))
    computed = along(problem.point, problem.direction)
    truth = problem.gradient @ problem.direction
    np.testing.assert_allclose(computed, truth, rtol=1e-10)


PRODUCTS = {
    "forward over reverse": lambda f, x, v: forward(jax.grad(f), v)(x),
    "reverse over reverse": lambda f, x, v: jax.grad(reverse(f, v))(x),
    "reverse over forward": lambda f, x, v: jax.grad(forward(f, v))(x),
    "forward over forward": lambda f, x, v: forward(forward(f, v), v)(x),
}


@every(PRODUCTS)
def test_product_with_the_hessian(mode, problem):
    product = jax.jit(functools.partial(PRODUCTS[mode], problem.function))
    computed = product(problem.point, problem.direction)
    truth = problem.hessian @ problem.direction
    if mode == "forward over forward":
        truth = problem.direction @ truth
    np.testing.assert_allclose(computed, truth, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("form", ["mean", "rows"])
@pytest.mark.parametrize(
    ("outer", "inner"), [(jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)]
)
def test_hessian(outer, inner, problem):
    computed = jax.jit(outer(inner(problem.function)))(problem.point)
    np.testing.assert_allclose(computed, problem.hessian, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_vmap(form, problem):
    """Over points, one of which drops what the other keeps."""
    inputs = problem.inputs
    hidden = np.stack([inputs["hidden"], -inputs["hidden"]])
    labels = np.stack([inputs["labels"], inputs["labels"][::-1]])
    where = np.stack([inputs["where"], ~inputs["where"]])
    one = jax.jit(jax.value_and_grad(problem.by_hidden))
    apart = [one(*row) for row in zip(hidden, labels, where, strict=True)]
    together = jax.jit(jax.vmap(jax.value_and_grad(problem.by_hidden)))
    values, gradients = together(hidden, labels, where)
    for index, (value, gradient) in enumerate(apart):
        np.testing.assert_allclose(values[index], value, rtol=1e-12)
        np.testing.assert_allclose(gradients[index], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_export(form, problem):
    """To StableHLO and back, value and gradient."""
    both = jax.jit(jax.value_and_grad(problem.function))
    shape = jax.ShapeDtypeStruct(problem.point.shape, np.float64)
    exported = jax.export.export(both)(shape).serialize()
    value, gradient = jax.export.deserialize(exported).call(problem.point)
    np.testing.assert_allclose(value, problem.value, rtol=1e-12)
    np.testing.assert_allclose(gradient, problem.gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("mode", "check_vma"),
    shortened(
        [
            ("gradient", False),
            ("gradient", True),
            ("jvp", False),
            ("jvp", True),
            ("forward over reverse", False),
            ("forward over reverse", True),
            ("inside", True),
        ],
        kept=[("gradient", True), ("forward over reverse", False)],
    ),
)
def test_shard_map(mode, check_vma, form, problem):
    """Rows sharded, the layer and options replicated: their gradients are summed.

    With check_vma=False JAX wants the gradient taken outside.
    """
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])
    inputs = jax.tree.map(jnp.asarray, problem.inputs)
    names = {"hidden", *ALL.moving} - {"weights"}
    names = [name for name in inputs if name in names]
    point = {k: inputs.pop(k) for k in names}

    def spec_of(arrays):
        return {
            name: jax.P("data") if array.shape[:1] == (ROWS,) else jax.P()
            for name, array in arrays.items()
        }

    def summed(point, inputs):
        return jax.lax.psum(outputs(form, point, inputs), "data")

    def mapped(function, out_specs):
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(spec_of(point), spec_of(inputs)),
            out_specs=out_specs,
            check_vma=check_vma,
        )

    def apart(point):
        """Sums s over the two halves of the rows, without a mesh."""
        arrays, total = {**point, **inputs}, 0.0
        for half in (slice(0, 2), slice(2, 4)):
            part = {
                name: array[half] if array.shape[:1] == (ROWS,) else array
                for name, array in arrays.items()
            }
            moving = {name: part.pop(name) for name in names}
            total = total + outputs(form, moving, part)
        return total

    direction = jax.tree.map(jnp.cos, point)

    def run(function, point):
        if mode == "jvp":
            return jax.jvp(function, (point,), (direction,))[1]
        if mode == "forward over reverse":
            return jax.jvp(jax.grad(function), (point,), (direction,))[1]
        return jax.grad(function)(point)

    if mode == "inside":
        gradient = mapped(jax.grad(summed), spec_of(point))
        computed = jax.jit(lambda p: gradient(p, inputs))(point)
    else:
        total = mapped(summed, jax.P())
        computed = jax.jit(lambda p: run(lambda p: total(p, inputs), p))(point)
    expected = jax.jit(functools.partial(run, apart))(point)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        computed,
        expected,
    )


@pytest.mark.parametrize("form", ["mean", "rows"])
@pytest.mark.parametrize("frozen", ["kernel", "hidden"])
def test_frozen(frozen, form, problem):
    """A gradient by the others alone is the same."""
    inputs, _, _, gradient, _ = truth(form)
    arrays = {k: v for k, v in inputs.items() if form != "statistics" or k != "softcap"}
    moving, rest = parted(arrays)
    if form == "statistics":
        rest["softcap"] = inputs["softcap"]
    unravel = ravel_pytree(jax.tree.map(jnp.asarray, moving))[1]
    expected = unravel(jnp.asarray(gradient))
    stopped = {frozen: moving.pop(frozen)}
    computed = jax.jit(jax.grad(lambda m: outputs(form, m, rest | stopped) ** 2 / 2))(
        moving
    )
    for name, array in computed.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("reduction", "checkpointed"), [("mean", False), ("sum", True)]
)
def test_gradient_accumulated_over_microbatches(reduction, checkpointed, rng):
    """The gradient taken inside the loop, as the documentation recommends."""
    inputs = head_inputs(rng, (12,), 3, 7, ("where", "weights", "bias"))
    inputs = jax.tree.map(lambda a: jnp.asarray(a), inputs)
    inputs = jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        inputs,
    )
    params = {name: inputs.pop(name) for name in ("kernel", "bias")}
    batches = jax.tree.map(lambda a: a.reshape(3, 4, *a.shape[1:]), inputs)

    def loss(params, batch):
        return LOSS(**params, **batch, reduction=reduction, row_block=3)

    body = jax.checkpoint(loss) if checkpointed else loss

    @jax.jit
    def accumulated(params):
        def step(total, batch):
            found = jax.value_and_grad(body)(params, batch)
            return jax.tree.map(jnp.add, total, found), None

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(step, start, batches)[0]

    value, gradients = accumulated(params)
    parts = [
        oracle.linear_softmax_cross_entropy(
            **params, **jax.tree.map(lambda a, i=i: a[i], batches), reduction=reduction
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(value, sum(part.value for part in parts), rtol=1e-5)
    for name, gradient in gradients.items():
        true = sum(getattr(part, name) for part in parts)
        np.testing.assert_allclose(gradient, true, rtol=1e-4, atol=1e-5)
