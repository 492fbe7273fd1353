"""How much there is to trace and to compile: counted, not timed."""

import jax
import jax.numpy as jnp
import pytest

import xent_jax

IDS = xent_jax.softmax_cross_entropy_with_integer_labels
HEAD = xent_jax.linear_softmax_cross_entropy
ROWS, CLASSES, FEATURES = 2048, 32768, 1024


def shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


LOGITS, LABELS = shape(ROWS, CLASSES), shape(ROWS, dtype=jnp.int32)
HIDDEN, KERNEL = shape(ROWS, FEATURES), shape(FEATURES, CLASSES)
# The mean that is differentiated, its arguments, and the most equations and lines.
PROGRAMS = {
    "ids": (lambda x, y: IDS(x, y).mean(), (LOGITS, LABELS), 250, 1000),
    "ids, all options": (
        lambda x, y, keep, w: IDS(
            x, y, where=keep, label_smoothing=0.1, class_weights=w, z_loss=1e-4
        ).mean(),
        (LOGITS, LABELS, shape(ROWS, CLASSES, dtype=jnp.bool_), shape(CLASSES)),
        600,
        2250,
    ),
    "dense": (
        lambda x, t: xent_jax.softmax_cross_entropy(x, t).mean(),
        (LOGITS, LOGITS),
        250,
        1350,
    ),
    "head, mean": (
        lambda h, k, y: HEAD(h, k, y, reduction="mean"),
        (HIDDEN, KERNEL, LABELS),
        400,
        900,
    ),
    "head, per row": (
        lambda h, k, y: HEAD(h, k, y).mean(),
        (HIDDEN, KERNEL, LABELS),
        400,
        900,
    ),
}


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
    mean, arguments, most_equations, most_lines = PROGRAMS[name]
    by = (0, 1) if name.startswith("head") else 0
    function = jax.value_and_grad(mean, by)
    assert equations(jax.make_jaxpr(function)(*arguments).jaxpr) <= most_equations
    lowered = jax.jit(function).lower(*arguments)
    assert len(lowered.as_text().splitlines()) <= most_lines


def test_an_accelerator_does_not_pay_for_the_form_of_a_cpu():
    def mean(logits, labels):
        return IDS(logits, labels).mean()

    exported = jax.jit(jax.value_and_grad(mean)).trace(LOGITS, LABELS)
    text = exported.lower(lowering_platforms=("tpu",)).as_text()
    assert len(text.splitlines()) <= 350
    assert "stablehlo.slice" not in text
    # A maximum, the label's logit and a sum in one part, where a GPU makes all at once.
    reductions = "stablehlo.reduce("
    other = exported.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(reductions) == other.count(reductions) + 2
