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
import registry
from grids import shortened
from registry import EXTREME, FUNCTIONS, Case

import xent_jax

pytestmark = pytest.mark.usefixtures("unoptimized")


class Call(NamedTuple):
    """A call by keyword: what it is differentiated by, and the rest."""

    function: Callable[..., Any]
    moving: dict[str, Any]
    rest: dict[str, Any]


def _call(case: Case, **changed: Any) -> Call:
    """Returns a call with the hardest arguments that are finite, or some others."""
    drawn = case.draw(np.random.default_rng(20240229), extreme=True)
    arrays = registry.narrow(drawn) | changed
    moving = [n for n in case.moving if np.asarray(arrays[n]).dtype != bool]
    moving, rest = registry.parted(moving, arrays)
    static = dict(case.static)
    if "kernel" in arrays:
        static |= {"row_block": 4} if "reduction" in static else {"class_block": 2}
    return Call(case.row.call, moving, rest | static)


def _calls() -> Iterator[tuple[str, Call]]:
    for row in registry.ROWS:
        some = registry.MASKS if "kernel" in row.inputs else row.options
        alone = [(key,) for key in row.options if key in some]
        for options in dict.fromkeys([(), *alone, *row.every()]):
            for form in row.forms[:2]:  # a mean is made of a sum
                case = Case(row, options, form)
                yield case.name, _call(case)
    targets, mean = (FUNCTIONS[name] for name in (registry.ASSIGNMENT, registry.MEAN))
    rows, weighted = Case(targets, ("where",)), Case(mean, ("weights",))
    for static in ({"epsilon": 1e-3}, {"tol": 1e-2}):
        case = Case(targets, (), static | {"num_iters": 20})
        yield case.name, _call(case)
    keep = np.arange(EXTREME.batch[0]) % 2 == 0
    yield f"{rows.name}, none", _call(rows, where=keep & False)
    yield f"{weighted.name}, none", _call(weighted, weights=np.float32(0 * keep))
    yield f"{weighted.name}, a mask", _call(weighted, weights=keep)


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
# Options that stand alone are among all of them too.
ALONE = {
    Case(row, (key,), form).name
    for row in registry.ROWS
    for key in row.options
    for form in row.forms[:2]
    if len(row.options) > 1
}


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
        kept=[
            (name, *MODES[0])
            for index, name in enumerate(CALLS)
            if name in FIRST.values() or (name not in ALONE and index % 3 == 1)
        ],
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


each_mode = pytest.mark.parametrize(
    "mode", shortened(["eager", "jitted", "no jit"], kept=["jitted"])
)


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
    labels = call.rest["labels"].copy()
    labels[3] = EXTREME.classes
    call = call._replace(rest=call.rest | {"labels": labels})
    with switched("nans"), pytest.raises(FloatingPointError):
        run(call, mode)


@each_mode
def test_a_nan_is_found_in_the_line_of_the_user(mode) -> None:
    labels = np.array([0, 1])

    def loss(x):
        logits = jnp.log(x)  # of a negative number
        return xent_jax.softmax_cross_entropy_with_integer_labels(logits, labels)

    wrapped = jax.jit(loss) if mode == "jitted" else loss
    found = pytest.raises(FloatingPointError)
    with switched("nans"), mode_of(mode), found as error:
        wrapped(jnp.asarray(np.linspace(-0.5, 0.5, 10, dtype=np.float32).reshape(2, 5)))
    frames = traceback.extract_tb(error.value.__traceback__)
    assert any("# of a negative number" in frame.line for frame in frames)
    package = xent_jax.__path__[0]
    assert not any(frame.filename.startswith(package) for frame in frames)
