"""Every example is a percent script with its notebook; the notebooks run, made short.

They run in processes of their own: a user's JAX has none of the strict modes that the
test suite sets. What a notebook runs is what its script runs, so one script is enough.
"""

import collections
import decimal
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import xent_jax
from xent_jax import verify

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

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
# The others run before a change lands; their outputs are committed.
EACH_RUN = [
    pytest.param(
        path,
        id=path.stem,
        marks=() if path.stem == "01_digits" else pytest.mark.exhaustive,
    )
    for path in SCRIPTS
]
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


def load_generator() -> types.ModuleType:
    """Imports examples/notebooks.py, which is in no package."""
    path = EXAMPLES / "notebooks.py"
    spec = importlib.util.spec_from_file_location("notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = load_generator()
SLUG = notebooks.repository((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def environment(folder: Path, backend: str) -> dict[str, str]:
    """Returns what examples run in: JAX's defaults, one epoch, a figure in `folder`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_", "XENT_JAX_", "PYTHONWARNINGS"))
    }
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": backend,
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment
        "PYTHONPATH": str(Path(xent_jax.__file__).parents[1]),
        "XENT_JAX_EXAMPLE_EPOCHS": "1",
        "XENT_JAX_EXAMPLE_FIGURE": str(folder / "figure.png"),
    }


def run(arguments: list[str], folder: Path, backend: str) -> str:
    """Runs Python in `folder`, for one epoch; returns its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(folder, backend),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def setup_sources(slug: str | None, kind: str = "code") -> list[str]:
    """Returns the sources of the cells that all notebooks have in common."""
    import jupytext

    cells = jupytext.reads(notebooks.setup_cells("00_name", slug), "py:percent").cells
    assert all(cell.metadata.tags[0] == "setup" for cell in cells)
    return [cell.source for cell in cells if cell.cell_type == kind]


@each_example
def test_notebook_is_the_pair_of_its_script(script: Path):
    # Imported here: without these packages the tests skip instead of failing.
    import jupytext
    import nbformat

    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    expected = jupytext.read(script)
    hint = "run: python examples/notebooks.py"
    assert [
        (cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells
    ] == [(cell.cell_type, cell.source, cell.metadata) for cell in expected.cells], hint
    assert notebook.metadata.kernelspec == expected.metadata.kernelspec, hint


@each_example
def test_outputs_are_there_and_nothing_is_installed_unasked(script: Path):
    """A code host shows what the file holds: the results of the full setting."""
    import nbformat

    path = script.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    hint = "run: python examples/notebooks.py"
    assert notebooks.has_outputs(notebook), hint
    assert path.stat().st_size < 1_000_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = collections.Counter()
    for cell in code:
        assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE)
        if "setup" not in cell.metadata.get("tags", []):
            assert "subprocess" not in cell.source
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result")
            assert output.get("name") != "stderr"
            kinds.update([output.output_type, *output.get("data", {})])
    assert kinds["stream"] > 0
    assert kinds["image/png"] > 0
    shown = json.dumps([cell.outputs for cell in code])
    assert "check passed" in shown, "not run at the full setting"
    assert not re.search(r"/(home|root|tmp|work)/", shown)


def test_a_cell_that_was_not_run_is_found():
    import nbformat

    run = nbformat.v4.new_code_cell("1", execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[run, nbformat.v4.new_markdown_cell()])
    assert notebooks.has_outputs(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell("2"))
    assert not notebooks.has_outputs(notebook)


@each_example
def test_first_cells_are_those_of_the_setting(script: Path):
    text = script.read_text(encoding="utf-8")
    expected = notebooks.with_setup_cells(text, script.stem, SLUG)
    assert text == expected, "run: python examples/notebooks.py"
    # With another setting, those cells change, and no other; and back again.
    filled = notebooks.with_setup_cells(text, script.stem, "owner/name")
    assert filled != text
    assert notebooks.with_setup_cells(filled, script.stem, SLUG) == text
    link = f"https://colab.research.google.com/github/owner/name/blob/main/examples/{script.stem}.ipynb"
    assert f"# [notebook]: {link}\n" in filled


def test_a_new_script_gets_its_first_cells_after_the_title():
    title, code = "# %% [markdown]\n# # Title\n\n", "# %%\nprint(1)\n"
    header = "# ---\n# jupyter:\n# ---\n\n"
    filled = notebooks.with_setup_cells(header + title + code, "04_new", None)
    setup = notebooks.setup_cells("04_new", None)
    assert filled == header + title + setup + code


def test_what_comes_before_jax_starts_stays_before_the_first_cells():
    title, code = "# %% [markdown]\n# # Title\n\n", "# %%\nprint(1)\n"
    start = '# %% tags=["start"]\nimport jax\n\n'
    expected = title + start + notebooks.setup_cells("04_new", None) + code
    for script in (title + start + code, title + code + "\n" + start, expected):
        filled = notebooks.with_setup_cells(script, "04_new", None)
        assert filled.rstrip() == expected.rstrip()


def test_nothing_points_to_a_repository_before_there_is_one():
    [how] = setup_sources(None, "markdown")
    assert len(how.splitlines()) == 3
    assert "pip wheel --no-deps ." in how
    assert "python -m xent_jax.verify" in setup_sources(None)[0]
    for word in ("github", "badge", "pypi", "release", "pip install xent"):
        assert word not in notebooks.setup_cells("00_name", None).lower()


def test_a_repository_makes_a_badge_and_replaces_the_wheel():
    [how] = setup_sources("owner/name", "markdown")
    colab = "https://colab.research.google.com"
    page = f"{colab}/github/owner/name/blob/main/examples/00_name.ipynb"
    assert "[![Open in Colab][badge]][notebook]\n" in how
    assert f"[badge]: {colab}/assets/colab-badge.svg\n" in how
    assert f"[notebook]: {page}\n" in how
    assert "whl" not in notebooks.setup_cells("00_name", "owner/name")


@pytest.mark.parametrize(
    ("urls", "slug"),
    [
        ("", None),
        ("[project.urls]", None),
        ('[project.urls]\nRepository = ""', None),
        ('[project.urls]\nRepository = "https://github.com/owner/name"', "owner/name"),
        ('urls = {Repository = "https://github.com/own-er/na.me/"}', "own-er/na.me"),
        ('urls = {Repository = "https://github.com/owner/name.git"}', "owner/name"),
    ],
)
def test_the_repository_is_read_from_pyproject(urls: str, slug: str | None):
    assert notebooks.repository(f'[project]\nname = "x"\n{urls}') == slug


@pytest.mark.parametrize("url", ["owner/name", "https://github.com/owner", "https://x"])
def test_a_setting_that_is_no_repository_is_refused(url: str):
    pyproject = f'[project]\nurls = {{Repository = "{url}"}}'
    with pytest.raises(ValueError, match=f"must be https://github.*got '{url}'"):
        notebooks.repository(pyproject)


class TestInstallCell:
    """The set-up cell where nothing is installed, with pip and Colab replaced."""

    @pytest.fixture(autouse=True)
    def replaced(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        self.commands = []
        self.installed = False
        monkeypatch.setattr(verify, "main", lambda arguments: 0)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(subprocess, "run", self.record)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: self.installed or None
        )

    def record(self, command: list[str], check: bool) -> None:
        assert check
        self.commands.append(command)

    def execute(self, slug: str | None = None) -> dict:
        namespace = {}
        exec(setup_sources(slug)[0], namespace)
        return namespace

    def test_does_nothing_elsewhere(self):
        Path("xent_jax-0.1.0-py3-none-any.whl").touch()
        assert self.execute()["IN_COLAB"] is False
        assert self.commands == []

    def test_asks_for_a_wheel(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
        with pytest.raises(FileNotFoundError, match="upload xent_jax-<version>"):
            self.execute()

    def test_installs_the_newest_wheel_alone(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
        for version, time in {"0.10.0": 2, "0.9.0": 1}.items():
            wheel = Path(f"xent_jax-{version}-py3-none-any.whl")
            wheel.touch()
            os.utime(wheel, (time, time))
        assert self.execute()["IN_COLAB"] is True
        [[*pip, wheel]] = self.commands
        assert pip[:4] == [sys.executable, "-m", "pip", "install"]
        assert "--no-deps" in pip
        assert "--upgrade" not in pip
        assert wheel == "xent_jax-0.10.0-py3-none-any.whl"

    def test_installs_from_the_repository(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
        self.execute("owner/name")
        [[*pip, source]] = self.commands
        assert "--no-deps" in pip
        assert source == "git+https://github.com/owner/name@main"

    @pytest.mark.parametrize("slug", [None, "owner/name"])
    def test_leaves_an_installed_one(self, slug, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
        self.installed = True
        self.execute(slug)
        assert self.commands == []


class TestVerifyCell:
    """The set-up cell where all is installed, with `verify` replaced."""

    @pytest.fixture(autouse=True)
    def replaced(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = []
        self.status = 0
        monkeypatch.setattr(verify, "main", self.record)
        monkeypatch.delenv("XENT_JAX_EXAMPLE_VERIFY", raising=False)

    def record(self, arguments: list[str]) -> int:
        self.calls.append(arguments)
        return self.status

    def execute(self) -> None:
        exec(setup_sources(None)[0], {})

    def test_prints_the_devices_and_no_more(self, capsys: pytest.CaptureFixture):
        self.execute()
        assert capsys.readouterr().out.startswith("devices: [CpuDevice(id=0)")
        assert self.calls == []

    def test_verifies_the_default_device_on_colab(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
        self.execute()
        assert self.calls == [["--platform", "cpu"]]

    def test_verifies_when_asked(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("XENT_JAX_EXAMPLE_VERIFY", "1")
        self.execute()
        assert self.calls == [["--platform", "cpu"]]

    def test_stops_when_a_loss_is_off(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("XENT_JAX_EXAMPLE_VERIFY", "1")
        self.status = 1
        with pytest.raises(RuntimeError, match="out of its bounds"):
            self.execute()


def printed_numbers() -> set[str]:
    """Returns every loss that the five documents print, as they print it."""
    path = Path(__file__).with_name("golden_cases.json")
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return set(re.findall(r'"([^"]+)"', json.dumps([c["printed"] for c in cases])))


@pytest.mark.parametrize("ours", [0.5 + 2.0**-21, float("nan")])
def test_the_first_notebook_stops_at_a_number_that_is_off(ours: float):
    import jupytext

    cells = jupytext.read(EXAMPLES / "00_cross_entropy_from_the_ground_up.py").cells
    [cell] = [cell.source for cell in cells if "def beside" in cell.source]
    definitions = "compared = []" + cell.partition("compared = []")[2]
    namespace = {"np": np, "Decimal": decimal.Decimal, "ALLOWED": 4.0}
    exec(definitions, namespace)
    entry = {"printed": "0.5", "true": "0.5", "ours": 0.5}
    namespace["beside"]({"right": entry})
    with pytest.raises(RuntimeError, match="ours are off: wrong"):
        namespace["beside"]({"wrong": entry | {"ours": ours}})


@pytest.mark.parametrize("script", EACH_RUN)
def test_notebook_runs(script: Path, tmp_path: Path):
    # nbclient raises on the first cell that ends in an error.
    notebook = script.with_suffix(".ipynb")
    inline = "module://matplotlib_inline.backend_inline"
    output = run(["-c", EXECUTE_NOTEBOOK, str(notebook)], tmp_path, backend=inline)
    assert "devices: [CpuDevice" in output
    assert HELD_OUT.search(output), output
    assert "Warning" not in output, output
    assert "image/png" in output
    assert (tmp_path / "figure.png").stat().st_size > 0
    if script.stem.startswith("00_"):
        shown = {token.lstrip("-") for token in output.split()}
        assert len(printed_numbers()) >= 50
        missing = {number.lstrip("-") for number in printed_numbers()} - shown
        assert not missing


@pytest.mark.once
@pytest.mark.exhaustive
def test_where_it_matters(tmp_path: Path):
    """The claims of README: each number is optax's and then ours."""
    output = run([str(EXAMPLES / "where_it_matters.py")], tmp_path, backend="Agg")

    def numbers(pattern: str) -> np.ndarray:
        found = np.float64(re.findall(pattern, output))
        assert len(found) == 2, output
        return found

    theirs, ours = numbers(r"held-out accuracy (\S+)")
    assert abs(theirs - ours) <= 0.01  # where it does not matter
    theirs, ours = numbers(r"mean loss off by (\S+)%")
    assert theirs >= 10
    assert ours <= 0.1
    theirs, ours = numbers(r"label's gradient is 0 in (\d+)%")
    assert theirs >= 50
    assert ours == 0
    theirs, ours = numbers(r" loss (\S+), smallest normalized margin")
    assert ours <= 1e-3 * theirs
    theirs, ours = numbers(r"smallest normalized margin (\S+)")
    assert ours >= 2 * theirs
    theirs, ours = numbers(r"median relative error (\S+)")
    assert theirs >= 1e-2
    assert ours <= 1e-4
    theirs, ours = numbers(r"largest error of a loss (\S+),")
    assert theirs >= 1e-2
    assert ours <= 1e-5


def test_script_runs(tmp_path: Path):
    # The one that README.md has run as a script.
    name = "01_digits.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"python examples/{name}" in readme
    output = run([str(EXAMPLES / name)], tmp_path, backend="Agg")
    assert HELD_OUT.search(output), output
    assert f"saved the picture {tmp_path / 'figure.png'}" in output
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.exhaustive
def test_two_processes_run_a_script_together(tmp_path: Path):
    # The command lines that its first cell shows, with a port that is free.
    script = EXAMPLES / "04_sharded_vocabulary.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in ("0", "1"):
        command = f"{script.name} --processes 2 --process {index}"
        assert f"#     python {command}\n" in script.read_text(encoding="utf-8")
        log = (tmp_path / index).open("w+", encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, *command.split(), "--coordinator", address],
            cwd=EXAMPLES,
            env=environment(tmp_path, backend="Agg"),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        started.append((process, log))
    try:
        for process, _ in started:
            process.wait(timeout=120)
    finally:
        for process, _ in started:
            process.kill()
            process.wait()
    outputs = []
    for process, log in started:
        with log:
            log.seek(0)
            outputs.append(log.read())
        assert process.returncode == 0, outputs[-1]
    found = [re.findall(r"^(?:loss of|held-out) .*", o, re.MULTILINE) for o in outputs]
    assert found[0] == found[1]
    # One device alone computes the first losses in each process, and the two agree.
    beside = [re.search(r"on the mesh (\S+), alone (\S+)", line) for line in found[0]]
    pairs = [np.float64(match.groups()) for match in beside if match]
    assert len(pairs) == 3
    np.testing.assert_allclose(*np.transpose(pairs), rtol=1e-5)
    assert "{'data': 2, 'vocab': 4}; this process has 4" in outputs[1]
    assert (tmp_path / "figure.png").stat().st_size > 0
