"""The rows of the porting guide: a call of another library, and the call here.

One source for what the guide says and for what is tested: `render.py` writes these
rows into `porting.md`, and `tests/test_porting.py` evaluates the two expressions of
each against the installed library. A doctest of a page could not do both: it would
repeat each call below its table, and a missing library would skip the whole page.

Expressions are evaluated with the names of `SETUP`, as arrays of the library that the
expression is written for.
"""

from typing import NamedTuple

SETUP = """\
rng = np.random.default_rng(0)
x = 2 * rng.standard_normal((6, 5), np.float32)  # logits: 6 rows of 5 classes
y = np.array([3, 0, 4, 1, 1, 2])  # class ids
padded = np.array([3, -100, 4, 1, -100, 2])  # class ids, two rows of padding
p = rng.dirichlet(np.ones(5), 6).astype("f4")  # targets that sum to one
q = rng.dirichlet(np.ones(5), 6).astype("f4")  # predicted probabilities
b = rng.integers(0, 2, (6, 5)).astype("f4")  # yes-or-no labels
w = np.array([0.5, 2, 1, 0.25, 3], "f4")  # a weight a class
s = rng.random(6, np.float32)  # a weight a row
e = rng.random((6, 5), np.float32)  # a weight an element
images = rng.standard_normal((2, 5, 3, 4), np.float32)  # logits, classes on axis 1
pixels = rng.integers(0, 5, (2, 3, 4))  # their class ids
h = rng.standard_normal((6, 8), np.float32)  # features: 6 rows of 8
k = rng.standard_normal((8, 5), np.float32)  # a kernel from 8 features to 5 classes
sure = np.array([[0, 20, 1]], "f4")  # a confident row
one = np.array([1])  # its label
forbidden = np.array([[0, -np.inf, 1]], "f4")  # a class of probability 0
first = np.array([[1, 0, 0]], "f4")  # one-hot
"""

OURS = """\
keep = padded != -100
loss = softmax_cross_entropy_with_integer_labels(x, padded, where=keep)
weighted = softmax_cross_entropy_with_integer_labels(
    x, padded, where=keep, class_weights=w
)
weights_of_labels = jnp.where(keep, w[jnp.where(keep, padded, 0)], 0)
"""

# What a row's formula is made of: NumPy and float64, the arrays of `SETUP` included.
FORMULAS = """\
def lse(x):
    return np.log(np.exp(x).sum(-1))


def loss_of_targets(x, t):
    return (t * (lse(x)[:, None] - x)).sum(-1)


def loss_of(x, y):  # ids that are none have loss 0, as a one-hot row of zeros has
    return loss_of_targets(x, (y[:, None] == np.arange(5)) * 1.0)


def smoothed_loss(x, y, s):  # s is shared by the other four classes
    t = np.where(y[:, None] == np.arange(5), 1 - s, s / 4)
    return loss_of_targets(x, t)


def entropy(t):
    return -(t * np.log(t)).sum(-1)
"""

# What a row is checked by unless it says otherwise.
EQUAL = "equal(theirs, ours)"

IDS = "softmax_cross_entropy_with_integer_labels"


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      theirs: what their pattern is filled with.
      ours: what ours is filled with.
      note: what differs, or what to know.
      check: what holds of `theirs` and `ours`, the two results, or the errors raised.
      formula: what `theirs` computes, as an expression in the names of `FORMULAS`, for
        a library that is not run.
    """

    theirs: str
    ours: str
    note: str = ""
    check: str = EQUAL
    formula: str = ""


class Table(NamedTuple):
    """Rows with one pattern each side, in which `…` stands for the row's text.

    Attributes:
      name: of the place in `porting.md`.
      library: the module that has to be importable, unless all rows have a formula.
      imports: what `theirs` is evaluated with, beside `SETUP`.
      arrays: of what the arrays are there: "torch", "tensorflow" or "jax".
      theirs: the pattern.
      ours: the pattern.
      rows: of the table.
    """

    name: str
    library: str
    imports: str
    arrays: str
    theirs: str
    ours: str
    rows: tuple[Row, ...]

    def expressions(self, row: Row) -> tuple[str, str]:
        """Returns the two whole expressions of a row."""
        return self.theirs.replace("…", row.theirs), self.ours.replace("…", row.ours)


FROM_TORCH = ("torch", "import torch\nimport torch.nn.functional as F", "torch")
FROM_OPTAX = ("optax", "import optax", "jax")
FROM_TENSORFLOW = ("tensorflow", "import tensorflow as tf", "tensorflow")
FROM_KERAS = ("keras", "import keras\nfrom keras import losses", "jax")

TORCH = (
    Table(
        "torch-calls",
        *FROM_TORCH,
        "…",
        "…",
        (
            Row('F.cross_entropy(x, y, reduction="none")', f"{IDS}(x, y)"),
            Row(
                'F.cross_entropy(x, p, reduction="none")',
                "softmax_cross_entropy(x, p)",
                "two functions here: one for class ids, one for targets",
            ),
            Row(
                'F.cross_entropy(images, pixels, reduction="none")',
                f"{IDS}(images, pixels, axis=1)",
                "PyTorch has the classes on axis 1, this package on the last",
            ),
            Row(
                'F.nll_loss(F.log_softmax(x, -1), y, reduction="none")',
                f"{IDS}(x, y)",
                "give the logits: a log-softmax has already rounded small losses away",
            ),
            Row(
                'F.nll_loss(F.log_softmax(x, -1), y, weight=w, reduction="none")',
                "nll_loss(jax.nn.log_softmax(x), y, class_weights=w)",
                "for log-probabilities that come from elsewhere",
            ),
            Row(
                'F.binary_cross_entropy_with_logits(x, b, reduction="none")',
                "sigmoid_binary_cross_entropy(x, b)",
            ),
            Row(
                'F.binary_cross_entropy(q, b, reduction="none")',
                "binary_cross_entropy(q, b)",
                "PyTorch clips the logarithm at −100, here probabilities are clipped "
                "at `epsilon=1e-7`",
            ),
        ),
    ),
    Table(
        "torch-options",
        *FROM_TORCH,
        'F.cross_entropy(x, y, …, reduction="none")',
        f"{IDS}(x, y, …)",
        (
            Row("weight=w", "class_weights=w"),
            Row(
                "ignore_index=2",
                "where=y != 2",
                "rows that count, as a mask; nothing is ignored unless you say so, "
                "−100 neither",
            ),
            Row("label_smoothing=0.1", "label_smoothing=0.1"),
            Row(
                "weight=w, label_smoothing=0.1",
                "class_weights=w, label_smoothing=0.1",
                "the weights multiply the smoothing term too",
            ),
        ),
    ),
    Table(
        "torch-binary",
        *FROM_TORCH,
        'F.binary_cross_entropy_with_logits(x, b, …, reduction="none")',
        "…",
        (
            Row(
                "pos_weight=w",
                "sigmoid_binary_cross_entropy(x, b, pos_weight=w)",
                "a weight a question, on the last axis in both",
            ),
            Row(
                "weight=e",
                "e * sigmoid_binary_cross_entropy(x, b)",
                "weights multiply the result",
            ),
        ),
    ),
    Table(
        "torch-reductions",
        *FROM_TORCH,
        "…",
        "…",
        (
            Row("F.cross_entropy(x, y)", f"{IDS}(x, y).mean()", "the default there"),
            Row('F.cross_entropy(x, y, reduction="sum")', f"{IDS}(x, y).sum()"),
            Row(
                "F.cross_entropy(x, padded)",
                "weighted_mean(loss, keep)",
                "the mean over the rows that count",
            ),
            Row(
                "F.cross_entropy(x, padded, weight=w)",
                "weighted.sum() / weights_of_labels.sum()",
                "the denominator is the sum of the kept labels' weights, with "
                "smoothing too",
            ),
            Row(
                "F.cross_entropy(x, p, weight=w)",
                "softmax_cross_entropy(x, p, class_weights=w).mean()",
                "with targets, the denominator is the number of rows",
            ),
            Row(
                "F.binary_cross_entropy_with_logits(x, b)",
                "sigmoid_binary_cross_entropy(x, b).mean()",
                "the mean over all elements",
            ),
        ),
    ),
    Table(
        "torch-differences",
        *FROM_TORCH,
        "…",
        "…",
        (
            Row(
                "F.cross_entropy(x, y * 0 - 100)",
                f"weighted_mean({IDS}(x, y * 0 - 100, where=y < 0), y < 0)",
                "nothing counts: `nan` there, 0 here, with gradient 0",
                "isnan(theirs) and ours == 0",
            ),
            Row(
                "F.cross_entropy(x, y + 1)",
                f"{IDS}(x, y + 1)",
                "an id of 5 in 5 classes: `IndexError` there; `nan` here in that "
                "row's loss and gradient",
                "type(theirs) is IndexError and list(isnan(ours)) == list(y == 4)",
            ),
            Row(
                'F.cross_entropy(sure, one, reduction="none")',
                f"{IDS}(sure, one)",
                "a confident row: 0 there, 7.664e-9 here (true: 7.664e-9)",
                "theirs == 0 and about(ours, 7.66395e-9)",
            ),
            Row(
                "F.cross_entropy(forbidden, first)",
                "softmax_cross_entropy(forbidden, first).mean()",
                "a logit of −inf beside a target of 0: `nan` there, 1.3133 here",
                "isnan(theirs) and about(ours, 1.3132617)",
            ),
            Row(
                'F.binary_cross_entropy_with_logits(-sure, sure * 0, reduction="none")',
                "sigmoid_binary_cross_entropy(-sure, sure * 0)",
                "logit −20, label 0: 0 there, 2.061e-9 here (true: 2.061e-9)",
                "theirs[0, 1] == 0 and about(ours[0, 1], 2.0611537e-9)",
            ),
            Row(
                "F.cross_entropy(x.bfloat16(), y).dtype",
                f"{IDS}(x.astype(jnp.bfloat16), y).dtype",
                "bfloat16 logits: a bfloat16 loss there, float32 here",
                "str(theirs) == 'torch.bfloat16' and ours == 'float32'",
            ),
        ),
    ),
)

OPTAX = (
    Table(
        "optax-calls",
        *FROM_OPTAX,
        "…",
        "…",
        (
            Row(f"optax.{IDS}(x, y)", f"{IDS}(x, y)"),
            Row("optax.softmax_cross_entropy(x, p)", "softmax_cross_entropy(x, p)"),
            Row(
                "optax.safe_softmax_cross_entropy(x, p)",
                "softmax_cross_entropy(x, p)",
                "always safe: 0·∞ is never formed",
            ),
            Row(
                "optax.sigmoid_binary_cross_entropy(x, b)",
                "sigmoid_binary_cross_entropy(x, b)",
            ),
            Row(
                "optax.softmax_cross_entropy(x, "
                "optax.smooth_labels(jax.nn.one_hot(y, 5), 0.1))",
                f"{IDS}(x, y, label_smoothing=0.1)",
                "no one-hot array",
            ),
            Row(
                "optax.softmax_cross_entropy(x, optax.smooth_labels(p, 0.1))",
                "softmax_cross_entropy(x, p, label_smoothing=0.1)",
            ),
        ),
    ),
    Table(
        "optax-options",
        *FROM_OPTAX,
        f"optax.{IDS}(…)",
        f"{IDS}(…)",
        (
            Row("images, pixels, 1", "images, pixels, 1", "`axis` has the same place"),
            Row(
                "images, pixels[:, :, 0], (3, 1)",
                "images, pixels[:, :, 0], (3, 1)",
                "several axes of classes",
            ),
            Row(
                "x, y, where=y[:, None] != 2",
                "x, y, where=y != 2",
                "a mask of rows has the shape of the labels; (N, 1) is refused",
            ),
            Row(
                "x, y, where=x > -2.6",
                "x, y, where=x > -2.6",
                "a mask of classes has the shape of the logits",
            ),
        ),
    ),
    Table(
        "optax-differences",
        *FROM_OPTAX,
        f"optax.{IDS}(…)",
        f"{IDS}(…)",
        (
            Row(
                "x, y * 0 - 1",
                "x, y * 0 - 1",
                "an id of −1: the last class there, `nan` here; drop padding with "
                "`where`",
                "not isnan(theirs).any() and isnan(ours).all()",
            ),
            Row(
                "sure, one",
                "sure, one",
                "a confident row: 0 there, 7.664e-9 here (true: 7.664e-9)",
                "theirs == 0 and about(ours, 7.66395e-9)",
            ),
            Row(
                "x.astype(jnp.bfloat16), y",
                "x.astype(jnp.bfloat16), y",
                "bfloat16 logits: a bfloat16 loss there, float32 here",
                "theirs.dtype == jnp.bfloat16 and ours.dtype == jnp.float32",
            ),
            Row(
                "x, y[:1]",
                "x, y[:1]",
                "one label for six rows: broadcast there, `ValueError` here",
                "theirs.shape == (6,) and type(ours) is ValueError",
            ),
            Row(
                "sure, one, where=sure < 20",
                "sure, one, where=sure < 20",
                "the label's class is dropped: a finite loss there, `inf` here",
                "jnp.isfinite(theirs) and ours == jnp.inf",
            ),
        ),
    ),
    Table(
        "optax-binary",
        *FROM_OPTAX,
        "optax.sigmoid_binary_cross_entropy(…)",
        "sigmoid_binary_cross_entropy(…)",
        (
            Row(
                "s[:, None], s",
                "s[:, None], s",
                "logits (6, 1), labels (6,): (6, 6) there, `ValueError` here",
                "theirs.shape == (6, 6) and type(ours) is ValueError",
            ),
            Row(
                "jnp.float32([jnp.inf]), jnp.float32([1])",
                "jnp.float32([jnp.inf]), jnp.float32([1])",
                "an infinite logit: `nan` there, the limit 0 here",
                "isnan(theirs) and ours == 0",
            ),
        ),
    ),
)
