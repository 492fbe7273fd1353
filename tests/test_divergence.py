"""The divergence of two softmaxes, given as logits and as linear heads."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from grids import shortened

import xent_jax

KL = xent_jax.softmax_kl_divergence
HEAD = xent_jax.linear_softmax_kl_divergence
DIRECTIONS = ("forward", "reverse")
both = pytest.mark.parametrize("direction", DIRECTIONS)


def exact(logits, teacher, direction):
    """Returns the divergence of rows in 60 digits."""
    values = []
    with mpmath.workdps(60):
        for row in zip(logits.tolist(), teacher.tolist(), strict=True):
            logs = []
            for numbers in row:
                numbers = [mpmath.mpf(number) for number in numbers]
                total = mpmath.log(mpmath.fsum(map(mpmath.exp, numbers)))
                logs.append([number - total for number in numbers])
            p, q = logs if direction == "reverse" else reversed(logs)
            terms = [mpmath.exp(a) * (a - b) for a, b in zip(p, q, strict=True)]
            values.append(float(mpmath.fsum(terms)))
    return np.array(values)


@both
@pytest.mark.parametrize(
    "classes", [2, 37, pytest.param(300, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_near_distributions_keep_their_digits(classes, offset, direction, rng):
    """Down to 1e-12 nats, to a few ulp, and wherever the logits are."""
    teacher = (3 * rng.standard_normal((4, classes)) + offset).astype(np.float32)
    for distance in (3e-5, 1e-3, 0.1, 3, 30):
        near = teacher + distance * rng.standard_normal(teacher.shape)
        logits = (near.astype(np.float32) - np.float32(offset)).astype(np.float32)
        truth = exact(logits, teacher, direction)
        computed = np.asarray(KL(logits, teacher, direction=direction), np.float64)
        np.testing.assert_allclose(computed, truth, rtol=2e-6, atol=1e-17)


@both
def test_equal_logits_have_none(direction, rng):
    logits = (9 * rng.standard_normal((6, 501))).astype(np.float32)
    run = functools.partial(KL, direction=direction)
    for form in (run, jax.jit(run)):
        assert not np.any(form(logits, logits.copy()))
    gradient = jax.grad(lambda x: run(x, logits).sum())(logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("masked", [None, "rows", "classes"])
def test_equals_the_oracle(masked, dtype, direction, rng):
    shape = (5, 21)
    logits, teacher = (
        jnp.asarray(2 * rng.standard_normal(shape), dtype) for _ in range(2)
    )
    where = (
        None if masked is None else rng.random(shape[: 1 + (masked != "rows")]) < 0.7
    )
    run = functools.partial(KL, where=where, direction=direction, temperature=1.7)
    truth = oracle.softmax_kl_divergence(
        *(np.asarray(one).astype(np.float64) for one in (logits, teacher)),
        where=where,
        direction=direction,
        temperature=1.7,
    )
    loss = run(logits, teacher)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, truth.value, rtol=3e-6, atol=1e-7)
    gradients = jax.grad(lambda x, t: run(x, t).sum(), (0, 1))(logits, teacher)
    assert gradients[0].dtype == logits.dtype
    np.testing.assert_allclose(
        np.asarray(gradients[0], np.float64),
        truth.gradient,
        rtol=max(0.52 * float(jnp.finfo(dtype).eps), 1e-5),
        atol=2e-7,
    )
    assert not np.any(gradients[1])  # the teacher is a constant
    assert np.all(
        jax.grad(lambda t: KL(logits, teacher, temperature=t).sum())(2.0) == 0
    )


def test_special_values():
    inf = np.inf
    logits = jnp.array([[0, 1, -inf], [0, 1, -inf], [0, 1, 2], [-inf] * 3, [inf, 0, 0]])
    teacher = jnp.array([[1, 0, -inf], [1, 0, 0], [1, 0, -inf], [0, 0, 0], [0, 0, 0]])
    forward = KL(logits, teacher)
    reverse = KL(logits, teacher, direction="reverse")
    two = oracle.softmax_kl_divergence([[0, 1.0]], [[1.0, 0]]).value[0]
    np.testing.assert_allclose(forward[:2], [two, inf], rtol=1e-6)
    assert np.isfinite(forward[2])
    np.testing.assert_allclose(reverse[::2][:2], [two, inf], rtol=1e-6)
    assert np.isfinite(reverse[1])
    for loss in (forward, reverse):
        assert np.all(np.isnan(loss[3:]))
    gradient = jax.grad(lambda x: KL(x, teacher).sum())(logits)
    assert np.all(np.isfinite(gradient[:3]))
    keep = np.array([True, False, True, False, False])
    value, gradient = jax.value_and_grad(lambda x: KL(x, teacher, where=keep).sum())(
        logits
    )
    assert np.isfinite(value)
    assert not np.any(gradient[~keep])


def heads(rng, features=(6, 4), rows=9, classes=300):
    student, teacher = (rng.standard_normal((rows, size)) for size in features)
    kernels = (rng.standard_normal((size, classes)) for size in features)
    arrays = (student, next(kernels), teacher, next(kernels))
    return [array.astype(np.float32) for array in arrays]


@both
def test_a_temperature_for_every_row(direction, rng):
    logits, teacher = rng.standard_normal((2, 4, 3, 6)).astype(np.float32)
    temperature = rng.uniform(0.5, 2, (4, 6)).astype(np.float32)
    run = functools.partial(KL, axis=1, direction=direction)
    loss = run(logits, teacher, temperature=temperature)
    divided = (one / temperature[:, None] for one in (logits, teacher))
    np.testing.assert_allclose(loss, run(*divided), rtol=1e-5)
    with pytest.raises(ValueError, match=r"temperature must have shape \(4, 6\)"):
        run(logits, teacher, temperature=temperature[0])


@both
@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
@pytest.mark.parametrize("full", shortened([False, True], kept=[True]))
def test_heads_equal_given_logits(full, reduction, direction, rng, unoptimized):
    hidden, kernel, teacher, teacher_kernel = heads(rng)
    rows, classes = len(hidden), kernel.shape[1]
    bias, other = rng.standard_normal((2, classes)).astype(np.float32)
    weights = rng.random(rows).astype(np.float32)
    keep, mask = rng.random(rows) < 0.7, np.arange(classes) < classes - 5
    temperature = rng.uniform(0.5, 2, rows).astype(np.float32)
    options = {"class_block": 64} if reduction is None else {"row_block": 4}
    if full:
        options |= {
            "weights": weights,
            "where": keep,
            "class_mask": mask,
            "temperature": temperature,
            "softcap": 3.0,
            "teacher_softcap": 4.0,
            "bias": bias,
            "teacher_bias": other,
        }

    def head(hidden, kernel):
        return HEAD(
            hidden,
            kernel,
            teacher,
            teacher_kernel,
            reduction=reduction,
            direction=direction,
            **options,
        )

    def given(hidden, kernel):
        logits, others = hidden @ kernel, teacher @ teacher_kernel
        if not full:
            loss = KL(logits, others, direction=direction)
            return loss if reduction is None else getattr(loss, reduction)()
        logits = 3 * jnp.tanh((logits + bias[None]) / 3) / temperature[:, None]
        others = 4 * np.tanh((others + other) / 4) / temperature[:, None]
        where = keep[:, None] & np.broadcast_to(mask, logits.shape)
        loss = weights * KL(logits, others, where=where, direction=direction)
        if reduction == "mean":
            return loss.sum() / (weights * keep).sum()
        return loss if reduction is None else loss.sum()

    np.testing.assert_allclose(head(hidden, kernel), given(hidden, kernel), rtol=2e-5)
    gradients = [
        jax.jit(jax.grad(lambda h, k, f=f: f(h, k).sum(), (0, 1)))(hidden, kernel)
        for f in (head, given)
    ]
    for one, other in zip(*gradients, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * scale)


@both
@pytest.mark.parametrize("reduction", [None, "mean"])
def test_heads_near_each_other(reduction, direction, rng):
    """Blocks of classes are added without losing what is small: a pivot is shared."""
    hidden, kernel, *_ = heads(rng, classes=1000)
    near = (kernel + 1e-2 * rng.standard_normal(kernel.shape)).astype(np.float32)
    block = {"class_block": 128} if reduction is None else {}
    loss = HEAD(
        hidden, kernel, hidden, near, reduction=reduction, direction=direction, **block
    )
    wide = [array.astype(np.float64) for array in (hidden, kernel, near)]
    truth = oracle.softmax_kl_divergence(
        wide[0] @ wide[1], wide[0] @ wide[2], direction=direction
    ).value
    truth = truth if reduction is None else truth.mean()
    np.testing.assert_allclose(loss, truth, rtol=0, atol=3e-5 * np.max(truth))


@both
@pytest.mark.parametrize("reduction", [None, "sum"])
def test_heads_of_distributions_that_are_far(reduction, direction, rng):
    hidden, kernel, teacher, other = heads(rng)
    loss = HEAD(
        40 * hidden,
        kernel,
        40 * teacher,
        other,
        reduction=reduction,
        direction=direction,
        **({"class_block": 64} if reduction is None else {}),
    )
    wide = [array.astype(np.float64) for array in (hidden, kernel, teacher, other)]
    truth = oracle.softmax_kl_divergence(
        40 * wide[0] @ wide[1], 40 * wide[2] @ wide[3], direction=direction
    ).value
    truth = truth if reduction is None else truth.sum()
    np.testing.assert_allclose(loss, truth, rtol=1e-4)


@pytest.mark.parametrize(("reduction", "matmuls"), [(None, (2, 6)), ("mean", (2, 4))])
def test_matmuls(reduction, matmuls, rng):
    """The teacher's and the student's for the value, four for its gradient."""
    arguments = heads(rng)

    def loss(hidden, kernel):
        return HEAD(hidden, kernel, *arguments[2:], reduction=reduction).sum()

    def count(function):
        text = jax.jit(function).lower(*arguments[:2]).as_text()
        return text.count("stablehlo.dot_general")

    # Of blocks of classes one more, of the few that the pivot is made of, and the
    # teacher's of those.
    few = 2 if reduction is None else 0
    assert count(loss) == matmuls[0] + few
    assert count(jax.grad(loss, (0, 1))) == matmuls[1] + few


def test_bad_arguments_are_named(rng):
    arguments = heads(rng)
    with pytest.raises(ValueError, match="direction must be 'forward' or 'reverse'"):
        HEAD(*arguments, direction="both")
    with pytest.raises(ValueError, match=r"teacher_kernel must have shape \(4, 300\)"):
        HEAD(*arguments[:3], arguments[3][:, :7])
    with pytest.raises(ValueError, match=r"teacher_hidden must have shape \(9, 4\)"):
        HEAD(*arguments[:2], arguments[2][:5], arguments[3])
    with pytest.raises(ValueError, match=r"teacher_logits must have shape \(2, 3\)"):
        KL(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="temperature must lie in"):
        KL(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=0)
