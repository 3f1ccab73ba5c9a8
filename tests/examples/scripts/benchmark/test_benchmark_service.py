"""The service benchmark runs against a real server, and its figures are what they say."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import typer
from typer.testing import CliRunner

from examples.scripts.benchmark.benchmark_service import main, overload_figures
from examples.scripts.benchmark.http_load import OpenLoad, Reply, percentile


def test_a_small_release(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "figures.csv"
    arguments = ["--num-layers", "1", "--hidden-size", "64", "--num-items", "300"]
    arguments += ["--history", "4", "--beam-width", "12", "--seconds", "0.3", "--turns", "1"]
    arguments += ["--overload-seconds", "1", "--max-open", "40", "--output", str(output)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (row,) = csv.DictReader(output.open())
    figures = {name: float(value) for name, value in row.items()}
    for name in ("engine_per_s", "http_per_s", "http_cpu_ms", "engine_cpu_ms", "offered_per_s"):
        assert figures[name] > 0, name
    assert figures["other_answers"] == 0
    assert 10 < figures["memory_second_half_mib"] < 4_000


def test_figures_of_an_overload() -> None:
    def reply(status: int, seconds: float) -> Reply:
        return Reply(status, b"", seconds, 0.0)

    replies = [reply(200, 0.4), reply(200, 0.8), reply(200, 1.2), reply(504, 1.0), reply(500, 0.1)]
    replies += [reply(429, 0.01)] * 3 + [reply(429, 0.2), reply(0, 0.1)]
    memory = [(0.5, 100 << 20), (0.8, 102 << 20), (1.5, 110 << 20), (1.8, 130 << 20)]
    load = OpenLoad(replies, [0.0, 0.001], unsent=2)
    figures = overload_figures(load, memory, timeout_ms=1_000, seconds=2.0)
    assert figures["offered_per_s"] == 5.0
    assert figures["answered"] == 3
    assert figures["answered_median_ms"] == 800
    assert figures["late"] == 2
    assert figures["refused"] == 4
    assert figures["refused_within_50_ms_percent"] == 75
    assert figures["other_answers"] == 2
    assert figures["unsent"] == 2
    assert (figures["memory_first_half_mib"], figures["memory_second_half_mib"]) == (101, 120)


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))
