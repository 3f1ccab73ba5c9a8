"""The engine's benchmark runs on a CPU, checks answers before it times, and writes its table."""

import csv

import typer
from typer.testing import CliRunner

from examples.scripts.benchmark import benchmark_engine


def test_a_small_matrix_and_what_stands_beside_it(tmp_path):
    app = typer.Typer()
    app.command()(benchmark_engine.main)
    out = tmp_path / "engine.csv"
    found = CliRunner().invoke(
        app,
        [
            *("--model", "demo", "--device", "cpu", "--dtype", "float32", "--contexts", "20,30"),
            *("--batches", "1,2", "--beam-width", "10", "--codebook-size", "32"),
            *("--items", "2000", "--repeats", "1", "--memory-mib", "32", "--out", str(out)),
        ],
    )
    assert found.exit_code == 0, found.output
    assert "100.0% of the items as when alone" in found.output
    assert "100.0% of the items shared with generate" in " ".join(found.output.split())
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["context"], row["batch"]) for row in rows] == [
        ("20", "1"), ("20", "2"), ("30", "1"), ("30", "2")
    ]  # fmt: skip
    names = ("median_ms", "p90_ms", "prefill_ms", "decode_ms", "constraint_ms", "floor_ms")
    assert all(float(row[name]) >= 0 for row in rows for name in names)
