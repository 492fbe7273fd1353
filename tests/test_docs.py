"""README.md, CHANGELOG.md and the pages of `docs/`: complete, linked, up to date.

That the site builds without a warning is for `.ci/run`, which has Sphinx; what is here
needs the files, and matplotlib to draw the pictures anew.
"""

import pathlib
import re

import charts
import pytest
import render

import xent_jax
import xent_jax.testing

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
OF_ROOT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in OF_ROOT), *sorted(DOCS.glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1\s*$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
TARGET = re.compile(r"^\(([\w-]+)\)=$", re.MULTILINE)
LINK = re.compile(r"(?<!`)\]\(([^()\s]+)\)")
ATTRIBUTE = re.compile(r'\b(?:href|src|srcset)="([^"]+)"')
DIRECTIVE = re.compile(r"^```\{(?:image|include|figure)\} +(\S+)$", re.MULTILINE)
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """The ids that a code host and MyST give to a page's headings, and its targets."""
    prose = FENCE.sub("", read(page))
    slugs = set(TARGET.findall(prose))
    for heading in HEADING.findall(prose):
        text = re.sub(r"[^\w\- ]", "", heading.lower())
        slugs.add(text.replace(" ", "-"))
    return slugs


def targets(page):
    """Every link of a page, pictures and included files too."""
    text = read(page)
    found = LINK.findall(FENCE.sub("", text)) + ATTRIBUTE.findall(text)
    return found + DIRECTIVE.findall(text)


@each_page
def test_links_lead_somewhere(page):
    for target in targets(page):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert linked.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


@each_page
def test_no_link_to_what_is_not_there_yet(page):
    """No repository and no release are public: a link to one would be dead."""
    hosts = {"keepachangelog.com", "semver.org"}
    for target in re.findall(r"https?://([^/\s)\"]+)", read(page)):
        assert target in hosts, target


def test_links_are_found():
    """Keeps the patterns honest: README has links of every kind."""
    found = targets(ROOT / "README.md")
    assert {"CHANGELOG.md", "docs/cpu.md", "docs/porting.md"} <= set(found)
    assert "docs/pictures/error-by-margin-dark.svg" in found
    assert "pictures/error-by-margin-light.svg" in targets(DOCS / "index.md")
    assert "coming-from-optax" in anchors(ROOT / "README.md")
    assert "from-pytorchs-linear_cross_entropy" in anchors(DOCS / "porting.md")


def test_readme_is_two_screens():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1500


def test_readme_says_what_was_measured():
    """Where it matters: every figure is one that the script printed."""
    printed = read(render.MATTERS)
    told = read(ROOT / "README.md").partition("## When it matters")[2]
    told = told.partition("`python examples/where_it_matters.py`")[0]
    for figure in ("0.9733", "41.5 %", "84 %", "8.2e-19", "1.4e-10"):
        assert figure in told
        assert figure.replace(" %", "%") in printed


def test_every_page_is_in_the_navigation():
    entries = set()
    for page in sorted(DOCS.glob("*.md")):
        for toctree in TOCTREE.findall(read(page)):
            lines = (line.strip() for line in toctree.splitlines())
            entries |= {line for line in lines if line and not line.startswith(":")}
    assert entries >= {page.stem for page in DOCS.glob("*.md")} - {"index"}
    for entry in entries - {"notebooks/*"}:
        assert (DOCS / f"{entry}.md").exists(), entry


@pytest.mark.parametrize("module", [xent_jax, xent_jax.testing])
def test_every_public_name_is_in_the_reference(module):
    listed, current = set(), ""
    for directive, name in re.findall(
        r"^\.\. (currentmodule|auto\w+|py:data):: ([\w.]+)",
        read(DOCS / "api.md"),
        re.MULTILINE,
    ):
        if directive == "currentmodule":
            current = name
        elif directive != "automodule" and current == module.__name__:
            listed.add(name)
    assert listed == set(module.__all__)


def files_of(*suffixes):
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for path in render.outputs()
        if path.suffix in suffixes
    ]


@pytest.mark.parametrize("path", files_of(".md"))
def test_tables_are_those_of_their_data(path):
    assert read(path) == render.outputs()[path], "run: python docs/render.py"


@pytest.mark.parametrize("path", files_of(".svg"))
def test_pictures_show_their_data(path):
    """What is drawn is compared always, the bytes where one matplotlib drew both.

    Versions of matplotlib write the same curve in other bytes, and the extra has a
    range of them.
    """
    text, anew = read(path), render.outputs()[path]
    (drawn_by, found), (version, expected) = charts.shown(text), charts.shown(anew)
    assert found == expected, "run: python docs/render.py"
    if drawn_by == version:
        assert text == anew, "run: python docs/render.py"


def test_a_picture_says_what_is_in_its_data():
    """Keeps the comparison honest: the numbers are there, and all of them."""
    text = render.outputs()[DOCS / "pictures" / "memory-by-vocabulary-dark.svg"]
    _, found = charts.shown(text)
    sizes = [size for line in found["lines"].values() for _, size in line]
    data = [entry["temp_bytes"] for entry in render.PROGRAMS["vocabularies"]]
    assert sorted(size * charts.GIBIBYTE for size in sizes) == sorted(data)


def test_every_table_has_its_place():
    """A table that no page shows would be tested and never read."""
    places = [name for page in render.PAGES for _, name, *_ in places_of(page)]
    assert set(places) == set(render.BLOCKS)


def places_of(page):
    found = render.BLOCK.findall(read(page))
    # One place whose two comments differ would swallow the text up to the next.
    assert len(found) == read(page).count("<!-- begin ")
    return found
