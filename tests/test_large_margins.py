"""Every nesting of forward and reverse mode at large margins, to third order.

The truth is a mixed difference of the plain formula in enough digits of mpmath for a
margin of a billion. A derivative is taken along one direction by each of the modes that
are nested: forward mode gives it at once, reverse mode a gradient that the direction is
multiplied with. So the order and the nesting do not change what is expected.
"""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
import registry
from grids import shortened
from registry import Case

import xent_jax

MARGINS = [-1e9, -130.0, 95.0, 130.0, 1e3, 1e9, "one class", "one kept class"]
THIRD = [pytest.mark.once, pytest.mark.exhaustive]
MODES = [
    pytest.param(nesting, marks=THIRD if len(nesting) == 3 else ())
    for order in (1, 2, 3)
    for nesting in itertools.product(("fwd", "rev"), repeat=order)
]
NAMES = ["-".join(mode.values[0]) for mode in MODES]
DIRECTIONS = np.array(
    [[0.5, -1.0, 0.25, 2.0], [1.5, 0.75, -0.5, -1.0], [-0.25, 1.0, 2.0, 0.5]]
)
IDS = registry.FUNCTIONS[registry.IDS]


def _options():
    """Returns what may be given with ids: nothing, each by itself, and all."""
    case = Case(IDS, IDS.unmasked())
    drawn = registry.narrow(
        case.draw(np.random.default_rng(1), registry.Sizes((1,), 4))
    )
    values = {w: drawn[w] if drawn[w].ndim else float(drawn[w]) for w in case.words}
    alone = {word: {word: value} for word, value in values.items()}
    return {"plain": {}, **alone, "all": values}


OPTIONS = _options()
EACH_OPTION = [
    pytest.param(
        options,
        id=name,
        marks=() if name in ("plain", "all") else pytest.mark.exhaustive,
    )
    for name, options in OPTIONS.items()
]
LABEL = 1


def point(margin):
    """Returns logits whose label leads by the margin, and the classes that count."""
    keep = np.ones(4, bool)
    if margin == "one class":
        return np.array([0.5, 200.0, 0.5, 0.5])[1:2], keep[:1]
    logits = np.array([0.0, 0.0, 1.0, -2.0])
    if margin == "one kept class":
        logits[LABEL], keep = 200.0, np.arange(4) == LABEL
        return logits, keep
    logits[LABEL] = 1.0 + margin
    return logits, keep


def true_derivative(function, order):
    """Returns the mixed derivative at 0 by as many numbers, from exact differences.

    Central differences of steps of 1e-30 in 120 digits: right to 1e-60.
    """
    with mpmath.workdps(160):
        step = mpmath.mpf(10) ** -30
        total = mpmath.mpf(0)
        for signs in itertools.product((1, -1), repeat=order):
            sign = int(np.prod(signs))
            total += sign * function([step * s for s in signs])
        return float(total / (2 * step) ** order)


def along(function, nesting, directions):
    """Returns the derivative of a scalar function along directions, innermost first."""
    for mode, direction in zip(nesting, directions, strict=False):
        if mode == "fwd":
            function = forward(function, direction)
        else:
            function = reverse(function, direction)
    return function


def forward(function, direction):
    return lambda x: jax.jvp(function, (x,), (direction,))[1]


def reverse(function, direction):
    return lambda x: jnp.sum(
        jax.grad(function)(x).astype(jnp.float32) * direction.astype(jnp.float32)
    )


def check(computed, truth, scale):
    """Asserts equality to what rounding of terms of size `scale` allows."""
    assert np.isfinite(computed)
    np.testing.assert_allclose(computed, truth, rtol=2e-4, atol=2e-5 * scale + 1e-36)


def derivative_scale(options, order):
    """How large the terms are that a derivative is the sum of."""
    size = np.abs(DIRECTIONS[:order]).max(-1).prod()
    return size * (4 if options.get("z_loss") else 1) if order > 1 else size


def narrowed(options, size):
    """Returns options in float32, of the classes that there are."""
    return {
        name: np.asarray(value[:size], np.float32) if np.ndim(value) else value
        for name, value in options.items()
    }


def moved(start, directions, steps):
    """Returns numbers in mpmath, moved along directions."""
    return [
        mpmath.mpf(float(number))
        + mpmath.fsum(
            step * float(direction[index])
            for step, direction in zip(steps, directions, strict=True)
        )
        for index, number in enumerate(start)
    ]


@pytest.mark.parametrize("nesting", MODES, ids=NAMES)
@pytest.mark.parametrize("options", EACH_OPTION)
@pytest.mark.parametrize("kind", ["ids", "dense"])
def test_losses_of_logits(kind, options, nesting):
    loss = {
        "ids": xent_jax.softmax_cross_entropy_with_integer_labels,
        "dense": xent_jax.softmax_cross_entropy,
    }[kind]
    order = len(nesting)

    @jax.jit
    def derivative(logits, keep):
        size = logits.size
        label = min(LABEL, size - 1)
        target = jnp.eye(size)[label] if kind == "dense" else jnp.array(label)

        def scalar(x):
            return loss(x, target, where=keep, **narrowed(options, size))

        directions = jnp.asarray(DIRECTIONS[:, :size], jnp.float32)
        return along(scalar, nesting, directions)(logits)

    for margin in MARGINS:
        logits, keep = point(margin)
        size = len(logits)
        cut = {k: v[:size] if np.ndim(v) else v for k, v in options.items()}
        computed = derivative(jnp.asarray(logits, jnp.float32), jnp.asarray(keep))

        def exact(steps, logits=logits, keep=keep, size=size, cut=cut):
            x = moved(logits, DIRECTIONS[:order, :size], steps)
            return oracle.exact_loss_of_a_row(x, keep, min(LABEL, size - 1), **cut)

        truth = true_derivative(exact, order)
        large = abs(float(logits.max())) if cut.get("z_loss") and order < 3 else 1
        check(computed, truth, derivative_scale(cut, order) * max(large, 1))


@pytest.mark.parametrize("nesting", MODES, ids=NAMES)
@pytest.mark.parametrize("options", shortened(["plain", "all"], kept=["all"]))
@pytest.mark.parametrize("by", ["hidden", "kernel"])
@pytest.mark.parametrize("reduction", [None, "sum"])
def test_heads(reduction, by, options, nesting):
    """The features are 1 and 0: the first row of the kernel is the logits."""
    order, options = len(nesting), OPTIONS[options]
    if by == "kernel":
        moves = np.stack([DIRECTIONS, DIRECTIONS[::-1]], 1)[:order]
    else:
        moves = DIRECTIONS[:order, None, :2] / 64

    @jax.jit
    def derivative(slopes, keep):
        def scalar(x):
            return xent_jax.linear_softmax_cross_entropy(
                x if by == "hidden" else jnp.array([[1.0, 0.0]]),
                x if by == "kernel" else slopes,
                jnp.array([LABEL]),
                class_mask=keep,
                reduction=reduction,
                **narrowed(options, 4),
            ).sum()

        start = slopes if by == "kernel" else jnp.array([[1.0, 0.0]])
        return along(scalar, nesting, jnp.asarray(moves, jnp.float32))(start)

    for margin in (-130.0, 95.0, 1e3, "one kept class"):
        logits, keep = point(margin)
        slopes = np.array([logits, [0.25, -0.5, 1.0, 0.5]])
        computed = derivative(jnp.asarray(slopes, jnp.float32), jnp.asarray(keep))

        def exact(steps, slopes=slopes, keep=keep):
            if by == "kernel":
                x = moved(slopes[0], moves[:, 0], steps)
            else:
                left, right = moved([1.0, 0.0], moves[:, 0], steps)
                x = [left * float(a) + right * float(b) for a, b in slopes.T]
            return oracle.exact_loss_of_a_row(x, keep, LABEL, **options)

        truth = true_derivative(exact, order)
        large = max(abs(float(logits.max())), 1)
        scale = large**order / 16**order if by == "hidden" else 1
        if options.get("z_loss"):
            scale *= large
        check(computed, truth, derivative_scale(options, order) * max(scale, 1))


@pytest.mark.parametrize("outer", ["fwd", "rev"])
@pytest.mark.parametrize("field", ["log_prob", "log_normalizer", "entropy"])
def test_statistics(field, outer):
    """Second derivatives are finite, and 0 where a row is as good as certain."""
    for margin in (130.0, 1e3, 1e9, "one kept class"):
        logits, keep = point(margin)

        def scalar(kernel, keep=keep):
            statistics = xent_jax.linear_softmax_statistics(
                jnp.ones((1, 1)), kernel, jnp.array([LABEL]), class_mask=keep
            )
            return getattr(statistics, field).sum()

        directions = jnp.asarray(DIRECTIONS[:2, None], jnp.float32)
        kernel = jnp.asarray(logits[None], jnp.float32)
        for inner in ("fwd", "rev"):
            derivative = along(scalar, (inner, outer), directions)
            np.testing.assert_allclose(derivative(kernel), 0, atol=1e-30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rivals_masked_by_the_caller(dtype):
    lowest = {"bfloat16": -1e9, "float16": -6e4, "float32": -1e9}[dtype]
    logits = jnp.full((1, 4), lowest, dtype).at[0, 1].set(2.0)

    def loss(x):
        return xent_jax.softmax_cross_entropy_with_integer_labels(
            x, jnp.array([1])
        ).sum()

    def tangent(x):
        return jax.jvp(loss, (x,), (jnp.ones_like(x),))[1]

    assert not np.any(jax.grad(tangent)(logits))
    assert not np.any(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(logits))


@pytest.mark.parametrize("margin", [95.0, 1e3, 1e9])
def test_no_nan_on_the_way(margin):
    """`jax.hessian` of a confident row, where a NaN anywhere would raise."""
    logits = jnp.asarray(point(margin)[0], jnp.float32)
    with jax.debug_nans(True):
        for loss, label in (
            (xent_jax.softmax_cross_entropy_with_integer_labels, jnp.array(LABEL)),
            (xent_jax.softmax_cross_entropy, jnp.eye(4)[LABEL]),
        ):
            hessian = jax.hessian(lambda x, loss=loss, label=label: loss(x, label))
            np.testing.assert_allclose(hessian(logits), 0, atol=1e-30)
