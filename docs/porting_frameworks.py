"""More rows of the porting guide: TensorFlow, Keras, and heads without logits."""

from porting_rows import (
    FROM_KERAS,
    FROM_TENSORFLOW,
    FROM_TORCH,
    IDS,
    OPTAX,
    TORCH,
    Row,
    Table,
)
from porting_trainers import LIGER_WEIGHTS, TRAINERS

TENSORFLOW = (
    Table(
        "tensorflow-calls",
        *FROM_TENSORFLOW,
        "…",
        "…",
        (
            Row(
                "tf.nn.sparse_softmax_cross_entropy_with_logits(y, x)",
                f"{IDS}(x, y)",
                "logits come first here, labels first there",
            ),
            Row(
                "tf.nn.softmax_cross_entropy_with_logits(p, x)",
                "softmax_cross_entropy(x, p)",
            ),
            Row(
                "tf.nn.softmax_cross_entropy_with_logits(p, x, axis=0)",
                "softmax_cross_entropy(x, p, axis=0)",
            ),
            Row(
                "tf.nn.softmax_cross_entropy_with_logits(b, x)",
                "softmax_cross_entropy(x, b)",
                "rows that do not sum to one: equal values, but TensorFlow's gradient "
                "is softmax − targets, which is not the derivative; here "
                "(Σ targets)·softmax − targets",
            ),
            Row(
                "tf.nn.sigmoid_cross_entropy_with_logits(b, x)",
                "sigmoid_binary_cross_entropy(x, b)",
            ),
            Row(
                "tf.nn.weighted_cross_entropy_with_logits(b, x, 3.0)",
                "sigmoid_binary_cross_entropy(x, b, pos_weight=3.0)",
            ),
            Row(
                "tf.nn.sparse_softmax_cross_entropy_with_logits(y + 1, x)",
                f"{IDS}(x, y + 1)",
                "an id of 5 in 5 classes: an error on a CPU there; `nan` here in that "
                "row's loss and gradient",
                "type(theirs).__name__ == 'InvalidArgumentError' "
                "and list(isnan(ours)) == list(y == 4)",
            ),
            Row(
                "tf.nn.sparse_softmax_cross_entropy_with_logits(one, sure)",
                f"{IDS}(sure, one)",
                "a confident row: 0 there, 7.664e-9 here (true: 7.664e-9)",
                "theirs == 0 and about(ours, 7.66395e-9)",
            ),
        ),
    ),
)

_SAMPLED = Table(
    "tensorflow-sampled",
    *FROM_TENSORFLOW,
    "…",
    "…",
    (
        Row(
            "tf.nn.sampled_softmax_loss(tf.transpose(k), tf.zeros(5), y[:, None], h, "
            "5, 5, sampled_values=(tf.range(5, dtype=tf.int64), tf.ones((6, 1)), "
            "tf.ones(5)))",
            "linear_softmax_cross_entropy(h, k, y)",
            "an estimate from a few classes that are drawn there; here the loss "
            "itself, a block of classes at a time. With every class drawn, as in this "
            "row, they are equal",
        ),
    ),
)

KERAS = (
    Table(
        "keras-calls",
        *FROM_KERAS,
        "losses.…",
        "…",
        (
            Row(
                "sparse_categorical_crossentropy(y, x, from_logits=True)",
                f"{IDS}(x, y)",
                "give logits wherever you have them",
            ),
            Row(
                "categorical_crossentropy(p, x, from_logits=True)",
                "softmax_cross_entropy(x, p)",
            ),
            Row(
                "categorical_crossentropy(p, x, from_logits=True, label_smoothing=0.1)",
                "softmax_cross_entropy(x, p, label_smoothing=0.1)",
            ),
            Row(
                "binary_crossentropy(b, x, from_logits=True)",
                "sigmoid_binary_cross_entropy(x, b).mean(-1)",
                "Keras averages over the last axis, here there is a loss an element",
            ),
            Row(
                "binary_crossentropy(b, x, from_logits=True, label_smoothing=0.1)",
                "sigmoid_binary_cross_entropy(x, b, label_smoothing=0.1).mean(-1)",
                "towards 1/2",
            ),
            Row(
                "categorical_crossentropy(p, q)",
                "categorical_cross_entropy(q, p)",
                "probabilities, Keras's default; its clipping is `epsilon=1e-7`",
            ),
            Row(
                "sparse_categorical_crossentropy(y, q)",
                "categorical_cross_entropy(q, jax.nn.one_hot(y, 5))",
            ),
            Row(
                "binary_crossentropy(b, q)",
                "binary_cross_entropy(q, b).mean(-1)",
            ),
        ),
    ),
    Table(
        "keras-objects",
        *FROM_KERAS,
        "losses.…",
        "…",
        (
            Row(
                "SparseCategoricalCrossentropy(from_logits=True)(y, x)",
                f"{IDS}(x, y).mean()",
                '`reduction="sum_over_batch_size"`, the default',
            ),
            Row(
                "SparseCategoricalCrossentropy("
                'from_logits=True, reduction="sum")(y, x)',
                f"{IDS}(x, y).sum()",
            ),
            Row(
                "SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)"
                "(padded, x)",
                "weighted_mean(loss, keep)",
                "the mean over the rows that count",
            ),
            Row(
                "SparseCategoricalCrossentropy(from_logits=True)"
                "(y, x, sample_weight=w[y])",
                f"{IDS}(x, y, class_weights=w).mean()",
                "what `class_weight` of `fit` comes to; not PyTorch's mean",
            ),
            Row(
                "CategoricalCrossentropy(from_logits=True)(p, x, sample_weight=s)",
                "(s * softmax_cross_entropy(x, p)).mean()",
                "the denominator is the number of rows, not the sum of the weights",
            ),
            Row(
                "CategoricalCrossentropy(from_logits=True, "
                'reduction="mean_with_sample_weight")(p, x, sample_weight=s)',
                "weighted_mean(softmax_cross_entropy(x, p), s)",
            ),
            Row(
                "BinaryCrossentropy(from_logits=True)(b, x)",
                "sigmoid_binary_cross_entropy(x, b).mean()",
            ),
        ),
    ),
    Table(
        "keras-differences",
        *FROM_KERAS,
        "losses.…",
        "…",
        (
            Row(
                "sparse_categorical_crossentropy(y + 1, x, from_logits=True)",
                f"{IDS}(x, y + 1)",
                "an id of 5 in 5 classes: loss 0 there (JAX backend), `nan` here",
                "list(theirs == 0) == list(y == 4) == list(isnan(ours))",
            ),
            Row(
                "sparse_categorical_crossentropy(one, sure, from_logits=True)",
                f"{IDS}(sure, one)",
                "a confident row: 0 there, 7.664e-9 here (true: 7.664e-9)",
                "theirs == 0 and about(ours, 7.66395e-9)",
            ),
            Row(
                "categorical_crossentropy(first, forbidden, from_logits=True)",
                "softmax_cross_entropy(forbidden, first)",
                "a logit of −inf beside a target of 0: `nan` there, 1.3133 here",
                "isnan(theirs) and about(ours, 1.3132617)",
            ),
        ),
    ),
    Table(
        "keras-metrics",
        *FROM_KERAS,
        "…",
        "…",
        (
            Row(
                "keras.metrics.SparseCategoricalCrossentropy(from_logits=True)(y, x)",
                f"{IDS}(x, y).mean()",
            ),
            Row(
                "keras.metrics.MeanMetricWrapper(losses.sparse_categorical_crossentropy"
                ", from_logits=True, ignore_class=-100)(padded, x)",
                "weighted_mean(loss, where=keep)",
                "as a metric it divides by all 6 rows, ignored ones too; the loss "
                "object divides by the 4 that count, as here",
                "about(6 * theirs, 4 * ours)",
            ),
            Row(
                "keras.metrics.SparseCategoricalAccuracy()(y, x)",
                "weighted_mean(softmax_statistics(x, y).prediction == y)",
            ),
        ),
    ),
)


def _head(name: str, library: str, imports: str, theirs: str, *rows: Row) -> Table:
    arrays = "jax" if library in ("tokamax", "jax_cce") else "torch"
    ours = "linear_softmax_cross_entropy(h, k, …)"
    return Table(name, library, imports, arrays, theirs, ours, rows)


_MEAN = 'y, reduction="mean"'
_MASKED = 'padded, where=keep, reduction="mean"'

HEADS = (
    _head(
        "head-torch",
        *FROM_TORCH[:2],
        "F.linear_cross_entropy(h, k.T, …)",
        Row("y", _MEAN, "the kernel is [D, V] here, its transpose there"),
        Row('y, reduction="sum"', 'y, reduction="sum"'),
        Row('y, reduction="none"', "y", "a loss a row is the default here"),
        Row("y, linear_bias=w", 'y, bias=w, reduction="mean"'),
        Row("padded, ignore_index=-100", _MASKED),
        Row(
            "padded, ignore_index=-100, weight=w",
            'padded, where=keep, class_weights=w, reduction="mean"',
            "both divide by the sum of the kept labels' weights",
        ),
        Row("y, label_smoothing=0.1", 'y, label_smoothing=0.1, reduction="mean"'),
    ),
    _head(
        "head-cce",
        "cut_cross_entropy",
        "import torch\nfrom cut_cross_entropy import linear_cross_entropy",
        'linear_cross_entropy(h, k.T, …, impl="torch_compile")',
        Row("y", _MEAN),
        Row('y, reduction="sum"', 'y, reduction="sum"'),
        Row('y, reduction="none"', "y"),
        Row("padded", _MASKED, "`ignore_index=-100` is the default there"),
        Row("y, softcap=2.0", 'y, softcap=2.0, reduction="mean"'),
    ),
    _head(
        "head-liger",
        "liger_kernel",
        "import torch\n"
        "from liger_kernel.transformers.functional import (\n"
        "    liger_fused_linear_cross_entropy,\n"
        ")",
        "liger_fused_linear_cross_entropy(h, k.T, …)",
        Row("y", _MEAN),
        Row('y, reduction="sum"', 'y, reduction="sum"'),
        Row("y, bias=w", 'y, bias=w, reduction="mean"'),
        Row("padded", _MASKED, "`ignore_index=-100` is the default there"),
        Row(
            "padded, ce_weight=w",
            'padded, where=keep, class_weights=w, reduction="mean"',
        ),
        Row("y, label_smoothing=0.1", 'y, label_smoothing=0.1, reduction="mean"'),
        Row("y, lse_square_scale=0.01", 'y, z_loss=0.01, reduction="mean"'),
        Row("y, softcap=2.0", 'y, softcap=2.0, reduction="mean"'),
    ),
    _head(
        "head-tokamax",
        "tokamax",
        "from tokamax import linear_softmax_cross_entropy_loss",
        "linear_softmax_cross_entropy_loss(h, …)",
        Row("y, k", 'y, reduction="sum"', "the sum is the default there"),
        Row('y, k, reduction="mean"', _MEAN),
        Row('y, k, reduction="none"', "y"),
        Row(
            'padded, k, reduction="none"',
            "padded",
            "an id of −100: loss 0 there, `nan` here; drop it with `where`",
            "list(theirs == 0) == list(padded < 0) == list(isnan(ours))",
        ),
        Row(
            'y, k, reduction="mean", implementation="chunked_xla"',
            _MEAN,
            "5 classes are not a multiple of its block of 2048: the padding counts as "
            "classes there",
            "theirs > ours + 1",
        ),
    ),
    _head(
        "head-jax-cce",
        "jax_cce",
        "from jax_cce import linear_cross_entropy",
        "linear_cross_entropy(h, k.T, …)",
        Row("y", _MEAN, "the mean is all there is"),
        Row(
            "padded",
            "padded",
            "an id of −100: a finite loss there, `nan` here; drop it with `where`",
            "jnp.isfinite(theirs) and list(isnan(ours)) == list(padded < 0)",
        ),
    ),
)

TABLES = (
    *TORCH,
    *TENSORFLOW,
    _SAMPLED,
    *KERAS,
    *OPTAX,
    *HEADS,
    LIGER_WEIGHTS,
    *TRAINERS,
)
