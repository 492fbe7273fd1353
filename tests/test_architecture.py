"""What the package promises about itself: layers, imports, size, start-up."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import xent_jax

PACKAGE = pathlib.Path(xent_jax.__file__).parent
# A module may import from earlier lines only.
LAYERS = [
    {"_checks", "_class_axis", "_one_device", "_blocks", "_placement"},
    {"_class_reductions"},
    {"_numerics"},
    {"_spread"},
    {"_arguments", "_label_terms", "_target_terms", "_layer", "_balancing"},
    {"_block_statistics", "_linear_arguments", "_linear_sum"},
    {"_linear_terms", "_linear_meshes"},
    {"_linear_loss"},
    {"_linear", "_linear_statistics"},
    {"_softmax", "_sigmoid", "_probabilities", "_mean", "_sinkhorn"},
    {"__init__"},
    {"_laws"},
    {"testing"},
    {"_cases"},
    {"verify"},
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports_of(module):
    """Returns every dotted name that a module imports."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name):
    """Returns the module of the package that a dotted name is in, or None."""
    parts = name.split(".")
    if parts[0] != "xent_jax":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MODULES else "__init__"


def test_every_module_has_a_layer():
    assert sorted(module for layer in LAYERS for module in layer) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    below = {name for layer in LAYERS[:level] for name in layer}
    used = {own(name) for name in imports_of(module)} - {None}
    assert used <= below, f"{module} imports {sorted(used - below)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_private_module_of_jax(module):
    private = [name for name in imports_of(module) if name.startswith("jax._src")]
    assert not private


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_unsuppressed(module):
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for suppression in ("noqa", "type: ignore", "pyrefly: ignore", "pyright: ignore"):
        assert suppression not in text


def test_public_names():
    assert sorted(xent_jax.__all__) == xent_jax.__all__
    public = {name for name in vars(xent_jax) if not name.startswith("_")}
    assert set(xent_jax.__all__) <= public
    for name in xent_jax.__all__:
        function = getattr(xent_jax, name)
        assert function.__module__.startswith("xent_jax.")
        if isinstance(function, type):
            assert "Attributes:" in function.__doc__
            continue
        for section in ("Args:", "Returns:", "Raises:", "Examples:", ">>> "):
            assert section in function.__doc__, f"{name} lacks {section}"


def test_importing_starts_no_backend_and_little_else():
    program = """
import json, sys
import jax, jax.numpy
before = set(sys.modules)
import xent_jax
roots = {name.split(".")[0] for name in set(sys.modules) - before}
jax.config.update("jax_num_cpu_devices", 3)
print(json.dumps([sorted(roots), jax.device_count()]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    roots, devices = json.loads(result.stdout)
    assert not {"chex", "rich", "optax", "flax"} & set(roots)
    # The number of devices can be set only before a backend starts.
    assert devices == 3
