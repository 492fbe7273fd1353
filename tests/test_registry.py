"""The registry is of this package: its functions, its keywords and what verify has."""

import inspect
import itertools

import jax
import numpy as np
import pytest
import registry
from grids import covering, shortened
from registry import ARGUMENTS, EXTREME, FUNCTIONS, STRUCTURAL, Case, keyword_of

import xent_jax
from xent_jax._arguments.options import axes_of
from xent_jax._checking import cases

PUBLIC = {
    name for name in xent_jax.__all__ if inspect.isfunction(getattr(xent_jax, name))
}
pytestmark = pytest.mark.once
every_row = pytest.mark.parametrize("key", FUNCTIONS)


def keywords_of(row):
    """Returns what the registry gives a function."""
    return {keyword_of(key) for key in (*row.inputs, *row.options)}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_function_has_all_of_its_keywords(name):
    rows = [row for row in registry.ROWS if row.name == name]
    given = set().union(*map(keywords_of, rows))
    parameters = set(inspect.signature(getattr(xent_jax, name)).parameters)
    assert given <= parameters
    assert parameters - given <= STRUCTURAL


def test_nothing_else_has_a_row():
    assert {row.name for row in registry.ROWS} == PUBLIC
    assert len(FUNCTIONS) == len(registry.ROWS)
    takers = set(itertools.chain.from_iterable(one.of for one in ARGUMENTS.values()))
    assert takers <= PUBLIC
    given = set(itertools.chain.from_iterable(row.inputs for row in registry.ROWS))
    # What is always given is no option, and the other way round.
    assert given == {key for key, one in ARGUMENTS.items() if not one.of}


@every_row
def test_inputs_are_the_first_parameters(key):
    row = FUNCTIONS[key]
    words = [keyword_of(key) for key in row.inputs]
    parameters = inspect.signature(row.call).parameters
    assert [word for word in parameters if word in words] == words
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    assert needed == words[: len(needed)]


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("key", shortened(FUNCTIONS, kept=[*registry.LOSSES]))
def test_every_option_changes_something(key):
    """What is drawn is no option's default, and is of the axes that the row says."""
    row = FUNCTIONS[key]
    sizes = registry.Sizes()
    form = row.forms[0]
    for option in row.options:
        case = Case(row, (option,), form)
        arrays = registry.narrow(case.draw(np.random.default_rng(0), sizes))
        shapes = case.shapes(sizes)
        for word, array in arrays.items():
            assert array.shape == sizes.shape(case.axes[word]) == shapes[word].shape
            assert array.dtype == shapes[word].dtype
        if (key, option) == (registry.NLL, "where_classes"):
            continue  # the log-probability of a kept class does not depend on it
        plain = Case(row, (), form)
        results = plain({word: arrays[word] for word in plain.keys})
        others = case(arrays)
        assert any(
            np.any(one != other)
            for one, other in zip(*map(jax.tree.leaves, (results, others)), strict=True)
        ), option


@every_row
def test_extreme_arguments_are_finite(key):
    row = FUNCTIONS[key]
    for options in row.every():
        drawn = Case(row, options).draw(np.random.default_rng(0), extreme=True)
        for word, array in drawn.items():
            assert array.shape == EXTREME.shape(Case(row, options).axes[word])
            assert np.all(np.isfinite(array))


@pytest.mark.parametrize("name", registry.HEADS)
def test_meshes_shard_by_the_same_axes(name):
    for row in registry.ROWS:
        if row.name == name:
            for key in (*row.inputs, *row.options):
                # Labels may lack the last of the axes that several ids a row have.
                assert axes_of(keyword_of(key)).startswith(ARGUMENTS[key].axes)


def test_what_is_drawn_does_not_depend_on_the_others():
    row = FUNCTIONS[registry.HEAD]
    alone = Case(row).draw(np.random.default_rng(0))
    among = Case(row, row.options).draw(np.random.default_rng(0))
    for word in ("hidden", "kernel"):
        np.testing.assert_array_equal(alone[word], among[word])


@pytest.mark.parametrize("count", range(3, 12))
def test_any_three_options_are_in_one_set(count):
    options = tuple("abcdefghijkl"[:count])
    sets = covering(options)
    for three in itertools.combinations(options, 3):
        assert any(set(three) <= set(one) for one in sets)
    assert len(sets) <= 20
    if count == 8:  # every pair, with and without any third
        assert len(sets) == 14


def test_verify_has_a_case_of_every_function():
    verified: set[str] = set()
    for case in cases.cases():
        verified |= set(case.verifies or (case.loss.__name__,))
    assert verified & PUBLIC == {row.name for row in registry.ROWS}
    assert verified == set(xent_jax.__all__)


def test_verify_has_every_option_of_the_losses_of_logits():
    used = {
        (case.loss.__name__, option)
        for case in cases.cases()
        if not case.verifies
        for option in (*case.options, *(["where"] if case.where is not None else []))
    }
    for name in (registry.IDS, registry.DENSE):
        row = FUNCTIONS[name]
        assert {(name, o) for o in (*row.unmasked(), "where")} <= used
