"""Sphinx's settings: `sphinx-build -W docs build/docs` from the root of a checkout.

The notebooks are shown with the results that are committed. `XENT_JAX_DOCS_EXECUTE=1`
runs them during the build instead, in this environment. Nothing is fetched, neither by
the build nor by who reads a page.
"""

import os
import pathlib
import re
import shutil

import xent_jax

DOCS = pathlib.Path(__file__).parent
NOTEBOOKS = DOCS / "notebooks"  # git ignores it

project = "xent_jax"
author = copyright = "The xent_jax authors"
version = release = xent_jax.__version__

extensions = [
    "myst_nb",
    "sphinx-mathjax-offline",  # the formulas' script, from a package
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["**.ipynb_checkpoints"]

# Anchors of headings as on a code host, so that links between pages work there too.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

autodoc_typehints = "none"  # the sections of a docstring say more
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Single backquotes are code, and a link where what they name is documented.
default_role = "py:obj"

# Links into other libraries' documentation need their inventories, which are fetched:
# a build without a network leaves them out instead of failing.
if os.environ.get("XENT_JAX_DOCS_ONLINE"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
    }

nb_execution_mode = "force" if os.environ.get("XENT_JAX_DOCS_EXECUTE") else "off"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
# A notebook that writes to stderr warns of something; progress bars are off for that.
nb_output_stderr = "warn"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment

html_theme = "sphinx_book_theme"
html_title = "xent_jax"
html_static_path = ["static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "navbar_persistent": [],  # the search is in the sidebar
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
}

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Examples|References):$")


def copy_notebooks() -> None:
    """Brings the notebooks below this folder, where Sphinx looks for pages."""
    NOTEBOOKS.mkdir(exist_ok=True)
    sources = sorted((DOCS.parent / "examples").glob("[0-9][0-9]_*.ipynb"))
    for old in {path.name for path in NOTEBOOKS.glob("*.ipynb")} - {
        path.name for path in sources
    }:
        (NOTEBOOKS / old).unlink()
    for source in sources:
        copy = NOTEBOOKS / source.name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copyfile(source, copy)


def mark_formulas(app, what, name, obj, options, lines) -> None:
    """Makes literal blocks of the indented formulas that docstrings begin with.

    As plain text they read well; to reStructuredText they would be quotations, and
    letters such as the bars of |x| markup.
    """
    marked = []
    for number, line in enumerate(lines):
        if _SECTION.match(line):
            marked += lines[number:]
            break
        begins = line.startswith("    ") and marked and not marked[-1].strip()
        before = next((text for text in reversed(marked) if text.strip()), "")
        if begins and before and not before.startswith(" "):
            marked += [".. code-block:: none", ""]
        marked.append(line)
    lines[:] = marked


def setup(app) -> None:
    """Registers what is done to docstrings, before napoleon reads them."""
    app.connect("autodoc-process-docstring", mark_formulas, priority=400)


copy_notebooks()
