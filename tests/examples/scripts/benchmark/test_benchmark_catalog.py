"""The catalog benchmark runs and reports every figure."""

from __future__ import annotations

import csv
from pathlib import Path

import typer
from typer.testing import CliRunner

from examples.scripts.benchmark.benchmark_catalog import main


def test_a_small_catalog(tmp_path: Path):
    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "figures.csv"
    arguments = ["--num-items", "500", "--num-levels", "3", "--codebook-size", "16"]
    arguments += ["--num-updates", "20", "--threads", "1", "--folder", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "bytes_per_item" in done.output
    (row,) = csv.DictReader(output.open())
    assert row["num_items"] == "500"
    assert all(float(value) > 0 for value in row.values())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.csv"]
