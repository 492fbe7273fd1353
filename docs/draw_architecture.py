"""The picture of `docs/architecture.md`: folders, modules, and who imports whom.

Everything in it comes from the import statements, read with `ast`: the arrows, the
order of the folders, and the order of the modules in each. No folder imports from one
above it, and in its own folder no module from one that stands before it. Were there a
circle, `graphlib` would raise.
"""

import ast
import collections
import graphlib
import pathlib
from typing import NamedTuple

import charts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

PACKAGE = pathlib.Path(__file__).parents[1] / "xent_jax"
WIDTH, LEFT, RIGHT = 560, 4, 450  # in pixels; boxes end where arrows begin
LINE, PAD, GAP, NAMES = 21, 6, 14, 116  # of the words; the folder's name comes first
TITLE = (
    "Folders and modules of xent_jax and their imports: public names, losses, forms, "
    "targets, arguments, reductions, each importing only from those below it."
)


class Imports(NamedTuple):
    """What the import statements say.

    Attributes:
      modules: of every folder, users first; a public module is its own folder.
      arrows: how many modules of a folder's import one of another's, by both.
    """

    modules: dict[str, list[str]]
    arrows: dict[tuple[str, str], int]


def _names(tree: ast.Module) -> set[str]:
    """Returns the dotted names that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _module(name: str, modules: set[str]) -> str | None:
    """Returns the module of the package that a dotted name is in, `None` for others."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    inside = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
    return next((module for module in inside if module in modules), "__init__")


def _users_first(uses: dict[str, set[str]]) -> list[str]:
    """Returns names so that each stands before all that it uses, by name if it can."""
    sorter, order = graphlib.TopologicalSorter(uses), []
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order += ready
        sorter.done(*ready)
    return order[::-1]


def read_imports() -> Imports:
    """Reads the package."""
    trees = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent == PACKAGE
    }
    uses = {}
    for module, path in trees.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {_module(name, set(trees)) for name in _names(tree)}
        uses[module] = found - {None, module}
    folder_of = {module: module.split(".")[0] for module in uses}
    arrows = collections.Counter(
        (folder_of[module], folder_of[used])
        for module, found in uses.items()
        for used in found
        if folder_of[module] != folder_of[used]
    )
    folders = {folder: set() for folder in folder_of.values()}
    for user, used in arrows:
        folders[user].add(used)
    modules = {}
    for folder in _users_first(folders):
        inside = {
            module: {used for used in found if folder_of[used] == folder}
            for module, found in uses.items()
            if folder_of[module] == folder
        }
        modules[folder] = [name.split(".", 1)[-1] for name in _users_first(inside)]
    return Imports(modules, dict(sorted(arrows.items())))


def _lines(modules: list[str]) -> list[str]:
    """Returns the names of modules, on lines that a box is wide enough for."""
    lines = [""]
    for module in modules:
        joined = f"{lines[-1]} · {module}" if lines[-1] else module
        if len(joined) > 48:
            lines.append(module)
        else:
            lines[-1] = joined
    return lines


class _Box(NamedTuple):
    """A folder's place, in pixels from the top."""

    top: float
    height: float
    lines: list[str]


def _boxes(imports: Imports) -> dict[str, _Box]:
    boxes, top = {}, 4.0
    for folder, modules in imports.modules.items():
        lines = [] if modules == [folder] else _lines(modules)
        height = max(len(lines), 1) * LINE + 2 * PAD
        boxes[folder] = _Box(top, height, lines)
        top += height + GAP
    return boxes


def _ends(
    imports: Imports, boxes: dict[str, _Box]
) -> dict[tuple[str, str], list[float]]:
    """Returns the height at which every arrow leaves one box and enters another.

    Arrows enter in the upper half of a box's side and leave in the lower, those that
    go furthest outermost, so that they lie in each other and do not cross there.
    """
    order = list(boxes)
    ends = {arrow: [0.0, 0.0] for arrow in imports.arrows}
    for folder, box in boxes.items():
        leaving = [arrow for arrow in ends if arrow[0] == folder]
        leaving.sort(key=lambda arrow: -order.index(arrow[1]))
        entering = [arrow for arrow in ends if arrow[1] == folder]
        entering.sort(key=lambda arrow: -order.index(arrow[0]))
        halves = (entering, 1, 0.08), (leaving, 0, 0.54)
        for arrows, end, start in halves:
            for place, arrow in enumerate(arrows, 1):
                share = start + 0.38 * place / (len(arrows) + 1)
                ends[arrow][end] = box.top + share * box.height
    return ends


def _draw_box(
    axes: Axes, folder: str, box: _Box, colour: str, theme: charts.Theme
) -> None:
    shape = FancyBboxPatch(
        (LEFT, box.top),
        RIGHT - LEFT,
        box.height,
        boxstyle="round,pad=0,rounding_size=5",
        facecolor="none",
        edgecolor=colour,
        linewidth=1.2,
    )
    axes.add_patch(shape)
    middle = box.top + box.height / 2
    place = {"va": "center_baseline", "fontsize": 13 * charts.POINT}
    name = "xent_jax" if folder == "__init__" else folder
    axes.text(LEFT + 10, middle, name, color=colour, weight="bold", **place)
    for number, line in enumerate(box.lines):
        height = middle + (number - (len(box.lines) - 1) / 2) * LINE
        axes.text(LEFT + NAMES, height, line, color=theme.text, **place)


def draw(theme: charts.Theme) -> Figure:
    """Returns the figure."""
    imports = read_imports()
    boxes = _boxes(imports)
    order = list(boxes)
    colours = {
        folder: theme.series[place % len(theme.series)]
        for place, folder in enumerate(order)
    }
    last = boxes[order[-1]]
    height = int(last.top + last.height) + 4
    figure = charts.figure_of(WIDTH, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    for (user, used), (start, end) in _ends(imports, boxes).items():
        span = order.index(used) - order.index(user)
        out = RIGHT + 20 + 27 * span
        corners = [(RIGHT + 1, start), (out, start), (out, end), (RIGHT + 2, end)]
        curve = Path(corners, [Path.MOVETO, *[Path.CURVE4] * 3])
        arrow = FancyArrowPatch(
            path=curve,
            arrowstyle="-|>,head_length=4,head_width=2.2",
            color=colours[user],
            linewidth=1.2,
            label=f"{user} → {used}: {imports.arrows[user, used]}",
        )
        axes.add_patch(arrow)
    for folder, box in boxes.items():
        _draw_box(axes, folder, box, colours[folder], theme)
    return figure


def pictures() -> dict[str, str]:
    """Returns the text of the picture, for light and dark pages, by its file."""
    return {
        f"architecture-{shade}.svg": charts.svg(draw, theme, TITLE)
        for shade, theme in charts.THEMES.items()
    }
