"""The benchmark: it runs, says who is wrong, and judges the goals as it prints them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("labels", ["dense", "sigmoid"])
def test_the_contenders_compute_the_same_loss(benchmark, labels, dtype):
    case = benchmark.Case("logits", labels, "value", "fresh", (16, 10), dtype)
    entries = [e for e in benchmark.logits_entries(case) if e.name in LOGITS]
    records = benchmark.measure(case, entries, 1, lambda: None)
    assert {r["contender"]: r["status"] for r in records} == dict.fromkeys(LOGITS, "ok")


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
            suite="both", tiny=False, shapes=None, only=[]
        )
        names = {case.name for case in benchmark.cases_of(options)}
        goals = [goal for goal in benchmark.GOALS if goal.platform == platform]
        assert goals
        assert {goal.case for goal in goals} <= names
