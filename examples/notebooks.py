"""Writes what all notebooks have in common, and the notebooks themselves.

The source of a notebook is its percent script. Two things are derived from it:

- The cells tagged `setup`, which are the same in every script and follow the first one.
  (Between the two may be cells tagged `start`: what JAX is told before it starts.) They
  are written here, with what pyproject.toml says in `[project.urls]`: once `Repository`
  is a public repository on GitHub, they show a badge that opens the notebook in Colab,
  and install the library from there.
- The notebook, by jupytext.

Run it after every change of a script or of that setting; a new script gets its `setup`
cells, an old one keeps all others as they are:

    pip install '.[test]'
    python examples/notebooks.py
"""

import re
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
# On [Colab]({colab}), upload this notebook
# (File, Upload notebook), choose a runtime with a TPU, a GPU or neither, and bring the
# library along as a wheel, the file that this makes in a checkout:
#
#     pip wheel --no-deps .
#
# Upload `xent_jax-<version>-py3-none-any.whl` in the file panel on the left; the next
# cell installs it. (Or put a checkout on your Drive, mount that, and run
# `%pip install --no-deps <folder of the checkout>` in a cell of its own first.)
"""

FROM_GITHUB = """\
# On [Colab]({colab}), choose a runtime with a
# TPU, a GPU or neither; the next cell installs the library from its repository.
"""

SETUP = """\
# %% [markdown] tags=["setup"]
# ## Setting up
#
{badge}{how}#
# Everything else is on Colab already and stays as it is: the cell installs nothing but
# xent_jax (`--no-deps`), so that the runtime keeps the JAX that fits its device and
# need not restart. Elsewhere it does nothing; there,
# `pip install '.[examples]'` in a checkout brings all that the notebooks import.

# %% tags=["setup"]
import importlib
import importlib.util
import os
import subprocess
import sys
{imports}
IN_COLAB = "google.colab" in sys.modules
if IN_COLAB and importlib.util.find_spec("xent_jax") is None:
{source}    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, source], check=True)
    importlib.invalidate_caches()

# %% [markdown] tags=["setup"]
# Are the losses right on the device at hand? `python -m xent_jax.verify` holds every
# loss of logits and of probabilities, in three dtypes and five ways of calling it, to
# float64 on the host. It takes about 20 seconds on two CPU cores, longer where
# compiling takes longer, and shows how far it is. The cell runs it on Colab; elsewhere
# set `XENT_JAX_EXAMPLE_VERIFY=1` before you start.

# %% tags=["setup"]
import jax

print("devices:", jax.devices())
if IN_COLAB or os.environ.get("XENT_JAX_EXAMPLE_VERIFY"):
    from xent_jax import verify

    # The same as the command, but in this process: a TPU serves one at a time.
    if verify.main(["--platform", jax.default_backend()]) != 0:
        raise RuntimeError("verify: on this device a loss is out of its bounds")

"""

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
        return [c for c in cells if f'tags=["{tag}"]' in c.partition("\n")[0]]

    own = [c for c in cells if c not in tagged("setup") + tagged("start")]
    return "".join([header, title, *tagged("start"), setup_cells(name, slug), *own])


def main() -> None:
    """Brings every script and its notebook up to date."""
    import jupytext.cli

    slug = repository((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))
    for path in sorted(EXAMPLES.glob("[0-9][0-9]_*.py")):
        script = path.read_text(encoding="utf-8")
        path.write_text(with_setup_cells(script, path.stem, slug), encoding="utf-8")
        # An update keeps the ids of cells that did not change.
        jupytext.cli.jupytext(["--update", "--to", "ipynb", str(path)])


if __name__ == "__main__":
    main()
