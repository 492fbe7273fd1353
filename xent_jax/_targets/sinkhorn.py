"""Sinkhorn's iteration on the potentials of the prototypes.

The state is one potential g a prototype, in the units of the scores; the targets are
softmax((scores − g)/ε), row by row. The first iteration makes g a log-sum-exp over the
rows. From then on the column sums of the targets say by how much g is to move. After a
column and a row step a column holds at least its share of one row,

    Σ_i Q_ij / (Σ_k Q_ik) ≥ Σ_i Q_ij / N = prior_j,

because a row of a matrix whose columns sum to N·prior adds up to N at most. So a column
never starves, the logarithm of its sum is of moderate size, and no second look at the
scores is needed.

At a small ε the scores/ε are large numbers whose differences count. A potential is
therefore two numbers, `high` + `low`, and nothing is rounded before the subtraction
that leaves small numbers: see `_powers`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import AxisName, psum
from xent_jax._reductions.precision import two_sum
from xent_jax._reductions.tangents import known_tangents, tangent_of

# How far the potentials may move, in ε, before the exponentials are taken anew: at this
# distance neither exp(−δ/ε) nor what underflowed loses anything that counts.
_FAR = 8

_fixed = jax.lax.stop_gradient


class Problem(NamedTuple):
    """What the iterations have in common. N rows are samples, K columns prototypes."""

    scores: jax.Array  # [N, K], 0 in rows that do not count
    counted: jax.Array | None  # bool[N, 1], somewhere True
    prior: jax.Array  # [1, K], positive, of sum 1
    epsilon: jax.Array


class Potentials(NamedTuple):
    """The unevaluated sum of two arrays [1, K], the second at most an ulp of the first.

    Differentiation sees the first only: the second is rounding.
    """

    high: jax.Array
    low: jax.Array


class Reference(NamedTuple):
    """Potentials and what was computed at them: constants to differentiation."""

    potentials: Potentials
    largest: jax.Array  # the largest `scores − high` of every row, [N, 1]
    powers: jax.Array  # `_powers`, [N, K]


@functools.partial(jax.jit, static_argnames=("num_iters", "batch_axis_name"))
def solve(
    problem: Problem,
    num_iters: int,
    tol: jax.Array | None,
    batch_axis_name: AxisName,
) -> jax.Array:
    """Returns the targets, [N, K], after `num_iters` iterations or balance to `tol`.

    All arrays are of one dtype, that of the computation.

    Reverse mode keeps the scores, a pivot a row, and the potentials of every iteration.
    """
    start = jax.checkpoint(functools.partial(_first, batch_axis_name))(problem)
    reference = _reference(problem, start)

    def sums(potentials: Potentials) -> jax.Array:
        return _column_sums(problem, potentials, reference)

    def update(potentials: Potentials, sums: jax.Array) -> tuple[Potentials, jax.Array]:
        total = psum(sums, batch_axis_name)
        # Rows sum to one, so the column sums add up to the number of rows.
        ratio = total / (problem.prior * jnp.sum(total, axis=-1, keepdims=True))
        moved = _moved(potentials, jnp.log(ratio), problem.epsilon)
        return moved, jnp.max(jnp.abs(ratio - 1))

    def always(potentials: Potentials, _: None) -> tuple[Potentials, None]:
        return update(potentials, sums(potentials))[0], None

    def until_balanced(
        tol: jax.Array, carry: tuple[Potentials, jax.Array], _: None
    ) -> tuple[tuple[Potentials, jax.Array], None]:
        potentials, done = carry
        # The collective stays outside: a shard never waits for one that has left.
        local = jax.lax.cond(
            done, functools.partial(_no_sums, reference), sums, potentials
        )
        moved, error = update(potentials, local)
        done |= error < tol
        kept = jax.tree.map(lambda old, new: jnp.where(done, old, new), carry[0], moved)
        return (kept, done), None

    steps = num_iters - 1
    if tol is None:
        step = jax.checkpoint(always, prevent_cse=False)
        potentials, _ = jax.lax.scan(step, start, length=steps)
    else:
        # Where a potential is NaN, nothing is left to do.
        carry = start, jnp.any(jnp.isnan(start.high))
        step = functools.partial(until_balanced, tol)
        step = jax.checkpoint(step, prevent_cse=False)
        (potentials, _), _ = jax.lax.scan(step, carry, length=steps)
    return jax.checkpoint(_targets)(problem, potentials, reference)


def _first(batch_axis_name: AxisName, problem: Problem) -> Potentials:
    """Returns the potentials of the first iteration: ε·log Σ_i exp(scores/ε) / prior.

    Without the logarithm of N, which is common to all and so without effect.
    """
    scores = problem.scores
    if problem.counted is not None:
        scores = jnp.where(problem.counted, scores, -jnp.inf)
    top = jnp.max(_fixed(scores), axis=0, keepdims=True, initial=-jnp.inf)
    if batch_axis_name is not None:
        top = jax.lax.pmax(top, batch_axis_name)
    powers = _exponential(scores - top, problem.epsilon)
    mass = psum(jnp.sum(powers, axis=0, keepdims=True), batch_axis_name)
    start = Potentials(top, jnp.zeros_like(top))
    return _moved(start, jnp.log(mass / problem.prior), problem.epsilon)


def _moved(potentials: Potentials, steps: jax.Array, epsilon: jax.Array) -> Potentials:
    """Returns the potentials plus `epsilon·steps`."""
    # Between the product and the sum stands a select, which changes nothing, because
    # compilers make one fused operation of a product and a sum: of this one in one
    # place, and not in another that computes the same number again, so that the two
    # numbers would differ by an ulp that belongs in `low`.
    step = jnp.where(jnp.isfinite(steps), epsilon * steps, steps)
    return Potentials(*two_sum(potentials.high, step + potentials.low))


def _exponential(difference: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Returns exp(difference/ε), and 0 with derivatives of 0 where that underflows.

    So −inf does not get into the derivative by ε, which would be 0·inf.
    """
    lowest = 2 * math.log(jnp.finfo(difference.dtype).tiny) * _fixed(epsilon)
    return jnp.exp(jnp.maximum(difference, lowest) * (1 / epsilon))


def _largest(problem: Problem, high: jax.Array) -> jax.Array:
    """Returns the largest `scores − high` of every row."""
    return jnp.max(_fixed(problem.scores) - _fixed(high), axis=-1, keepdims=True)


def _powers(problem: Problem, potentials: Potentials, largest: jax.Array) -> jax.Array:
    """Returns exp((scores − potentials − pivot)/ε), [N, K], about 1 at most.

    The pivot of a row is any number near its largest entry. What is subtracted from a
    score, `high` + pivot, is exact once both are rounded to one grid, coarse enough for
    the sum of any two; the difference is then right to an ulp of itself. What the
    rounding of `high` left over is small, and subtracted last.
    """
    high = _fixed(potentials.high)
    # Adding and subtracting four times the largest magnitude rounds to such a grid.
    grid = 4 * jnp.maximum(jnp.max(jnp.abs(high)), jnp.max(jnp.abs(largest), initial=0))
    coarse = (potentials.high + grid) - grid
    rest = (potentials.high - coarse) + potentials.low
    exact = coarse + ((largest + grid) - grid)
    below = (problem.scores - exact) - rest
    # Where the grid is coarse beside ε, the pivot that was rounded to it is not near.
    far = grid * jnp.finfo(grid.dtype).eps > _FAR * _fixed(problem.epsilon)
    pivot = jax.lax.cond(far, _row_maxima, _row_zeros, _fixed(below), _fixed(largest))
    return _exponential(below - pivot, problem.epsilon)


def _row_maxima(numbers: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.max(numbers, axis=-1, keepdims=True)


def _row_zeros(_: jax.Array, largest: jax.Array) -> jax.Array:
    """Returns zeros that are sharded, and vary over mesh axes, as maxima do."""
    return jnp.where(largest == 0, 0, jnp.zeros_like(largest))


def _reference(problem: Problem, potentials: Potentials) -> Reference:
    """Returns the exponentials at the potentials."""
    problem, potentials = _fixed((problem, potentials))
    largest = _largest(problem, potentials.high)
    return Reference(potentials, largest, _powers(problem, potentials, largest))


def _moves(potentials: Potentials, reference: Reference) -> jax.Array:
    """Returns how far the potentials are from those of the reference, [1, K].

    But for a number that all have in common, which is without effect.
    """
    old = reference.potentials
    moves = (potentials.high - old.high) + (potentials.low - old.low)
    fixed = _fixed(moves)
    return moves - (jnp.max(fixed) + jnp.min(fixed)) / 2


def _is_far(problem: Problem, moves: jax.Array) -> jax.Array:
    """Returns whether a potential is too far from the reference's."""
    return jnp.max(jnp.abs(_fixed(moves))) > _FAR * _fixed(problem.epsilon)


@jax.custom_jvp
def _column_sums(
    problem: Problem, potentials: Potentials, reference: Reference
) -> jax.Array:
    """Returns the column sums of the targets over the rows at hand, [1, K]."""

    def of_powers(moves: jax.Array) -> jax.Array:
        powers, factors = reference.powers, jnp.exp(-moves / problem.epsilon)
        weights = 1 / jnp.sum(powers * factors, axis=-1, keepdims=True)
        return factors * _total(problem, powers, weights)

    moves = _moves(potentials, reference)
    return jax.lax.cond(
        _is_far(problem, moves),
        lambda _: _sums_of_scores(problem, potentials),
        of_powers,
        moves,
    )


@functools.partial(_column_sums.defjvp, symbolic_zeros=True)
def _column_sums_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    # By way of the scores alone: reverse mode then keeps no exponentials.
    dots = known_tangents(tangents[:2])
    return tangent_of(_sums_of_scores, primals[:2], dots)


def _sums_of_scores(problem: Problem, potentials: Potentials) -> jax.Array:
    """Returns the column sums from exponentials of the scores."""
    largest = _largest(problem, potentials.high)
    powers = _powers(problem, potentials, largest)
    return _total(problem, powers, 1 / jnp.sum(powers, axis=-1, keepdims=True))


def _total(problem: Problem, powers: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the weighted sum of the rows that count, [1, K]."""
    if problem.counted is not None:
        weights = jnp.where(problem.counted, weights, 0)
    return jnp.sum(powers * weights, axis=0, keepdims=True)


def _no_sums(reference: Reference, potentials: Potentials) -> jax.Array:
    """Returns ones that are sharded, and vary over mesh axes, as column sums do."""
    of_rows = jnp.max(reference.largest, keepdims=True, initial=-jnp.inf)
    return jnp.where(of_rows == potentials.high, jnp.ones_like(of_rows), 1)


def _targets(
    problem: Problem, potentials: Potentials, reference: Reference
) -> jax.Array:
    """Returns the targets, [N, K]."""
    far = _is_far(problem, _moves(potentials, reference))
    largest = jax.lax.cond(
        far,
        functools.partial(_largest, problem),
        lambda _: reference.largest,
        potentials.high,
    )
    powers = _powers(problem, potentials, _fixed(largest))
    return powers / jnp.sum(powers, axis=-1, keepdims=True)
