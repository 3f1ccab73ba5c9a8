"""The soak finds what is wrong with an answer, and finds nothing wrong with the engine's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from examples.scripts.benchmark.benchmark_soak import Asked, faults_of, halves, main
from rectokens.schemas.search import SearchHit, SearchRequest, SearchResult, Shortfall
from server.engine.types import EngineFault

CODES = np.array([[0, 0], [0, 1], [0, 1], [2, 3]])


def asked(allowed: list[int], top_k: int, temperature: float = 0.0) -> Asked:
    mask = np.zeros(len(CODES), dtype=np.bool_)
    mask[allowed] = True
    return Asked(SearchRequest((1,), 8, top_k, temperature=temperature), mask)


def hit(item: int, score: float, codes: tuple[int, int] | None = None) -> SearchHit:
    found = tuple(CODES[item].tolist()) if codes is None else codes
    return SearchHit(item, found, score, (score, 0.0))


def test_nothing_wrong() -> None:
    all_there = SearchResult((hit(1, -1.0), hit(2, -1.0), hit(3, -4.0)))
    assert not faults_of(asked([0, 1, 2, 3], 3), all_there, CODES)
    fewer = SearchResult((hit(3, -4.0), hit(1, -1.0)), Shortfall("filters", 2))
    assert not faults_of(asked([1, 3], 3, temperature=1.0), fewer, CODES)


@pytest.mark.parametrize(
    ("hits", "allowed", "kind"),
    [
        ((hit(1, -1.0), hit(1, -1.0)), [0, 1, 2, 3], "repeated"),
        ((hit(1, -1.0), hit(3, -2.0)), [0, 1, 2], "forbidden"),
        ((hit(1, -1.0), hit(3, -2.0, (2, 2))), [0, 1, 2, 3], "invalid"),
        ((hit(1, -1.0), SearchHit(9, (0, 0), -2.0, (-2.0, 0.0))), [0, 1, 2, 3], "invalid"),
        ((hit(1, -3.0), hit(3, -2.0)), [0, 1, 2, 3], "out of order"),
        ((hit(1, -1.0), hit(3, float("nan"))), [0, 1, 2, 3], "not finite"),
        ((hit(1, -1.0),), [0, 1, 2, 3], "missing"),
        ((hit(0, -1.0), hit(1, -1.5), hit(2, -1.5)), [0, 1, 2, 3], "too many"),
    ],
)
def test_each_fault_is_found(hits: tuple[SearchHit, ...], allowed: list[int], kind: str) -> None:
    assert faults_of(asked(allowed, 2), SearchResult(hits), CODES) == {kind: 1}


def test_a_shortfall_must_be_told() -> None:
    request = asked([1], 2)
    assert faults_of(request, SearchResult((hit(1, -1.0),)), CODES) == {"shortfall untold": 1}
    wrong = SearchResult((hit(1, -1.0),), Shortfall("filters", 2))
    assert faults_of(request, wrong, CODES) == {"shortfall untold": 1}
    assert faults_of(request, EngineFault("broken"), CODES) == {"failed": 1}


def test_halves_leave_the_beginning_out() -> None:
    assert halves([900.0, 900.0, 1.0, 1.0, 3.0, 2.0, 2.0, 5.0]) == (1.0, 2.0, 5.0)


def test_a_short_soak() -> None:
    app = typer.Typer()
    app.command()(main)
    words = "--model demo --device cpu --dtype float32 --requests 20 --batch 4 --width 8"
    words += " --history 4 --codebook-size 16 --items 400 --memory-mib 4"
    threads = torch.get_num_threads()
    done = CliRunner().invoke(app, words.split())
    assert torch.get_num_threads() == threads
    assert done.exit_code == 0, done.output
    assert "faults: none" in done.output
    assert "resident memory of the process" in done.output
