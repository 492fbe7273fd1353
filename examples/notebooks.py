"""Writes what all notebooks have in common, and the notebooks themselves.

The source of a notebook is its percent script. Two things are derived from it:

- The cells tagged `setup`, which are the same in every script and follow the first one.
  (Between the two may be cells tagged `start`: what JAX is told before it starts.) They
  are written here, with what pyproject.toml says in `[project.urls]`: once `Repository`
  is a public repository on GitHub, they show a badge that opens the notebook in Colab,
  and install the library from there.
- The notebook, by jupytext, and its outputs, by running it at its full setting: those
  are committed, since a code host shows what a file holds.

Run it after every change of a script or of that setting; a new script gets its `setup`
cells, an old one keeps all others as they are. A notebook is run if a cell of it has
changed, and with `--all` in any case, which takes five minutes on two cores:

    pip install '.[test]'
    python examples/notebooks.py
"""

import argparse
import os
import re
import tempfile
import tomllib
from pathlib import Path

EXAMPLES = Path(__file__).parent
BRANCH = "main"
# What Colab itself names its badge and its way to a notebook on GitHub.
COLAB = "https://colab.research.google.com"

BADGE = """\
# [![Open in Colab][badge]][notebook]
#
# [badge]: {colab}/assets/colab-badge.svg
# [notebook]: {colab}/github/{slug}/blob/{branch}/examples/{name}.ipynb
#
"""

FROM_A_WHEEL = """\
# On [Colab]({colab}), upload the wheel that
# `pip wheel --no-deps .` makes in a checkout; this cell installs it and nothing else.
"""

FROM_GITHUB = """\
# On [Colab]({colab}), this cell installs the library
# from its repository and nothing else.
"""

# The input is folded where a notebook is shown by JupyterLab, Colab or the docs.
FOLDED = (
    'cellView="form" jupyter={{"source_hidden": true}} tags=["setup", "hide-input"]'
)

SETUP = (
    """\
# %% [markdown] tags=["setup"]
{badge}# *Set-up.* In a checkout, `pip install '.[examples]'` brings all that is needed.
{how}
# %% """
    + FOLDED
    + """
# @title Set-up {{ display-mode: "form" }}
import importlib
import importlib.util
import os
import subprocess
import sys
{imports}
import jax

IN_COLAB = "google.colab" in sys.modules
if IN_COLAB and importlib.util.find_spec("xent_jax") is None:
{source}    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, source], check=True)
    importlib.invalidate_caches()

print("devices:", jax.devices())
# Are the losses right on this device? Asked on Colab; elsewhere set the variable, or
# run `python -m xent_jax.verify`.
if IN_COLAB or os.environ.get("XENT_JAX_EXAMPLE_VERIFY"):
    from xent_jax import verify

    # The same as the command, but in this process: a TPU serves one at a time.
    if verify.main(["--platform", jax.default_backend()]) != 0:
        raise RuntimeError("verify: on this device a loss is out of its bounds")

"""
)

FIND_WHEEL = """\
    wheels = sorted(Path().glob("xent_jax-*.whl"), key=lambda p: p.stat().st_mtime)
    if not wheels:
        raise FileNotFoundError(
            "upload xent_jax-<version>-py3-none-any.whl in the file panel on the left "
            "(`pip wheel --no-deps .` in a checkout makes it), then run this cell again"
        )
    source = str(wheels[-1])
"""

IN_REPOSITORY = """\
    source = "git+https://github.com/{slug}@{branch}"
"""


def repository(pyproject: str) -> str | None:
    """Returns `owner/name` of the setting in pyproject.toml, None before it is filled.

    Raises:
      ValueError: it is filled with something else than a repository on GitHub.
    """
    url = tomllib.loads(pyproject)["project"].get("urls", {}).get("Repository")
    if not url:
        return None
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", url)
    if match is None:
        raise ValueError(
            "pyproject.toml: Repository in [project.urls] must be "
            f"https://github.com/<owner>/<name>, got {url!r}"
        )
    return match[1]


def setup_cells(name: str, slug: str | None) -> str:
    """Returns the `setup` cells of the notebook `name`, in the percent format."""
    if slug is None:
        parts = {
            "badge": "",
            "how": FROM_A_WHEEL.format(colab=COLAB),
            "imports": "from pathlib import Path\n",
            "source": FIND_WHEEL,
        }
    else:
        parts = {
            "badge": BADGE.format(colab=COLAB, slug=slug, branch=BRANCH, name=name),
            "how": FROM_GITHUB.format(colab=COLAB),
            "imports": "",
            "source": IN_REPOSITORY.format(slug=slug, branch=BRANCH),
        }
    return SETUP.format(**parts)


def with_setup_cells(script: str, name: str, slug: str | None) -> str:
    """Returns the script with its `setup` cells as they have to be."""
    header, title, *cells = re.split(r"(?m)^(?=# %%)", script)

    def tagged(tag: str) -> list[str]:
        return [c for c in cells if f'tags=["{tag}"' in c.partition("\n")[0]]

    own = [c for c in cells if c not in tagged("setup") + tagged("start")]
    return "".join([header, title, *tagged("start"), setup_cells(name, slug), *own])


def has_outputs(notebook) -> bool:
    """Whether every cell of code has been run as it stands."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return all(cell.execution_count for cell in code)


def execute(path: Path) -> None:
    """Runs a notebook in a folder of its own, on a CPU, and writes what it shows."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    # What shortens a run, or draws bars while it lasts.
    for name in [name for name in os.environ if name.startswith("XENT_JAX_EXAMPLE_")]:
        del os.environ[name]
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    notebook.metadata = metadata  # without the version of Python that ran it
    nbformat.write(notebook, path)


def main() -> None:
    """Brings every script and its notebook up to date."""
    import jupytext.cli
    import nbformat

    parser = argparse.ArgumentParser(description="Writes and runs the notebooks.")
    parser.add_argument("--all", action="store_true", help="run them all")
    run_all = parser.parse_args().all
    slug = repository((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))
    for path in sorted(EXAMPLES.glob("[0-9][0-9]_*.py")):
        script = path.read_text(encoding="utf-8")
        path.write_text(with_setup_cells(script, path.stem, slug), encoding="utf-8")
        # An update keeps the ids and outputs of cells that did not change.
        jupytext.cli.jupytext(["--update", "--to", "ipynb", str(path)])
        notebook = path.with_suffix(".ipynb")
        if run_all or not has_outputs(nbformat.read(notebook, as_version=4)):
            print(f"running {notebook.name}", flush=True)
            execute(notebook)


if __name__ == "__main__":
    main()
