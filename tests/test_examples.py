"""Every example is a percent script with its notebook; both run, in a short setting.

They run in processes of their own: a user's JAX has none of the strict modes that the
test suite sets.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xent_jax

PACKAGES = (
    "flax",
    "ipykernel",
    "jupytext",
    "matplotlib",
    "nbclient",
    "optax",
    "sklearn",
    "tqdm",
)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"examples need packages not installed: {', '.join(MISSING)}"
)

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
each_example = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# What an example has to print: a number measured on data it did not train on.
HELD_OUT = re.compile(r"^held-out .+: \d", re.MULTILINE)

EXECUTE_NOTEBOOK = """
import sys
import nbclient
import nbformat

notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print(output.get("text") or list(output.get("data", {})))
"""


def run(arguments: list[str], folder: Path, backend: str) -> str:
    """Runs Python in `folder` with JAX's defaults, one epoch; returns its output."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_", "PYTHONWARNINGS"))
    }
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": backend,
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment
        "PYTHONPATH": str(Path(xent_jax.__file__).parents[1]),
        "XENT_JAX_EXAMPLE_EPOCHS": "1",
        "XENT_JAX_EXAMPLE_FIGURE": str(folder / "figure.png"),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def saves_figure(script: Path) -> bool:
    return "XENT_JAX_EXAMPLE_FIGURE" in script.read_text(encoding="utf-8")


@each_example
def test_notebook_is_the_pair_of_its_script(script: Path):
    # Imported here: without these packages the tests skip instead of failing.
    import jupytext
    import nbformat

    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    expected = jupytext.read(script)
    hint = f"run: jupytext --update --to ipynb examples/{script.name}"
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in expected.cells
    ], hint
    assert notebook.metadata.kernelspec == expected.metadata.kernelspec, hint


@each_example
def test_notebook_is_stripped_and_installs_nothing(script: Path):
    import nbformat

    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE)


@each_example
def test_script_runs(script: Path, tmp_path: Path):
    output = run([str(script)], tmp_path, backend="Agg")
    assert HELD_OUT.search(output), output
    if saves_figure(script):
        assert (tmp_path / "figure.png").stat().st_size > 0


@each_example
def test_notebook_runs(script: Path, tmp_path: Path):
    # nbclient raises on the first cell that ends in an error.
    notebook = script.with_suffix(".ipynb")
    inline = "module://matplotlib_inline.backend_inline"
    output = run(["-c", EXECUTE_NOTEBOOK, str(notebook)], tmp_path, backend=inline)
    assert HELD_OUT.search(output), output
    if saves_figure(script):
        assert "image/png" in output
