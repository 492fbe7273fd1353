"""The strictest modes of JAX, eight CPU devices, reproducible random examples."""

import os

# Before jax is imported: tests choose their devices, compilers need no hardware.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, max_examples=40, database=None
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Forgets the programs of a module with it: there are thousands."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with the same numbers in every test."""
    return np.random.default_rng(20240229)


@pytest.fixture
def x64():
    """Runs a test with 64-bit types."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def unoptimized():
    """Compiles in a third of the time: what is computed is the same.

    Sizes and accuracy are tested without it.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
