"""Dense targets of the surrogate loss Σ g·x, whose bracket g is a constant.

With g = T·softmax(x) − t. As Σ g = 0, the logits may be replaced by their distance to
the largest: the value then needs numbers a row, not the array g, and does not depend on
a common offset.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xent_jax._reductions.axis import ClassAxis
from xent_jax._reductions.classes import sum_classes
from xent_jax._targets.block import Block, values_of
from xent_jax._targets.dense import DenseTargets, Results
from xent_jax._targets.dense import Sums as DenseSums


class Sums(NamedTuple):
    """Per row, of size 1 along the class axis."""

    dense: DenseSums
    expected: jax.Array  # Σ exp(x_j − largest)·(largest − x_j)


class LinearizedTargets(NamedTuple):
    """The kind of target, for classes that are not sharded by a `jax.shard_map`."""

    classes: ClassAxis
    differentiated: bool = False

    @property
    def _dense(self) -> DenseTargets:
        return DenseTargets(self.classes, self.differentiated)

    def sums(self, block: Block, targets: jax.Array) -> Sums:
        """Returns the sums over the block of all classes."""
        sums = self._dense.sums(block, targets)
        operands = block, sums.largest
        return Sums(sums, sum_classes(_expected, operands, self.classes.axis))

    def over_shards(self, sums: Sums) -> Sums:
        """Returns the sums: there is one shard."""
        return sums

    def results(
        self, sums: Sums, targets: jax.Array, keep_row: jax.Array | None
    ) -> Results:
        """Returns the results of dense targets, the loss being the surrogate."""
        results = self._dense.results(sums.dense, targets, keep_row)
        row = results.statistics
        expected = row.total * (sums.expected / (1 + row.excess))
        return results._replace(loss=sums.dense.distance - expected)

    def tangents(
        self,
        block: Block,
        targets: jax.Array,
        results: Results,
        logits_dot: jax.Array | None,
        targets_dot: jax.Array | None,
    ) -> jax.Array:
        """Returns Σ g·ẋ, with g a constant to a higher derivative."""
        del targets_dot
        if logits_dot is None:
            return jnp.zeros_like(results.loss)
        slope = self._dense.slope(*jax.lax.stop_gradient((block, targets, results)))
        product = slope * logits_dot.astype(slope.dtype)
        return jnp.sum(product, axis=self.classes.axis, keepdims=True)

    def completed(self, results: Results, dots: jax.Array) -> Results:
        """Returns the tangents of all results, of which the loss alone has one."""
        return jax.tree.map(jnp.zeros_like, results)._replace(loss=dots)


def _expected(block: Block, largest: jax.Array) -> jax.Array:
    below = largest - values_of(block)
    power = jnp.exp(-below)
    return power * jnp.where(power == 0, 0, below)
