"""The benchmark: it runs, says who is wrong, and judges the goals as it prints them."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from grids import shortened
from registry import FUNCTIONS

pytestmark = pytest.mark.once

pytest.importorskip("optax", reason="the benchmark compares with optax")

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmark.py"
FIELDS = {
    "time": str,
    "platform": str,
    "device": str,
    "processor": str,
    "cores": int,
    "python": str,
    "xent_jax": str,
    "packages": dict,
    "flags": dict,
    "case": str,
    "suite": str,
    "labels": str,
    "mode": str,
    "memory": str,
    "shape": list,
    "dtype": str,
    "axis": int,
    "contender": str,
    "status": str,
    "detail": str,
    "difference": float | None,
    "compile_seconds": float,
    "temp_bytes": int | None,
    "median_seconds": float,
    "seconds": list,
}
HEAD = {"xent_jax mean", "xent_jax per row", "floor", "optax", "token scan"}
LOGITS = {"xent_jax", "floor", "optax", "naive"}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(contender, **changes):
    return {
        "platform": "cpu",
        "device": "cpu",
        "case": "a case",
        "contender": contender,
        "status": "ok",
        "detail": "",
        "difference": None,
        "compile_seconds": 0.1,
        "temp_bytes": 1000,
        "median_seconds": 1.0,
    } | changes


@pytest.mark.exhaustive
def test_the_tiny_cases_run(benchmark, tmp_path):
    output = tmp_path / "results" / "cpu.jsonl"
    arguments = ["--tiny", "--rounds", "3", "--check"]
    arguments += ["--only", "float32", "--only", "integer"]
    arguments += ["--skip", "torch", "--skip", "torch.compile", "--skip", "jax-cce"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    # No goal is about a tiny shape, so none is missed.
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    contenders = {}
    for found in records:
        assert found.keys() == FIELDS.keys()
        for field, kind in FIELDS.items():
            assert isinstance(found[field], kind), (field, found)
        assert found["status"] == "ok", found
        assert found["platform"] == "cpu"
        assert {"jax", "optax"} <= found["packages"].keys()
        assert len(found["seconds"]) == 3
        assert found["median_seconds"] == np.median(found["seconds"]) > 0
        if found["contender"] != "floor":
            assert found["difference"] < 1e-5
        contenders.setdefault(found["case"], set()).add(found["contender"])
        assert found["case"] in result.stdout
    head, *logits = contenders.values()
    assert head >= HEAD
    assert len(logits) == len(benchmark.MODES)
    assert all(names == LOGITS for names in logits)


PROBABILITIES = {"xent_jax", "floor", "naive"}


@pytest.mark.parametrize(
    ("labels", "dtype", "shape", "axis", "contenders"),
    [
        ("dense", "float32", (16, 10), -1, LOGITS),
        ("dense", "bfloat16", (16, 10), -1, LOGITS),
        ("sigmoid", "float32", (16, 10), -1, LOGITS),
        ("sigmoid", "bfloat16", (16, 10), -1, LOGITS),
        ("integer", "float32", (2, 7, 4, 5), 1, LOGITS),
        ("integer", "float32", (2, 4, 5, 7), -1, LOGITS),
        ("log-probabilities", "float32", (16, 10), -1, PROBABILITIES),
        ("probabilities", "float32", (16, 10), -1, PROBABILITIES),
    ],
)
@pytest.mark.parametrize(
    "mode", shortened(["value", "value_and_grad"], kept=["value_and_grad"])
)
def test_the_contenders_compute_the_same_loss(
    benchmark, labels, dtype, shape, axis, contenders, mode
):
    case = benchmark.Case("logits", labels, mode, "fresh", shape, dtype, axis)
    entries = list(benchmark.logits_entries(case))
    if dtype == "float32":  # torch's loss and gradient too, where it is installed
        entries = [entry for entry in entries if entry.name != "torch.compile"]
    else:
        entries = [entry for entry in entries if entry.name in LOGITS]
    records = benchmark.measure(case, entries, 1, lambda: None)
    statuses = {record["contender"]: record["status"] for record in records}
    assert statuses.keys() - {"torch"} == contenders
    assert set(statuses.values()) == {"ok"}, records


def test_the_cases_of_logits_are_what_people_run(benchmark):
    cases = list(benchmark.logits_cases())
    assert len({case.name for case in cases}) == len(cases)
    found = {(case.labels, case.mode, case.dtype, case.shape[-1]) for case in cases}
    classes = (2, 10, 21, 100, 128, 255, 256, 500, 1000, 1024, 2000, 8192)
    for labels, number in itertools.product(
        ("integer", "dense"), (*classes, 50257, 128256)
    ):
        for mode, dtype in itertools.product(
            ("value", "value_and_grad"), benchmark.FLOATS
        ):
            assert (labels, mode, dtype, number) in found
    assert {case.axis for case in cases if len(case.shape) == 4} == {1, -1}


def test_the_losses_are_those_of_the_registry(benchmark):
    kinds = {case.labels for case in benchmark.logits_cases()}
    assert kinds == benchmark.LOSSES.keys() == benchmark.NAIVE.keys()
    rows = {kind: FUNCTIONS[name] for kind, (name, _) in benchmark.LOSSES.items()}
    of_ids = {kind for kind, row in rows.items() if row.labels == ("ids",)}
    assert of_ids == {"integer", "log-probabilities"}


@pytest.mark.exhaustive
def test_the_sweep_is_of_twenty_numbers_of_classes(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "SWEEP", [(40, 2), (8, 10)])
    output = tmp_path / "sweep.jsonl"
    arguments = ["--sweep", "--rounds", "1", "--skip", "torch.compile"]
    assert benchmark.main([*arguments, "--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert {record["contender"] for record in records} == {"xent_jax", "optax"}
    assert {(*record["shape"], record["mode"]) for record in records} == {
        (40, 2, "value"),
        (40, 2, "value_and_grad"),
        (8, 10, "value"),
        (8, 10, "value_and_grad"),
    }
    monkeypatch.undo()
    numbers = [classes for _, classes in benchmark.SWEEP]
    assert numbers == sorted(set(numbers))
    assert (len(numbers), numbers[0], numbers[-1]) == (20, 2, 131072)
    assert all(2**22 * 0.98 < rows * each <= 2**22 for rows, each in benchmark.SWEEP)


@pytest.mark.parametrize(
    ("seconds", "repeats"), [(2e-5, 100), (9e-5, 100), (4e-4, 5), (1.0, 1)]
)
def test_short_calls_are_repeated(benchmark, seconds, repeats):
    assert benchmark.repeats_of(seconds) == repeats


@pytest.mark.parametrize("arguments", [["tail"], ["--only", "abacus"], ["--rounds=0"]])
def test_nothing_to_run_is_an_error(benchmark, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(arguments)
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_who_is_wrong_or_fails_is_said_and_not_timed(benchmark):
    case = benchmark.Case(
        "logits", "integer", "value_and_grad", "fresh", (4, 5), "float32"
    )
    ours, *_ = benchmark.logits_entries(case)

    def nan(logits, labels):
        return ours.loss(logits, labels) * np.float32("nan")

    def broken(logits, labels):
        raise RuntimeError("no such kernel")

    def doubled(logits, labels):
        return 2 * ours.loss(logits, labels)

    entries = [ours]
    entries += [benchmark.Entry(f.__name__, f) for f in (nan, broken, doubled)]
    rounds = []
    records = benchmark.measure(case, entries, 2, lambda: rounds.append(1))
    assert [r["status"] for r in records] == ["ok", "wrong", "failed", "wrong"]
    assert "no such kernel" in records[2]["detail"]
    assert [len(r["seconds"]) for r in records] == [2, 0, 0, 0]
    assert records[0]["difference"] == 0
    assert records[3]["difference"] == pytest.approx(1)
    assert len(rounds) == 2


@pytest.mark.parametrize(
    ("measure", "bound", "rival", "measured", "met"),
    [
        ("speed", 2.0, "optax", 2.0, True),
        ("speed", 2.1, "optax", 2.0, False),
        ("temp", 0.25, "optax", 0.25, True),
        ("temp", 0.24, "optax", 0.25, False),
        ("temp", 1000, None, 1000, True),
        ("temp", 999, None, 1000, False),
        ("speed", 9.0, "failed", None, None),
    ],
)
def test_a_goal_is_judged(benchmark, measure, bound, rival, measured, met):
    goal = benchmark.Goal("cpu", "a case", "ours", measure, bound, rival)
    records = [
        record("ours"),
        record("optax", median_seconds=2.0, temp_bytes=4000),
        record("failed", status="failed", median_seconds=None, temp_bytes=None),
    ]
    assert benchmark.judge([goal], records) == [(goal, measured, met)]
    elsewhere = [goal._replace(platform="tpu"), goal._replace(case="another")]
    assert benchmark.judge(elsewhere, records) == []
    if rival is not None:
        assert benchmark.judge([goal._replace(rival="not installed")], records) == []


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_goal_is_missed_where_ours_is(benchmark, status):
    goal = benchmark.Goal("cpu", "a case", "ours", "speed", 0.0)
    records = [record("ours", status=status, median_seconds=None), record("optax")]
    assert benchmark.judge([goal], records) == [(goal, None, False)]


@pytest.mark.parametrize(("bound", "status"), [(0.0, 0), (1e9, 1)])
@pytest.mark.parametrize("style", [[], ["--markdown"]])
def test_a_check_exits_with_what_the_goals_say(
    benchmark, bound, status, style, tmp_path, monkeypatch, capsys
):
    goal = benchmark.Goal("cpu", "a case", "ours", "speed", bound)
    monkeypatch.setattr(benchmark, "GOALS", (goal,))
    records = record("ours"), record("optax", median_seconds=2.0)
    for index, line in enumerate(records):
        (tmp_path / f"{index}.jsonl").write_text(json.dumps(line) + "\n")
    files = [str(tmp_path / f"{index}.jsonl") for index in range(2)]
    assert benchmark.main(["--check", *style, "--read", *files]) == status
    printed = capsys.readouterr().out
    assert ("NO" in printed) == bool(status)
    assert "2.00" in printed
    assert benchmark.main(["--read", *files]) == 0


def test_every_goal_is_about_a_case_that_runs_by_default(benchmark, monkeypatch):
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(benchmark.jax, "default_backend", lambda p=platform: p)
        options = benchmark.argparse.Namespace(
            suite="both", sweep=False, tiny=False, shapes=None, only=[]
        )
        names = {case.name for case in benchmark.cases_of(options)}
        goals = [goal for goal in benchmark.GOALS if goal.platform == platform]
        assert goals
        assert {goal.case for goal in goals} <= names
