"""The HTTP benchmark runs against a real server, and refuses to time wrong answers."""

from __future__ import annotations

import csv
from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner

from examples.scripts.benchmark.benchmark_http import COLUMNS, Subject, main, row_of
from examples.scripts.benchmark.benchmark_service import WrongAnswerError
from examples.scripts.benchmark.http_load import Reply


def test_a_small_release(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "figures.csv"
    arguments = ["--model", "demo", "--device", "cpu", "--dtype", "float32", "--contexts", "21"]
    arguments += ["--clients", "2", "--beam-width", "12", "--codebook-size", "32", "--items", "500"]
    arguments += ["--kv-memory-mib", "16", "--seconds", "0.3", "--overload-seconds", "0.5"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "100.0% of the items through HTTP as without" in done.output
    assert "refused_within_50_ms_percent" in done.output
    rows = list(csv.DictReader(output.open()))
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["context"], row["clients"]) for row in rows] == [("21", "1"), ("21", "2")]
    for row in rows:
        assert 0 < float(row["median_ms"]) <= float(row["p99_ms"])
        assert float(row["requests_per_s"]) > 0
        assert float(row["alone_per_s"]) > 0


def reply(status: int, seconds: float, queue: float = 1.0) -> Reply:
    timings = {"queue_ms": queue, "prefill_ms": 2.0, "decode_ms": 3.0}
    return Reply(status, orjson.dumps({"timings": timings}), seconds, 0.0)


def test_figures_of_clients() -> None:
    subject = Subject(None, None, "float32", beam_width=7, top_k=1)  # type: ignore[arg-type]
    row = row_of(subject, 100, 2, [reply(200, 0.010), reply(200, 0.020), reply(200, 0.030)], 1.5)
    assert row["requests_per_s"] == 2
    assert row["median_ms"] == pytest.approx(20)
    assert row["p99_ms"] == pytest.approx(30)
    assert (row["queue_ms"], row["engine_ms"]) == (1.0, 5.0)
    assert row["added_ms"] == pytest.approx(14)
    with pytest.raises(WrongAnswerError, match="status 503"):
        row_of(subject, 100, 1, [reply(200, 0.01), reply(503, 0.01)], 1.0)
