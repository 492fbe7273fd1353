"""The command line: what it prints, and with which status it ends."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import xent_jax
from xent_jax import verify
from xent_jax._checking import cases


def run(*arguments, **environment):
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "xent_jax.verify", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"COLUMNS": "120"} | environment,
    )


@pytest.mark.once
@pytest.mark.exhaustive
def test_the_command_passes():
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("log1p", "allowance", "integer labels", "bfloat16", "float16"):
        assert text in result.stdout
    assert "NO" not in result.stdout
    words = " ".join(result.stdout.split())
    assert "of every public function in three dtypes" in words
    assert words.endswith("against float64 on the host: all within their bounds.")


def test_a_missing_platform_is_an_error():
    result = run("--platform", "tpu")
    assert result.returncode == 2
    assert "verify: JAX has no tpu device here, only: cpu." in result.stderr


def test_an_unknown_platform_is_an_error():
    result = run("--platform", "abacus")
    assert result.returncode == 2
    assert "invalid choice: 'abacus'" in result.stderr


def test_a_loss_that_is_off_is_reported(monkeypatch, capsys):
    exact = xent_jax.sigmoid_binary_cross_entropy

    def off(logits, labels, **options):
        return exact(logits, labels, **options) * np.float32(1.0001)

    laws = {off: verify.testing.SIGMOID_LAW}
    law_of = verify.testing.law_of
    monkeypatch.setattr(
        verify.testing, "law_of", lambda loss: laws.get(loss) or law_of(loss)
    )
    (case,) = [case for case in cases.cases() if case.name == "sigmoid"]
    broken = cases.Case("off", off, case.inputs, case.labels, case.bound)
    monkeypatch.setattr(verify, "cases", lambda **options: [broken])
    monkeypatch.setattr(verify, "find_devices", lambda platform: [jax.devices()[0]])
    assert verify.main([]) == 1
    printed = capsys.readouterr().out
    assert "NO" in printed
    assert "out of bounds" in printed


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_result_that_is_no_number_is_not_ok(number):
    errors = dict.fromkeys(verify.MODES, 0.0) | {"grad": number}
    bounds = dict.fromkeys(verify.MODES, 1.0)
    result = verify.Result("cpu:0", "loss", "float32", errors, bounds)
    assert not result.ok
    assert result.worst == "grad"


def test_the_allowance_is_what_a_device_is_worse_by():
    class Device:
        platform = "gpu"

    fine = {"exp": 0.5, "log": 1.0, "log1p": 2.0}
    assert verify.allowance_of(Device(), fine) == 0
    coarse = {"exp": 3.0, "log": 2.2, "log1p": 2.0}
    np.testing.assert_allclose(verify.allowance_of(Device(), coarse), 2 * 2 + 1)
    assert verify.allowance_of(jax.devices()[0], coarse) == 0
    for fault in (np.inf, np.nan, 1e9):
        assert np.isnan(verify.allowance_of(Device(), fine | {"exp": fault}))


def test_measured_primitives_are_those_of_the_device():
    measured = verify.primitive_errors(jax.devices()[0])
    assert set(measured) == {"exp", "log", "log1p", "dot"}
    assert all(0.4 < error < 100 for error in measured.values())


def test_the_table_has_a_line_a_result():
    errors = dict.fromkeys(verify.MODES, 0.25)
    bounds = dict.fromkeys(verify.MODES, 1.0)
    console = Console(record=True, width=120)
    verify.show([verify.Result("cpu:0", "mine", "float32", errors, bounds)], console)
    assert "mine" in console.export_text()
