"""Every public function and every argument as one row: what the tests are made of.

A row of `FUNCTIONS` says what a function is given and in which forms it is called, a
row of `ARGUMENTS` what an argument is, how to draw one and, of an option, which
functions take it. Tests ask for cases: a function with some of its options. So a new
option is a row here, and its meaning in float64 a line of `oracle.py`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import oracle
from draws import (
    EXTREME,
    HARD_ANSWERS,
    HARD_CLASSES,
    HARD_IDS,
    HARD_INDICES,
    HARD_LOGITS,
    HARD_PROBS,
    HARD_ROWS,
    HARD_SHARES,
    HARD_TARGETS,
    NO_CLASS_3,
    NO_WEIGHT_2,
    Draw,
    Sizes,
    changed,
    class_ids,
    class_mask,
    kernel,
    log_probabilities,
    normal,
    number,
    one_large_row,
    probabilities,
    row_mask,
    row_weights,
    uniform,
)

import xent_jax

IDS = "softmax_cross_entropy_with_integer_labels"
DENSE = "softmax_cross_entropy"
SPARSE = "softmax_cross_entropy_with_sparse_targets"
LINEARIZED = "linearized_softmax_cross_entropy"
DIVERGENCE = "softmax_kl_divergence"
STATISTICS = "softmax_statistics"
SIGMOID = "sigmoid_binary_cross_entropy"
NLL = "nll_loss"
CATEGORICAL = "categorical_cross_entropy"
BINARY = "binary_cross_entropy"
ASSIGNMENT = "sinkhorn_targets"
SINKHORN = "sinkhorn_cross_entropy"
MEAN = "weighted_mean"
HEAD = "linear_softmax_cross_entropy"
HEAD_STATISTICS = "linear_softmax_statistics"
HEAD_DIVERGENCE = "linear_softmax_kl_divergence"
LOSSES = (IDS, DENSE, SPARSE)
HEADS = (HEAD, HEAD_STATISTICS, HEAD_DIVERGENCE)
# What the TPU kernels of a head leave to its loops.
NO_KERNEL = ("softcap", "row_temperature")
OF_CLASSES = (*LOSSES, DIVERGENCE, STATISTICS, NLL, CATEGORICAL)

# Keywords that say how, and have no row: they are tested where they are made.
STRUCTURAL = frozenset(
    [
        "axis",
        "reduction",
        "direction",
        "with_statistics",
        "class_axis_name",
        "batch_axis_name",
        "row_block",
        "class_block",
        "num_iters",
        "tol",
        "epsilon",
    ]
)


@dataclasses.dataclass(frozen=True)
class Argument:
    """What an argument is.

    Attributes:
      axes: rows (n), classes (v), features (d) and ids of a row (k).
      draw: returns one in float64, from a generator, the shape and all sizes.
      of: the functions whose option it is; none of what is always given.
      keyword: what functions call it, where several rows are one argument's.
      moving: whether it is a number that derivatives are taken by.
      extreme: makes of one of the sizes `EXTREME` the hardest that is finite.
    """

    axes: str
    draw: Draw
    of: tuple[str, ...] = ()
    keyword: str = ""
    moving: bool = True
    extreme: Callable[[Any], Any] = np.asarray


ARGUMENTS: Mapping[str, Argument] = {
    # What is always given.
    "logits": Argument("nv", normal(2), extreme=HARD_LOGITS),
    "student_logits": Argument("nv", normal(2), keyword="logits"),
    "log_probs": Argument("nv", log_probabilities),
    "probs": Argument("nv", probabilities, extreme=HARD_PROBS),
    "scores": Argument("nv", uniform(-1, 1)),
    "hidden": Argument("nd", normal(), extreme=one_large_row),
    "kernel": Argument("dv", kernel),
    "values": Argument("n", normal()),
    "ids": Argument("n", class_ids, keyword="labels", moving=False, extreme=HARD_IDS),
    "indices": Argument("nk", class_ids, moving=False, extreme=HARD_INDICES),
    "id_probs": Argument("nk", uniform(0.1, 1), keyword="probs", extreme=HARD_SHARES),
    "label_indices": Argument(
        "nk", class_ids, keyword="labels", moving=False, extreme=HARD_INDICES
    ),
    "label_probs": Argument("nk", uniform(0.1, 1), extreme=HARD_SHARES),
    "targets": Argument("nv", uniform(0.1, 1), keyword="labels", extreme=HARD_TARGETS),
    "answers": Argument("nv", uniform(0.1, 1), keyword="labels", extreme=HARD_ANSWERS),
    "teacher_logits": Argument("nv", normal(2), moving=False),
    "teacher_hidden": Argument("nd", normal(), moving=False, extreme=one_large_row),
    "teacher_kernel": Argument("dv", kernel, moving=False),
    # Options, and what takes them.
    "bias": Argument("v", normal(), of=HEADS),
    "teacher_bias": Argument("v", normal(), of=(HEAD_DIVERGENCE,), moving=False),
    "where": Argument(
        "n",
        row_mask,
        of=(*OF_CLASSES, ASSIGNMENT, SINKHORN, MEAN, *HEADS),
        moving=False,
        extreme=HARD_ROWS,
    ),
    "where_classes": Argument(
        "nv",
        class_mask,
        of=(*OF_CLASSES, SIGMOID, BINARY),
        keyword="where",
        moving=False,
        extreme=HARD_CLASSES,
    ),
    "weights": Argument(
        "n", row_weights, of=(MEAN, HEAD, HEAD_DIVERGENCE), extreme=changed(([2, 5], 0))
    ),
    "class_mask": Argument("v", class_mask, of=HEADS, moving=False, extreme=NO_CLASS_3),
    "pos_weight": Argument("v", uniform(0.5, 2), of=(SIGMOID,), extreme=NO_WEIGHT_2),
    "pos_weight_full": Argument(
        "nv", uniform(0.5, 2), of=(SIGMOID,), keyword="pos_weight", extreme=NO_WEIGHT_2
    ),
    "pos_weight_one": Argument("", number(1.5), of=(SIGMOID,), keyword="pos_weight"),
    "label_smoothing": Argument("", number(0.125), of=(*LOSSES, SIGMOID, HEAD)),
    "class_weights": Argument(
        "v", uniform(0.5, 2), of=(*LOSSES, NLL, HEAD), extreme=NO_WEIGHT_2
    ),
    "z_loss": Argument("", number(0.0625), of=(*LOSSES, HEAD)),
    "softcap": Argument("", number(1.5), of=HEADS),
    "teacher_softcap": Argument("", number(2), of=(HEAD_DIVERGENCE,), moving=False),
    "temperature": Argument("", number(1.5), of=(DIVERGENCE, SINKHORN)),
    "row_temperature": Argument("n", uniform(0.5, 2), of=HEADS, keyword="temperature"),
    "prior": Argument("v", uniform(0.5, 2), of=(ASSIGNMENT, SINKHORN)),
}
MASKS = ("where", "where_classes", "class_mask")


def keyword_of(key: str) -> str:
    """Returns what functions call an argument."""
    return ARGUMENTS[key].keyword or key


class Function(NamedTuple):
    """How a public function is called.

    Attributes:
      name: of the function.
      inputs: keys of `ARGUMENTS`, in order: what it must be given.
      result: the axes of what it returns.
      forms: what is structural about a call, form by form; the first is the usual one.
      constant: keywords whose derivative is none, or 0, here and not elsewhere.
    """

    name: str
    inputs: tuple[str, ...]
    result: str = "n"
    forms: tuple[Mapping[str, Any], ...] = ({},)
    constant: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name, and the labels where another row is the usual one."""
        return self.name + ("-sparse" if "label_probs" in self.inputs else "")

    @property
    def labels(self) -> tuple[str, ...]:
        """The keys of what a row of logits, or of features, is compared with."""
        return self.inputs[2 if "kernel" in self.inputs else 1 :]

    @property
    def call(self) -> Callable[..., Any]:
        """The function."""
        return getattr(xent_jax, self.name)

    @property
    def oracle(self) -> Callable[..., Any] | None:
        """What it is in float64, where that is written down."""
        return getattr(oracle, self.name, None)

    @property
    def options(self) -> tuple[str, ...]:
        """The keys of all options, in the order of `ARGUMENTS`."""
        return tuple(key for key, one in ARGUMENTS.items() if self.name in one.of)

    def unmasked(self) -> tuple[str, ...]:
        """Returns every option but masks, the first of each that has several rows."""
        return self.every(without=MASKS)[0]

    def every(self, without: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        """Returns all options together, as often as one of them has rows."""
        rows: dict[str, list[str]] = {}
        for key in self.options:
            if key not in without:
                rows.setdefault(keyword_of(key), []).append(key)
        count = max(map(len, rows.values()), default=1)
        return [
            tuple(keys[index % len(keys)] for keys in rows.values())
            for index in range(count)
        ]


_MEAN, _SUM = {"reduction": "mean"}, {"reduction": "sum"}
_DIRECTIONS = tuple({"direction": name} for name in ("forward", "reverse"))
_HEAD = ("hidden", "kernel")
_TEACHER = ("teacher_hidden", "teacher_kernel")
_FEW = {"num_iters": 4}
ROWS = (
    Function(IDS, ("logits", "ids")),
    Function(DENSE, ("logits", "targets")),
    Function(SPARSE, ("logits", "indices", "id_probs")),
    Function(
        DIVERGENCE,
        ("student_logits", "teacher_logits"),
        forms=_DIRECTIONS,
        constant=("temperature",),
    ),
    Function(STATISTICS, ("logits", "ids")),
    Function(LINEARIZED, ("logits", "targets"), constant=("labels",)),
    Function(SIGMOID, ("logits", "answers"), "nv"),
    Function(NLL, ("log_probs", "ids")),
    Function(CATEGORICAL, ("probs", "targets")),
    Function(BINARY, ("probs", "answers"), "nv"),
    Function(ASSIGNMENT, ("scores",), "nv", (_FEW, _FEW | {"tol": 0.1})),
    Function(SINKHORN, ("logits", "scores"), constant=("scores", "prior")),
    Function(MEAN, ("values",), ""),
    Function(HEAD, (*_HEAD, "ids"), forms=({}, _MEAN, _SUM)),
    Function(HEAD, (*_HEAD, "label_indices", "label_probs"), forms=({}, _MEAN)),
    Function(HEAD_STATISTICS, (*_HEAD, "ids")),
    Function(
        HEAD_DIVERGENCE,
        (*_HEAD, *_TEACHER),
        forms=({}, _MEAN),
        constant=("temperature",),
    ),
)
FUNCTIONS = {row.key: row for row in ROWS}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A function with some of its options.

    Attributes:
      row: the function.
      options: keys of `ARGUMENTS`.
      static: what is structural about the call.
    """

    row: Function
    options: tuple[str, ...] = ()
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function, its labels, its options, and how it is called."""
        static = (f"{name}={value}" for name, value in self.static.items())
        return "-".join([self.row.name, *self.row.labels, *self.options, *static])

    @property
    def keys(self) -> dict[str, str]:
        """The rows of the arguments, by keyword."""
        return {keyword_of(key): key for key in (*self.row.inputs, *self.options)}

    @property
    def words(self) -> tuple[str, ...]:
        """The keywords of the options."""
        return tuple(map(keyword_of, self.options))

    @property
    def axes(self) -> dict[str, str]:
        """The axes of the arguments, by keyword."""
        return {word: ARGUMENTS[key].axes for word, key in self.keys.items()}

    @property
    def moving(self) -> tuple[str, ...]:
        """The keywords that derivatives are taken by."""
        return tuple(
            word
            for word, key in self.keys.items()
            if ARGUMENTS[key].moving and word not in self.row.constant
        )

    @property
    def numbers(self) -> dict[str, float]:
        """The options that are a number, by keyword, as Python's."""
        drawn = self.draw(np.random.default_rng(0))
        return {
            word: float(drawn[word]) for word, axes in self.axes.items() if not axes
        }

    @property
    def result(self) -> str:
        """The axes of what is returned."""
        return "" if self.static.get("reduction") else self.row.result

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The keywords that name a mesh axis in this form."""
        names = {"class_axis_name"}
        if "kernel" not in self.row.inputs or self.static.get("reduction"):
            names.add("batch_axis_name")
        return tuple(names & inspect.signature(self.row.call).parameters.keys())

    def draw(
        self, rng: np.random.Generator, sizes: Sizes = EXTREME, extreme: bool = False
    ) -> dict[str, Any]:
        """Returns the arguments by keyword, in float64, int64 and bool.

        What one is does not depend on which others there are, but that no label is
        padding where there is a mask of classes.

        Args:
          rng: gives one number.
          sizes: of the axes.
          extreme: whether to make them hard; `sizes` are `EXTREME` then.
        """
        seed = rng.integers(2**32)
        masked = not {"where_classes", "class_mask"}.isdisjoint(self.options)
        arrays = {}
        for word, key in self.keys.items():
            one = ARGUMENTS[key]
            own = np.random.default_rng([seed, *key.encode()])
            labels = masked and one.draw is class_ids
            limits = sizes._replace(classes=sizes.kept) if labels else sizes
            array = one.draw(own, sizes.shape(one.axes), limits)
            arrays[word] = one.extreme(array) if extreme else np.asarray(array)
        return arrays

    def shapes(
        self, sizes: Sizes, dtype: Any = np.float32
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arguments' shapes by keyword, numbers included.

        Args:
          sizes: of the axes.
          dtype: of the inputs; options are in float32, class ids in int32.
        """
        drawn = self.draw(np.random.default_rng(0), Sizes((2,), 3, 2, 2))
        shapes = {}
        for word, key in self.keys.items():
            floating = dtype if key in self.row.inputs else np.float32
            kinds = {"b": np.bool_, "i": np.int32, "f": floating}
            shape = sizes.shape(ARGUMENTS[key].axes)
            shapes[word] = jax.ShapeDtypeStruct(shape, kinds[drawn[word].dtype.kind])
        return shapes

    def __call__(self, arrays: Mapping[str, Any], **more: Any) -> Any:
        return self.row.call(**arrays, **self.static, **more)

    def truth(self, arrays: Mapping[str, Any], **more: Any) -> Any:
        """Returns what the oracle says."""
        assert self.row.oracle is not None
        return self.row.oracle(**arrays, **self.static, **more)


def narrow(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays in float32, int32 and bool."""
    kinds = {"f": np.float32, "i": np.int32, "b": bool}
    return {name: one.astype(kinds[one.dtype.kind]) for name, one in arrays.items()}


def parted(names: Any, arrays: Mapping[str, Any]) -> tuple[dict, dict]:
    """Returns the arrays of some names, and the others."""
    moving = {name: arrays[name] for name in names}
    return moving, {name: arrays[name] for name in arrays if name not in moving}
