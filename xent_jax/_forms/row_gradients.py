"""A sum of losses over rows, and its gradients: what is asked for and what comes back.

For every way to compute them: the loop over blocks of logits, and TPU kernels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._arguments.options import LogitOptions
from xent_jax._forms.head import Layer, Rows
from xent_jax._forms.loops import varying, zeros
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets.class_ids import Coefficients, combined


class RowBlocks(NamedTuple):
    """The form; static."""

    kind: Any
    size: int  # rows a block
    skip: bool  # whether blocks without a kept row are to be left out
    statistics: bool = False  # whether the results of the rows are wanted too


class Small(NamedTuple):
    """The layer's differentiable parts that are not the kernel."""

    options: LogitOptions
    class_weights: Any

    @classmethod
    def of(cls, layer: Layer) -> "Small":
        """Returns those of a layer."""
        return cls(layer.options, layer.class_weights)


class Gradients(NamedTuple):
    """The derivatives of the sum, in the accumulation dtype; `None` if not wanted.

    Or, static, which of them are wanted.
    """

    hidden: Any
    options: LogitOptions  # of the rows
    kernel: Any
    small: Small
    coefficients: Coefficients


def only(wanted: Any, values: Any) -> Any:
    """Returns a tree of values, with `None` for what is not wanted."""
    return jax.tree.map(lambda want, value: value if want else None, wanted, values)


def no_rows(rows: Rows, coefficients: Coefficients) -> jax.Array:
    """Returns the sum over no rows, which varies over a mesh as their terms do."""
    dtype = accumulation_dtype(rows.hidden.dtype)
    return zeros((), dtype, (rows.target, rows.keep, coefficients))


def total_of(results: Any, coefficients: Coefficients) -> jax.Array:
    """Returns the sum over the rows of their losses."""
    return jnp.sum(combined(results, coefficients))


def total_and_factors(
    results: Any, coefficients: Coefficients
) -> tuple[jax.Array, Any, Coefficients]:
    """Returns the sum, and its gradients by both: factors of slopes, as results are.

    Those by the results are by what a loss is composed of: numbers, and not the
    statistics behind them.
    """
    outer = results._replace(statistics=None, prediction=None, total_weight=None)
    total, pull = jax.vjp(total_of, outer, coefficients)
    factors, coefficients_bar = pull(jnp.ones_like(total))
    if coefficients.square is None:
        factors = factors._replace(log_normalizer=None)
    return total, factors, coefficients_bar


def alike(
    form: RowBlocks, rows: Rows, layer: Layer, coefficients: Coefficients
) -> tuple[Rows, Layer, Coefficients]:
    """Returns the arguments, varying over a mesh as what is computed of them does.

    A gradient by what is the same on all devices of a `shard_map` would be summed over
    them where it is made, and once more by the derivative of the sum.
    """
    arguments = rows, layer, coefficients
    hidden, options = jax.tree.map(
        lambda array: varying(array, arguments), (rows.hidden, rows.options)
    )
    layer = jax.tree.map(lambda array: varying(array, arguments), layer)
    rows, coefficients = jax.tree.map(
        lambda array: varying(array, arguments, form.kind.classes.names),
        (rows, coefficients),
    )
    # Rows may be typed as if they differed over the classes.
    coefficients = jax.tree.map(
        lambda array: varying(array, (rows.target, rows.keep)), coefficients
    )
    rows = rows._replace(hidden=hidden, options=options)
    return rows, layer, coefficients
