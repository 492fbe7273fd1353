"""Every row of the porting guide, evaluated against the library that it is about.

The rows are those of `docs/porting_*.py`, which the guide is written from. Both sides
run as a reader would run them: without the strict modes of this test suite. A library
that is not installed skips its rows and says so; where a row has a formula, that is
what ours is compared with, in float64.
"""

import functools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from porting_frameworks import TABLES
from porting_rows import EQUAL, FORMULAS, OURS, SETUP

import xent_jax

pytestmark = pytest.mark.once

# Read when the libraries are imported. Liger's kernels need a GPU or Triton's
# interpreter; Keras is to run on JAX.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TRITON_INTERPRET", "1")

ROWS = [
    pytest.param(table, row, id=f"{table.name}-{number}")
    for table in TABLES
    for number, row in enumerate(table.rows, 1)
]


@pytest.fixture(autouse=True)
def lenient():
    """JAX as it is out of the box, whatever peers make of it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def setup():
    names = {"np": np}
    exec(SETUP, names)
    return {k: v for k, v in names.items() if isinstance(v, np.ndarray)}


def in_jax():
    arrays = {name: jnp.asarray(array) for name, array in setup().items()}
    return {"jax": jax, "jnp": jnp} | arrays


@functools.cache
def our_names():
    public = {name: getattr(xent_jax, name) for name in xent_jax.__all__}
    names = in_jax() | public | {"np": np}
    exec(OURS, names)
    return names


@functools.cache
def their_names(table):
    names = in_jax() if table.arrays == "jax" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, on being imported
        try:
            exec(table.imports, names)
        except ImportError as error:
            pytest.skip(f"{table.library} is not installed: {error}")
    if table.arrays == "torch":
        names |= {k: names["torch"].from_numpy(v) for k, v in setup().items()}
    elif table.arrays == "tensorflow":
        names |= {k: names["tf"].constant(v) for k, v in setup().items()}
    if table.library == "keras" and names["keras"].backend.backend() != "jax":
        pytest.skip("the backend of keras is not jax (KERAS_BACKEND)")
    return names


@functools.cache
def formula_names():
    names = {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in setup().items()
    } | {"np": np}
    exec(FORMULAS, names)
    return names


def result_of(expression, names):
    """Returns the value, as NumPy or JAX has it, or the error."""
    try:
        value = eval(expression, names)
    except Exception as error:
        return error
    if hasattr(value, "detach"):
        value = value.detach()
    return value.numpy() if hasattr(value, "numpy") else value


def equal(left, right):
    np.testing.assert_allclose(left, right, rtol=2e-6, atol=1e-6)
    assert np.shape(left) == np.shape(right)
    return True


def about(results, number):
    """To six digits, however small: what the notes of a row print."""
    np.testing.assert_allclose(results, number, rtol=5e-6, atol=0)
    return True


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_row(table, row):
    expressions = table.expressions(row)
    # Ours comes first, so that it runs where the other library is missing.
    ours = result_of(expressions[1], our_names())
    assert isinstance(ours, Exception) == ("type(ours)" in row.check), ours
    if row.check == EQUAL:
        assert np.isfinite(ours).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.formula:
            theirs = eval(row.formula, formula_names())
        else:
            theirs = result_of(expressions[0], their_names(table))
    if type(theirs).__name__ == "InterpreterError":
        pytest.skip(f"{table.library} needs a GPU for this: {theirs}")
    names = our_names() | {"theirs": theirs, "ours": ours, "isnan": np.isnan}
    names |= {"equal": equal, "about": about}
    assert eval(row.check, names), (expressions, theirs, ours)
