"""Balanced soft targets by Sinkhorn's iteration, and the cross-entropy with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from xent_jax._arguments import arrays, checks, placement
from xent_jax._forms.rows import Given, row_results
from xent_jax._reductions.axis import AxisName, ClassAxis, psum
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets import sinkhorn
from xent_jax._targets.block import Block, class_ids, zero_in_dropped_rows
from xent_jax._targets.dense import DenseTargets
from xent_jax._targets.sinkhorn import Problem


@jax.named_scope("sinkhorn_targets")
def sinkhorn_targets(
    scores: ArrayLike,
    *,
    epsilon: ArrayLike = 0.05,
    num_iters: int = 3,
    tol: ArrayLike | None = None,
    where: ArrayLike | None = None,
    prior: ArrayLike | None = None,
    batch_axis_name: AxisName = None,
) -> jax.Array:
    """Soft assignments of samples to prototypes, balanced by Sinkhorn's iteration.

        Q = exp(scores/epsilon);  num_iters times:
            Q[:, k] ← Q[:, k]·N·prior[k] / Σ_n Q[n, k]    (prototypes)
            Q[n, :] ← Q[n, :] / Σ_k Q[n, k]               (samples)

    The targets of SwAV, DINO and their kin: rows sum to one, and columns approach
    N·prior, so that no prototype takes all samples. Columns come first, so the result
    of a few iterations depends on an offset common to a row of scores: subtracting the
    row's maximum, which is often done against overflow, changes it. Here nothing
    overflows: the iteration runs on logarithms and equals the formula at every
    `num_iters`, for epsilon down to 1e-3 and scores of any offset. How soon the columns
    are balanced depends on epsilon and on the scores.

    Cost: N·K exponentials, which every iteration reads, and reads once more to carry K
    potentials on; they are computed anew where potentials have moved by more than 8
    epsilon. Under differentiation every iteration computes them: targets that are to be
    constants are cheapest of `stop_gradient(scores)`. The gradient keeps the scores, in
    the dtype of the computation, and the potentials of every iteration, not Q, and
    repeats it.

    Args:
      scores: `float[N, K]`. Similarities of N samples and K prototypes, in the units of
        `epsilon`. For costs, which are small where samples and prototypes agree, pass
        `-costs`. `-inf` forbids a pair: its target is 0.
      epsilon: Temperature of the assignment, above 0; it counts as a number of the
        dtype of the computation. Smaller is harder.
      num_iters: How many times columns and rows are normalised, at least 1.
      tol: Stops early: once the column sums are within a fraction `tol` of N·prior, the
        iterations that remain change nothing and skip their work; `num_iters` is the
        most there are. `None` always makes `num_iters`.
      where: `bool[N]`. Samples that count. The others, which may hold anything, have
        targets of 0 and gradient 0, and N is the number of those that count.
      prior: `[K]`. Positive; divided by its sum. The share of each prototype; `None`
        gives all the same.
      batch_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the samples
        are sharded over. An iteration then costs one `psum` of K numbers.

    Returns:
      `float32[N, K]` (float64 for float64 scores); rows that count sum to one.
      Differentiable in scores, epsilon and prior, in both modes.

      There is no solution where a counted sample holds NaN, `+inf` or `-inf` only, or
      where a prototype is forbidden to all of them: targets are then NaN, of the row in
      question at once and of all rows from the next iteration on, as they share the
      column sums. The same comes of an epsilon that is a JAX array, or a traced prior,
      and not positive.

    Raises:
      TypeError: `scores` are not floating, `where` is not boolean, `num_iters` is no
        integer, `epsilon` or `tol` no real number, `prior` not real, `batch_axis_name`
        no name.
      ValueError: A shape is not as above, there are no prototypes, `num_iters` is below
        1, an `epsilon` or `tol` that is a Python or NumPy number, or a `prior` that is
        not traced, is out of its range, `batch_axis_name` is not an axis of the mesh of
        a `shard_map` around the call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import sinkhorn_targets
      >>> jnp.set_printoptions(precision=3)
      >>> scores = jnp.array([[0.9, 0.2], [0.8, 0.3], [0.7, 0.5], [0.6, 0.1]])
      >>> targets = sinkhorn_targets(scores, epsilon=0.1, num_iters=50)
      >>> print(targets)  # all four prefer prototype 0; two of them can have it
      [[0.892 0.108]
       [0.528 0.472]
       [0.053 0.947]
       [0.528 0.472]]
      >>> print(targets.sum(axis=0))
      [2. 2.]

    References:
      Cuturi, "Sinkhorn Distances", 2013 (arXiv:1306.0895). Caron et al., "Unsupervised
      Learning of Visual Features by Contrasting Cluster Assignments", 2020
      (arXiv:2006.09882), whose order of steps this is.
    """
    return _targets(
        "sinkhorn_targets",
        scores,
        epsilon,
        num_iters,
        tol,
        where,
        prior,
        batch_axis_name,
    )


@jax.named_scope("sinkhorn_cross_entropy")
def sinkhorn_cross_entropy(
    logits: ArrayLike,
    scores: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    epsilon: ArrayLike = 0.05,
    num_iters: int = 3,
    tol: ArrayLike | None = None,
    where: ArrayLike | None = None,
    prior: ArrayLike | None = None,
    batch_axis_name: AxisName = None,
) -> jax.Array:
    """Cross-entropy of `logits/temperature` with Sinkhorn targets, in nats.

        loss[n] = Σ_k t[n, k]·(log Σ_j exp(x[n, j]) − x[n, k])
        x = logits/temperature,  t = stop_gradient(sinkhorn_targets(scores, ...))

    The swapped prediction of SwAV is this loss with the logits of one view and the
    scores of another. The gradient by the scores is 0: targets are constants. That by
    the logits is `(softmax(x) − t)/temperature`.

    Cost: that of `sinkhorn_targets`, and that of `softmax_cross_entropy`. The gradient
    keeps the scaled logits and the targets, each once. The logits are divided after the
    largest of their row is subtracted, so an offset common to a row costs no digits.

    Args:
      logits: `float[N, K]`. Unnormalised log-probabilities of the samples' prototypes.
        `-inf` is a prototype of probability 0; a NaN, a `+inf` or a row of `-inf` only
        makes the loss of that row NaN.
      scores: `float[N, K]`. Similarities, of which the targets are made; for costs,
        pass `-costs`.
      temperature: Above 0. What the logits are divided by; differentiable.
      epsilon: As of `sinkhorn_targets`, and so are the following.
      num_iters: How many times columns and rows are normalised, at least 1.
      tol: Stops early, at this relative error of the column sums.
      where: `bool[N]`. Samples that count; the others have loss 0 and gradient 0,
        whatever their logits and scores hold.
      prior: `[K]`. Positive. The share of each prototype.
      batch_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) of the samples.

    Returns:
      `float32[N]` (float64 where logits or scores are), one loss per sample. The mean
      over the samples that count is `weighted_mean(loss, where)`.

    Raises:
      TypeError: As `sinkhorn_targets`; `logits` are not floating or `temperature` is no
        real number.
      ValueError: As `sinkhorn_targets`; `logits` and `scores` differ in shape, or a
        concrete `temperature` is not above 0.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from xent_jax import sinkhorn_cross_entropy
      >>> jnp.set_printoptions(precision=3)
      >>> logits = jnp.array([[0.1, 0.3], [0.2, 0.1]])
      >>> scores = jnp.array([[0.9, 0.2], [0.8, 0.3]])
      >>> loss = sinkhorn_cross_entropy(logits, scores, temperature=0.1)
      >>> print(loss)
      [1.889 1.194]

    References:
      As of `sinkhorn_targets`.
    """
    function = "sinkhorn_cross_entropy"
    array = checks.as_array(function, "logits", logits)
    checks.check_floating(function, "logits", array)
    pairs = checks.as_array(function, "scores", scores)
    if pairs.shape == array.shape:  # or there is an error
        pairs = placement.beside(pairs, array)
    # Before the iteration and not after it: what is not differentiated costs less.
    targets = _targets(
        function,
        _constant(pairs),
        _constant(epsilon),
        num_iters,
        _constant(tol),
        where,
        _constant(prior),
        batch_axis_name,
    )
    meaning = "that of scores"
    checks.check_shape(function, "logits", array, targets.shape, meaning)
    double = jnp.float64 in (array.dtype, targets.dtype)
    dtype = jnp.dtype(jnp.float64 if double else jnp.float32)
    temperature = checks.read_number(
        function, "temperature", temperature, dtype, inside=True
    )
    mask = arrays.read_mask(function, where, array.shape[:1], "one a sample", array)
    keep = None if mask is None else mask[:, None]
    values = zero_in_dropped_rows(array.astype(dtype), keep)
    values = _scaled_logits(values, temperature)
    block = Block(values, class_ids(values, -1, 0), keep_row=keep)
    kind = DenseTargets(ClassAxis(-1))
    results = row_results(Given(kind), block, targets.astype(dtype))
    return jnp.squeeze(results.loss, -1)


def _constant(value: Any) -> Any:
    """Returns an argument, without a derivative where it is an array."""
    value = checks.resolved(value)
    return jax.lax.stop_gradient(value) if isinstance(value, jax.Array) else value


def _scaled_logits(
    values: jax.Array, temperature: jax.Array | np.floating
) -> jax.Array:
    """Returns the logits over the temperature, less a number a row."""
    if not isinstance(temperature, jax.Array) and temperature == 1:
        return values
    below = values - jax.lax.stop_gradient(jnp.max(values, axis=-1, keepdims=True))
    divisor = jnp.asarray(temperature)
    if not isinstance(temperature, jax.Array):
        return below / divisor
    # The probability of a logit of −inf does not depend on the temperature.
    impossible = jnp.isinf(below)
    possible = jnp.where(impossible, 0, below) / divisor
    return jnp.where(impossible, below / jax.lax.stop_gradient(divisor), possible)


def _targets(
    function: str,
    scores: ArrayLike,
    epsilon: ArrayLike,
    num_iters: int,
    tol: ArrayLike | None,
    where: ArrayLike | None,
    prior: ArrayLike | None,
    batch_axis_name: AxisName,
) -> jax.Array:
    """Checks and converts the arguments, then computes the targets."""
    array = checks.as_array(function, "scores", scores)
    checks.check_floating(function, "scores", array)
    if array.ndim != 2:
        expected = "have two axes (samples, prototypes)"
        checks.fail(ValueError, function, "scores", expected, f"shape {array.shape}")
    if array.shape[1] == 0:
        expected = "have at least one prototype"
        checks.fail(ValueError, function, "scores", expected, f"shape {array.shape}")
    checks.check_axis_name(function, "batch_axis_name", batch_axis_name)
    dtype = accumulation_dtype(array.dtype)
    scale, unit = _units(
        checks.read_number(function, "epsilon", epsilon, dtype, inside=True)
    )
    if tol is not None:
        tol = jnp.asarray(checks.read_number(function, "tol", tol, dtype))
    rows = arrays.read_mask(function, where, array.shape[:1], "one a sample", array)
    keep = None if rows is None else rows[:, None]
    values = zero_in_dropped_rows(array.astype(dtype), keep)
    problem = Problem(
        scores=values if unit is None else values * unit,
        counted=None if keep is None else _counted(keep, batch_axis_name),
        prior=_read_prior(function, prior, array, dtype),
        epsilon=scale,
    )
    count = checks.read_count(function, "num_iters", num_iters)
    targets = sinkhorn.solve(problem, count, tol, batch_axis_name)
    return zero_in_dropped_rows(targets, keep)


def _units(
    epsilon: jax.Array | np.floating,
) -> tuple[jax.Array, np.floating | None]:
    """Returns epsilon, and what scores are multiplied by to be in its units.

    Only the quotient counts. A number near the largest of its dtype, of which the
    iteration takes products and the reciprocal, is multiplied by a power of two, and so
    are the scores.
    """
    if isinstance(epsilon, jax.Array):
        return epsilon, None
    large = 2.0 ** (jnp.finfo(epsilon.dtype).maxexp // 2)
    if epsilon <= large:
        return jnp.asarray(epsilon), None
    unit = epsilon.dtype.type(1 / large)
    return jnp.asarray(epsilon * unit), unit


def _read_prior(
    function: str, prior: ArrayLike | None, scores: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns the shares of the prototypes, [1, K]."""
    size = scores.shape[1]
    if prior is None:
        return jnp.full((1, size), 1 / size, dtype)
    prior = checks.resolved(prior)
    with np.errstate(over="ignore"):  # there is an error below
        array = checks.as_real(function, "prior", prior)
    checks.check_shape(function, "prior", array, (size,), "one number a prototype")
    if not isinstance(prior, jax.Array) or (
        not isinstance(prior, jax.core.Tracer) and prior.is_fully_addressable
    ):
        _check_prior(function, np.asarray(prior).astype(np.float64), dtype)
    shares = placement.beside(array, scores, [1]).astype(dtype)[None]
    # The sum of large numbers would overflow; of a power of two nothing is rounded.
    half = 2.0 ** (jnp.finfo(dtype).maxexp // 2)
    largest = jnp.max(jax.lax.stop_gradient(shares))
    shares = shares * jnp.where(largest > half, jnp.asarray(1 / half, dtype), 1)
    return shares / jnp.sum(shares, axis=-1, keepdims=True)


def _check_prior(function: str, numbers: np.ndarray, dtype: jnp.dtype) -> None:
    """Raises unless the numbers and their shares are positive, also in the dtype."""
    tiny = jnp.finfo(dtype).tiny
    good = np.isfinite(numbers) & (numbers > 0)
    expected = "be positive and finite"
    if good.all():
        narrow = checks.narrowed(numbers, dtype)
        good = np.isfinite(narrow) & (narrow >= tiny)
        expected = f"be positive and finite as normal numbers of {dtype}"
    if good.all():
        shares = numbers / numbers.max()
        good = shares / shares.sum() >= tiny
        expected = f"have shares of its sum that are normal numbers of {dtype}"
    if not good.all():
        checks.fail(ValueError, function, "prior", expected, numbers[~good][0])


def _counted(keep: jax.Array, batch_axis_name: AxisName) -> jax.Array:
    """Returns the rows of which the column sums are made.

    They are all where none is kept: the targets are 0 then, and no step on the way to
    them divides by 0.
    """
    some = psum(jnp.sum(keep, dtype=jnp.int32), batch_axis_name) > 0
    return keep | ~some
