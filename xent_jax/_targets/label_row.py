"""A row with one label: what three numbers, of its rivals and its label, determine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.precision import log, log1p, two_sum


class RowStatistics(NamedTuple):
    """What derivatives are made of.

    The probability of a rival j is exp(x_j − pivot)·rival_scale.
    """

    largest: jax.Array  # the largest logit
    log_mass: jax.Array  # log-normalizer − largest
    pivot: jax.Array  # the best rival, 0 where there is none
    rival_scale: jax.Array
    rival_mass: jax.Array  # 1 − p_y
    label_mass: jax.Array  # p_y


class Row(NamedTuple):
    """The loss of a row, and more."""

    loss: jax.Array  # log-normalizer − label's logit
    log_normalizer: jax.Array
    statistics: RowStatistics


def pivot_of(best_rival: jax.Array) -> jax.Array:
    """Returns what to subtract from logits: their best, 0 where there is none."""
    return jnp.where(best_rival == -jnp.inf, 0, best_rival)


def statistics(best_rival: jax.Array, rivals: jax.Array, label_logit: jax.Array) -> Row:
    """Returns the statistics that three numbers a row determine.

    Args:
      best_rival: the largest logit but the label's, `-inf` where there is none.
      rivals: Σ_{j≠y} exp(x_j − best_rival), 0 where there is none.
      label_logit: x_y, NaN where the row is undefined.
    """
    # How far the best rival is ahead: the one subtraction, done without error.
    lead, error = two_sum(best_rival, -label_logit)
    wins = lead <= 0
    power = jnp.exp(jnp.where(wins, lead, -lead))
    power = power + power * jnp.where(wins, error, -error)
    odds = jnp.where(wins, rivals * power, rivals)
    total, tail = two_sum(odds, jnp.where(wins, 1, power))
    # log(1 + odds) where the label wins. XLA:CPU's log1p is off by half an ulp for
    # small odds, but by 2.4 ulp near 1, where the logarithm of the rounded sum and its
    # rest are better.
    rare = wins & (odds < 0.1)
    log_mass = jnp.where(
        rare, log1p(jnp.where(rare, odds, 0)), log(total) + tail / total
    )
    largest = jnp.where(wins, label_logit, best_rival)
    return Row(
        loss=jnp.where(wins, log_mass, lead + (log_mass + error)),
        log_normalizer=largest + log_mass,
        statistics=RowStatistics(
            largest=largest,
            log_mass=log_mass,
            pivot=pivot_of(best_rival),
            rival_scale=jnp.where(wins, power, 1) / total,
            rival_mass=odds / total,
            label_mass=jnp.where(wins, 1, power) / total,
        ),
    )


def tangents(
    statistics: RowStatistics, loss_dot: jax.Array, log_normalizer_dot: jax.Array
) -> RowStatistics:
    """Returns the tangents of the statistics, from those of loss and log-normalizer.

    The largest logit and the pivot are constants: what they shift does not depend on
    them.
    """
    return RowStatistics(
        largest=jnp.zeros_like(statistics.largest),
        log_mass=log_normalizer_dot,
        pivot=jnp.zeros_like(statistics.pivot),
        rival_scale=-statistics.rival_scale * log_normalizer_dot,
        rival_mass=statistics.label_mass * loss_dot,
        label_mass=-statistics.label_mass * loss_dot,
    )
