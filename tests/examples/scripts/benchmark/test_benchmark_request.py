"""The steps of a request are timed after its prompt was compared."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from examples.scripts.benchmark import benchmark_request
from examples.scripts.benchmark.benchmark_service import WrongAnswerError


def run(output=None):
    benchmark_request.main(
        items=600, histories="5,20", levels=2, codebook_size=32, requests=8, output=output
    )


def test_every_step_of_every_length_is_timed(tmp_path):
    run(tmp_path / "request.csv")
    rows = list(csv.DictReader((tmp_path / "request.csv").open()))
    assert tuple(rows[0]) == benchmark_request.COLUMNS
    assert [row["history"] for row in rows] == ["5", "20"]
    assert all(float(row[name]) > 0 for row in rows for name in benchmark_request.STEPS)


def test_nothing_is_timed_where_prompts_differ(monkeypatch):
    prepare = benchmark_request.prepare

    def of_one_item_less(query, release):
        return prepare(replace(query, parts=query.parts[1:]), release)

    monkeypatch.setattr(benchmark_request, "prepare", of_one_item_less)
    monkeypatch.setattr(benchmark_request, "measure", lambda *_: pytest.fail("was timed"))
    with pytest.raises(WrongAnswerError, match="not that of its items"):
        run()
