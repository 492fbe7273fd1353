"""What the package promises about itself: layers, imports, size, start-up."""

import ast
import functools
import graphlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import xent_jax

pytestmark = pytest.mark.once

PACKAGE = pathlib.Path(xent_jax.__file__).parent
# Folders may import from earlier ones; within a folder nothing goes round in a circle.
FOLDERS = [
    "_reductions",
    "_arguments",
    "_targets",
    "_forms",
    "_losses",
    "",
    "_checking",
]
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    for path in PACKAGE.rglob("*.py")
)


def imports_of(module):
    """Returns every dotted name that a module imports."""
    path = PACKAGE / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
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
    for length in range(len(parts), 1, -1):
        module = ".".join(parts[1:length])
        if module in MODULES:
            return module
        if f"{module}.__init__" in MODULES:
            return f"{module}.__init__"
    return "__init__"


def level_of(module):
    """Returns the place of a module's folder; the public modules come last."""
    folder = module.split(".")[0] if "." in module else ""
    return FOLDERS.index(folder) + (module in ("testing", "verify"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    if module in ("__init__", "testing", "verify"):
        return
    used = {own(name) for name in imports_of(module)} - {None, "__init__", module}
    higher = [name for name in used if level_of(name) > level_of(module)]
    assert not higher, f"{module} imports {higher}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: {own(name) for name in imports_of(module)} - {None, module}
        for module in MODULES
    }
    order = graphlib.TopologicalSorter(graph)
    order.prepare()


@pytest.mark.parametrize("module", MODULES)
def test_no_private_module_of_jax(module):
    private = [name for name in imports_of(module) if name.startswith("jax._src")]
    assert not private


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_unsuppressed(module):
    text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "linear_softmax"])
def test_profiles_name_the_function_forward_and_backward(name):
    """The names that a profile of a training step shows."""
    function = {
        "softmax_cross_entropy": xent_jax.softmax_cross_entropy_with_integer_labels,
        "linear_softmax": functools.partial(
            xent_jax.linear_softmax_cross_entropy, kernel=jnp.ones((4, 6))
        ),
    }[name]

    def mean(x):
        return function(x, labels=jnp.zeros(3, jnp.int32)).mean()

    compiled = jax.jit(jax.value_and_grad(mean)).lower(jnp.ones((3, 4))).compile()
    names = set(re.findall(r'op_name="([^"]*)"', compiled.as_text()))
    inside = [text for text in names if name in text]
    assert [text for text in inside if "transpose" in text]
    assert [text for text in inside if "transpose" not in text]
