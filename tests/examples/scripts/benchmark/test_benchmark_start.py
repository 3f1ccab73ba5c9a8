"""The benchmark of starting runs on a CPU, where there is nothing to compile."""

import csv

import pytest
import typer
from typer.testing import CliRunner

from examples.scripts.benchmark import benchmark_start
from rectokens.kernels import compile_ahead


@pytest.mark.parametrize("ahead", [True, False])
def test_every_step_is_timed(tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(compile_ahead, "can_compile", compile_ahead.can_compile)  # put back
    app = typer.Typer()
    app.command()(benchmark_start.main)
    out = tmp_path / "start.csv"
    options = ["--model", "demo", "--device", "cpu", "--dtype", "float32", "--beam-width", "5"]
    options += ["--codebook-size", "16", "--items", "500", "--memory-mib", "32", "--out", str(out)]
    found = CliRunner().invoke(app, [*options, "--ahead" if ahead else "--no-ahead"])
    assert found.exit_code == 0, found.output
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [
        "the model is tried", "the first batch", "another batch"
    ]  # fmt: skip
    assert {row["ahead"] for row in rows} == {str(ahead)}
    assert all(float(row["seconds"]) > 0 and row["kernels"] == "0" for row in rows)
