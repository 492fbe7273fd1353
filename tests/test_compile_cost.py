"""How much there is to trace and to compile: counted, not timed."""

import jax
import pytest
import registry
from registry import FUNCTIONS, Case

SIZES = registry.Sizes((2048,), 32768, 1024)
IDS, DENSE, HEAD = (
    FUNCTIONS[name] for name in (registry.IDS, registry.DENSE, registry.HEAD)
)
# The loss that is differentiated, and the most equations and lines.
PROGRAMS = {
    "ids": (Case(IDS), 250, 900),
    "ids, all options": (Case(IDS, IDS.every()[-1]), 600, 2000),
    "dense": (Case(DENSE), 250, 900),
    "head, mean": (Case(HEAD, (), {"reduction": "mean"}), 400, 900),
    "head, per row": (Case(HEAD), 400, 900),
}


def mean_of(case):
    """Returns the mean, as a function of what it is differentiated by, and the rest.

    Numbers are constants.
    """
    numbers = case.numbers
    shapes = case.shapes(SIZES)
    by = list(case.keys)[: 2 if "kernel" in case.keys else 1]
    parts = registry.parted(by, {w: s for w, s in shapes.items() if w not in numbers})
    return lambda moving, rest: case(moving | rest | numbers).mean(), parts


def equations(jaxpr):
    """Counts the equations of a jaxpr and of all that it calls."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            total += equations(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("name", PROGRAMS)
def test_value_and_gradient_are_small_programs(name):
    case, most_equations, most_lines = PROGRAMS[name]
    mean, arguments = mean_of(case)
    function = jax.value_and_grad(mean)
    assert equations(jax.make_jaxpr(function)(*arguments).jaxpr) <= most_equations
    lowered = jax.jit(function).lower(*arguments)
    assert len(lowered.as_text().splitlines()) <= most_lines


def test_an_accelerator_does_not_pay_for_the_form_of_a_cpu():
    mean, arguments = mean_of(Case(IDS))
    exported = jax.jit(jax.value_and_grad(mean)).trace(*arguments)
    text = exported.lower(lowering_platforms=("tpu",)).as_text()
    assert len(text.splitlines()) <= 350
    assert "stablehlo.slice" not in text
    # A maximum, the label's logit and a sum in one part, where a GPU makes all at once.
    reductions = "stablehlo.reduce("
    other = exported.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(reductions) == other.count(reductions) + 2
