"""Results of rows, and the one rule by which they are differentiated.

A form says how the logits come, a kind of target what they are compared with. The
tangent of a row's result is Σ slope·ẋ, with the slope "mean parameter minus target"
written in the results themselves, so that a higher derivative applies the rule again.
It is wrapped in `jax.checkpoint`: reverse mode keeps the logits, or what makes them,
and a few numbers a row, but no softmax.

Where the classes are sharded, every sum over them is one over the classes here until
`ClassAxis.total` adds up all of a row's sums at once: two all-reduces for the results,
the first for the best logit, and one for their tangents.
"""

import functools
from typing import Any, NamedTuple

import jax

from xent_jax._reductions.lowering import on_one_device
from xent_jax._reductions.tangents import known_tangents
from xent_jax._reductions.vectors import in_vectors
from xent_jax._targets.block import Block


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def row_results(form: Any, *arguments: Any) -> Any:
    """Returns the results of every row.

    Args:
      form: static; `Given`, or a form with the same three methods.
      *arguments: of the form; differentiable where they are floating.
    """
    return form.results(*arguments)


@functools.partial(row_results.defjvp, symbolic_zeros=True)
def _row_results_jvp(
    form: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    # The function itself, not its formula: a higher derivative then applies this rule.
    results = row_results(form.differentiated(), *primals)
    dots = form.tangents(primals, results, known_tangents(tangents))
    return results, form.kind.completed(results, dots)


class Given(NamedTuple):
    """The form of logits that are given: they are one block."""

    kind: Any

    def differentiated(self) -> "Given":
        """Returns the form for results that derivatives use too."""
        return Given(self.kind._replace(differentiated=True))

    def results(self, block: Block, target: Any) -> Any:
        """Returns the results of the rows of the block."""
        return _results(self.kind, block, target)

    def tangents(self, primals: Any, results: Any, dots: Any) -> Any:
        """Returns the tangents of the results that are sums over the classes."""
        block_dot, target_dot = dots
        # Weights of classes are the other thing that class ids are differentiated by.
        other_dot = block_dot.class_weights
        if other_dot is None and isinstance(target_dot, jax.Array):
            other_dot = target_dot
        rule = jax.checkpoint(
            functools.partial(_tangents, self.kind), prevent_cse=False
        )
        local = rule(*primals, results, block_dot.logits, other_dot)
        return self.kind.classes.total(local)


@functools.partial(jax.jit, static_argnums=0)
def _results(kind: Any, block: Block, target: Any) -> Any:
    sums = kind.over_shards(kind.sums(block, target))
    results = kind.results
    if kind.classes.axis == -1:
        results = on_one_device(results, functools.partial(in_vectors, results))
    return results(sums, target, block.keep_row)


# Compiled as one where derivatives are taken eagerly: the −inf of a dropped class, at
# which `jax_debug_infs` would stop, is then no result.
@functools.partial(jax.jit, static_argnums=0)
def _tangents(kind: Any, *arguments: Any) -> Any:
    return kind.tangents(*arguments)
