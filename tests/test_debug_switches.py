"""JAX's debug switches: finite data raise under none of them, a NaN is still found.

`jax_debug_nans` and `jax_debug_infs` look at the result of every primitive that runs by
itself, `jax_disable_jit` makes every primitive one of those, and
`jax_check_tracer_leaks` looks at what outlives a trace. A constant NaN for a bad row
that is not there, or an inf that a `where` is to take out again, would raise.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import shortened

import xent_jax


@pytest.fixture(autouse=True, scope="module")
def unoptimized():
    """Compiles in half of the time: what is computed is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


ROWS, CLASSES, FEATURES = 6, 5, 3
RNG = np.random.default_rng(20240229)


def _logits() -> np.ndarray:
    """Ordinary rows; a tie; a label, 1, ahead and behind; rivals the caller masked."""
    logits = 2 * RNG.standard_normal((ROWS, CLASSES))
    logits[1] = 0.5
    logits[2, 1], logits[3, 1] = 150, -150
    logits[4] = -1e9
    logits[4, 1] = 2
    return logits.astype(np.float32)


LOGITS = _logits()
MODERATE = np.clip(LOGITS, -4, 4)
LABELS = np.array([0, 1, 1, 1, 1, 4])
TARGETS = RNG.dirichlet(np.ones(CLASSES), ROWS).astype(np.float32)
# No target, certain ones, and targets that do not sum to one.
TARGETS[1:4] = [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0.5, 0]]
ANSWERS = np.clip(TARGETS, 0, 1)
PROBS = RNG.dirichlet(np.full(CLASSES, 3), ROWS).astype(np.float32)
PROBS[2:4] = [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
IDS = {"indices": np.array([[0, 2], [1, -1], [1, 2], [1, 0], [1, -1], [4, 2]])}
PROBS_OF_IDS = np.array(
    [[0.5, 0.5], [1, 0], [0.3, 0.7], [0.9, 0], [1, 0], [2, 1]], np.float32
)
WEIGHTS = np.array([0.5, 2, 0, 1, 3], np.float32)
ROW_WEIGHTS = np.array([0.5, 2, 0, 1, 3, 0], np.float32)
KEEP_ROWS = np.array([True, True, False, True, True, False])
# A row that keeps nothing, one that keeps its label alone; every other label is kept.
KEEP_CLASSES = np.eye(CLASSES, dtype=bool)[LABELS] | (np.arange(CLASSES) % 2 == 0)
KEEP_CLASSES[0] = False
KEEP_CLASSES[1] = np.arange(CLASSES) == 1

HIDDEN = RNG.standard_normal((ROWS, FEATURES)).astype(np.float32)
HIDDEN[2] *= 60
KERNEL = 2 * RNG.standard_normal((FEATURES, CLASSES)).astype(np.float32)
SCORES = RNG.uniform(-1, 1, (ROWS, CLASSES)).astype(np.float32)


class Call(NamedTuple):
    """A call by keyword: what it is differentiated by, and the rest."""

    function: Callable[..., Any]
    moving: dict[str, Any]
    rest: dict[str, Any]


OF_CLASSES = {
    "plain": ({}, {}),
    "rows": ({}, {"where": KEEP_ROWS}),
    "classes": ({}, {"where": KEEP_CLASSES}),
    "smoothing": ({}, {"label_smoothing": 0.1}),
    "weights": ({"class_weights": WEIGHTS}, {}),
    "z_loss": ({}, {"z_loss": 0.1}),
    "all": (
        {"class_weights": WEIGHTS},
        {"where": KEEP_CLASSES, "label_smoothing": 0.1, "z_loss": 0.1},
    ),
}
OF_HEADS = {
    "plain": ({}, {}),
    "rows": ({}, {"where": KEEP_ROWS}),
    "classes": ({}, {"class_mask": np.arange(CLASSES) != 3}),
    "all": (
        {
            "bias": WEIGHTS,
            "weights": ROW_WEIGHTS,
            "class_weights": WEIGHTS,
            "softcap": np.float32(5),
        },
        {
            "where": KEEP_ROWS,
            "class_mask": np.arange(CLASSES) != 3,
            "label_smoothing": 0.1,
            "z_loss": 0.1,
        },
    ),
}
BLOCKS = {None: {"class_block": 2}, "mean": {"row_block": 4}}


def _calls() -> Iterator[tuple[str, Call]]:
    x, y, t = {"logits": LOGITS}, {"labels": LABELS}, {"labels": TARGETS}
    for name, (moving, rest) in OF_CLASSES.items():
        ids = xent_jax.softmax_cross_entropy_with_integer_labels
        yield f"ids, {name}", Call(ids, x | moving, y | rest)
        dense = xent_jax.softmax_cross_entropy
        yield f"dense, {name}", Call(dense, x | t | moving, rest)
        sparse = xent_jax.softmax_cross_entropy_with_sparse_targets
        call = Call(sparse, x | {"probs": PROBS_OF_IDS} | moving, IDS | rest)
        yield f"sparse, {name}", call
    for name in ("plain", "rows", "classes"):
        rest = OF_CLASSES[name][1]
        statistics = xent_jax.softmax_statistics
        yield f"given statistics, {name}", Call(statistics, x, y | rest)
        for direction in ("forward", "reverse"):
            rest = rest | {"teacher_logits": MODERATE, "direction": direction}
            call = Call(
                xent_jax.softmax_kl_divergence, {"logits": MODERATE[::-1]}, rest
            )
            yield f"divergence, {direction}, {name}", call
    linearized = xent_jax.linearized_softmax_cross_entropy
    yield "linearized", Call(linearized, x, t)
    answers = {"labels": ANSWERS}
    for name, moving, rest in (
        ("plain", {}, {}),
        ("where", {}, {"where": KEEP_CLASSES}),
        ("options", {"pos_weight": WEIGHTS}, {"label_smoothing": 0.1}),
    ):
        sigmoid = xent_jax.sigmoid_binary_cross_entropy
        yield f"sigmoid, {name}", Call(sigmoid, x | answers | moving, rest)
    log_probs = {"log_probs": np.asarray(jax.nn.log_softmax(MODERATE))}
    for name in ("plain", "rows", "classes", "weights"):
        moving, rest = OF_CLASSES[name]
        yield f"nll, {name}", Call(xent_jax.nll_loss, log_probs | moving, y | rest)
    probs = {"probs": PROBS}
    for name in ("plain", "rows", "classes"):
        rest = OF_CLASSES[name][1]
        categorical = xent_jax.categorical_cross_entropy
        yield f"categorical, {name}", Call(categorical, probs | t, rest)
    for name, rest in (("plain", {}), ("where", {"where": KEEP_CLASSES})):
        binary = xent_jax.binary_cross_entropy
        yield f"binary, {name}", Call(binary, probs | answers, rest)
    yield from _calls_of_heads()
    yield from _calls_of_scores()
    values = {"values": MODERATE[:, 0]}
    for name, moving, rest in (
        ("plain", {}, {}),
        ("mask", {}, {"weights": KEEP_ROWS}),
        ("weights", {"weights": ROW_WEIGHTS}, {}),
        ("nothing", {"weights": 0 * ROW_WEIGHTS}, {}),
    ):
        mean = xent_jax.weighted_mean
        yield f"weighted mean, {name}", Call(mean, values | moving, rest)


def _calls_of_heads() -> Iterator[tuple[str, Call]]:
    head = {"hidden": HIDDEN, "kernel": KERNEL}
    for name, (moving, rest) in OF_HEADS.items():
        for reduction, block in BLOCKS.items():
            more = {"labels": LABELS, "reduction": reduction, **block}
            loss = xent_jax.linear_softmax_cross_entropy
            yield f"head, {name}, {reduction}", Call(loss, head | moving, rest | more)
            if name in ("plain", "all"):
                more |= {"labels": IDS["indices"]}
                few = {"label_probs": PROBS_OF_IDS, "temperature": ROW_WEIGHTS + 1}
                call = Call(loss, head | few | moving, rest | more)
                yield f"sparse head, {name}, {reduction}", call
        teacher = {"teacher_hidden": HIDDEN[::-1], "teacher_kernel": KERNEL[:, ::-1]}
        for reduction, block in BLOCKS.items():
            names = ("where", "class_mask", "bias", "softcap", "weights")
            both = rest | teacher | {"reduction": reduction, **block}
            names = (*names, *teacher, *both.keys() & {"reduction", *block})
            both = {k: v for k, v in both.items() if k in names}
            some = {k: v for k, v in moving.items() if k in names}
            call = Call(xent_jax.linear_softmax_kl_divergence, head | some, both)
            yield f"divergence of heads, {name}, {reduction}", call
        names = ("where", "class_mask", "bias", "softcap", "labels")
        rest = {k: v for k, v in (rest | {"labels": LABELS}).items() if k in names}
        moving = {k: v for k, v in moving.items() if k in names}
        statistics = xent_jax.linear_softmax_statistics
        call = Call(statistics, head | moving, rest | {"class_block": 2})
        yield f"statistics, {name}", call


def _calls_of_scores() -> Iterator[tuple[str, Call]]:
    scores = {"scores": SCORES}
    for name, moving, rest in (
        ("plain", {}, {}),
        ("small epsilon", {}, {"epsilon": 1e-3, "num_iters": 20}),
        ("until balanced", {}, {"tol": 1e-2, "num_iters": 20}),
        ("where", {}, {"where": KEEP_ROWS}),
        ("nothing", {}, {"where": np.zeros(ROWS, bool)}),
        ("prior", {"prior": WEIGHTS + 1}, {}),
    ):
        targets = xent_jax.sinkhorn_targets
        yield f"Sinkhorn targets, {name}", Call(targets, scores | moving, rest)
    for name, rest in (
        ("plain", {}),
        ("options", {"temperature": 0.1, "where": KEEP_ROWS}),
    ):
        loss = xent_jax.sinkhorn_cross_entropy
        call = Call(loss, {"logits": LOGITS}, scores | rest)
        yield f"Sinkhorn, {name}", call


CALLS = dict(_calls())
SWITCHES = {
    "nans": (jax.debug_nans,),
    "infs": (jax.debug_infs,),
    "nans and infs": (jax.debug_nans, jax.debug_infs),
    "leaks": (jax.check_tracer_leaks,),
    "all": (jax.debug_nans, jax.debug_infs, jax.check_tracer_leaks),
}


@contextlib.contextmanager
def switched(name: str) -> Iterator[None]:
    """Turns switches of JAX on.

    As contexts, because JAX forgets the check of a switch that was turned on for the
    process, in this thread, once it has turned it off for a moment on its own account.
    """
    with contextlib.ExitStack() as stack:
        for switch in SWITCHES[name]:
            stack.enter_context(switch(True))
        yield


# Where two switches together find nothing, neither does alone, and a jitted function
# shows its results only. So the first call of each function is enough for other modes.
MODES = [("nans and infs", "eager"), ("nans", "no jit")]
OTHER_MODES = [
    ("nans and infs", "jitted"),
    *((name, mode) for name in ("nans", "infs") for mode in ("eager", "jitted")),
    *((name, mode) for name in ("leaks", "all") for mode in ("eager", "jitted")),
]
FIRST = {call.function: name for name, call in reversed(CALLS.items())}


def mode_of(mode: str) -> contextlib.AbstractContextManager:
    return jax.disable_jit() if mode == "no jit" else contextlib.nullcontext()


def run(call: Call, mode: str) -> Any:
    """Returns value and gradient, both made from the same numbers on the way."""

    def value(moving: Any) -> Any:
        return call.function(**moving, **call.rest)

    def total(moving: Any) -> Any:
        leaves = jax.tree.leaves(value(moving))
        floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        # Squared, where rows sum to one.
        return sum(jnp.sum(jnp.square(x) / (i + 1)) for i, x in enumerate(floats))

    moving = jax.tree.map(jnp.asarray, call.moving)
    wrap = jax.jit if mode == "jitted" else lambda function: function
    with mode_of(mode):
        return wrap(value)(moving), wrap(jax.grad(total))(moving)


def test_every_function_is_called() -> None:
    called = {call.function.__name__ for call in CALLS.values()}
    functions = {n for n in xent_jax.__all__ if not isinstance(vars(xent_jax)[n], type)}
    assert called == functions


@pytest.mark.parametrize(
    ("name", "switches", "mode"),
    shortened(
        [
            *((name, *modes) for name in CALLS for modes in MODES),
            *((name, *modes) for name in FIRST.values() for modes in OTHER_MODES),
        ],
        kept=[(name, *MODES[0]) for name in CALLS],
    ),
)
def test_finite_data_raise_under_no_switch(name, switches, mode) -> None:
    call = CALLS[name]
    with switched(switches):
        results = run(call, mode)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def has_ids(call: Call) -> bool:
    return np.ndim(call.rest.get("labels")) == 1


NAN_IN_ROW_3 = {"logits", "log_probs", "probs", "hidden", "scores", "values"}


def spoilt(call: Call) -> Call:
    """Returns the call with a NaN of the user's in a row that counts."""
    moving, rest = dict(call.moving), dict(call.rest)
    for arguments in (moving, rest):
        for name in NAN_IN_ROW_3 & arguments.keys():
            arguments[name] = np.array(arguments[name])
            arguments[name][3] = np.nan
    return call._replace(moving=moving, rest=rest)


each_mode = pytest.mark.parametrize("mode", ["eager", "jitted", "no jit"])


@each_mode
@pytest.mark.parametrize("name", FIRST.values())
def test_a_nan_among_the_data_is_found(name, mode) -> None:
    call = spoilt(CALLS[name])
    with switched("nans"), pytest.raises(FloatingPointError):
        run(call, mode)


@each_mode
@pytest.mark.parametrize("name", [n for n in FIRST.values() if has_ids(CALLS[n])])
def test_an_id_that_is_no_class_is_found(name, mode) -> None:
    call = CALLS[name]
    labels = LABELS.copy()
    labels[3] = CLASSES
    call = call._replace(rest=call.rest | {"labels": labels})
    with switched("nans"), pytest.raises(FloatingPointError):
        run(call, mode)


@each_mode
def test_a_nan_is_found_in_the_line_of_the_user(mode) -> None:
    def loss(x):
        logits = jnp.log(x)  # of a negative number
        return xent_jax.softmax_cross_entropy_with_integer_labels(logits, LABELS)

    wrapped = jax.jit(loss) if mode == "jitted" else loss
    found = pytest.raises(FloatingPointError)
    with switched("nans"), mode_of(mode), found as error:
        wrapped(jnp.asarray(PROBS - 0.5))
    frames = traceback.extract_tb(error.value.__traceback__)
    assert any("# of a negative number" in frame.line for frame in frames)
    package = xent_jax.__path__[0]
    assert not any(frame.filename.startswith(package) for frame in frames)
