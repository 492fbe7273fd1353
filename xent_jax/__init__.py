"""Cross-entropy losses for JAX, accurate to a few units in the last place.

Pure functions of arrays that compose with `jax.jit`, `jax.vmap`, `jax.grad`, `jax.jvp`
and every nesting of them. `xent_jax.testing` has the assertions of their gradient laws,
`python -m xent_jax.verify` runs those on every device that JAX sees.
"""

from jax import export

from xent_jax._losses.divergence import softmax_kl_divergence
from xent_jax._losses.linear import linear_softmax_cross_entropy
from xent_jax._losses.linear_divergence import linear_softmax_kl_divergence
from xent_jax._losses.linear_statistics import linear_softmax_statistics
from xent_jax._losses.mean import weighted_mean
from xent_jax._losses.probabilities import (
    binary_cross_entropy,
    categorical_cross_entropy,
    nll_loss,
)
from xent_jax._losses.sigmoid import sigmoid_binary_cross_entropy
from xent_jax._losses.sinkhorn import sinkhorn_cross_entropy, sinkhorn_targets
from xent_jax._losses.softmax import (
    linearized_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from xent_jax._losses.sparse import softmax_cross_entropy_with_sparse_targets
from xent_jax._losses.statistics import SoftmaxStatistics, softmax_statistics

# So that a program that returns it can be exported.
export.register_namedtuple_serialization(
    SoftmaxStatistics, serialized_name="xent_jax.SoftmaxStatistics"
)

__version__ = "0.1.0"

__all__ = [
    "SoftmaxStatistics",
    "binary_cross_entropy",
    "categorical_cross_entropy",
    "linear_softmax_cross_entropy",
    "linear_softmax_kl_divergence",
    "linear_softmax_statistics",
    "linearized_softmax_cross_entropy",
    "nll_loss",
    "sigmoid_binary_cross_entropy",
    "sinkhorn_cross_entropy",
    "sinkhorn_targets",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy_with_sparse_targets",
    "softmax_kl_divergence",
    "softmax_statistics",
    "weighted_mean",
]
