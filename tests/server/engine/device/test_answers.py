"""Packed answers: hits that are made when they are looked at."""

from __future__ import annotations

import numpy as np
import torch

from rectokens.decoding.device_beams import answer_columns
from rectokens.decoding.device_tables import LevelShape, StepShapes
from rectokens.schemas.search import SearchHit, SearchRequest, SearchResult, Shortfall
from server.engine.device.answers import PackedHits, collect_answers
from server.engine.types import EngineFault

WIDTH, LEVELS = 4, 2


def packed(rows: list[tuple[bool, int]]) -> tuple[torch.Tensor, StepShapes]:
    """Answers of requests (poisoned, items found); beams stand in reverse order of the items."""
    level = LevelShape(max_children=8, pairs=32, typical_children=2.0)
    shapes = StepShapes(WIDTH, 8, (level,) * LEVELS)
    columns = answer_columns(shapes)
    answers = torch.zeros(len(rows), max(c.stop for c in columns.values()), dtype=torch.int32)
    floats = answers.view(torch.float32)
    for row, (poisoned, items) in enumerate(rows):
        answers[row, 1], answers[row, 2] = int(poisoned), items
        answers[row, columns["items"]] = torch.arange(WIDTH, dtype=torch.int32) + 10 * row
        answers[row, columns["leaves"]] = torch.arange(WIDTH - 1, -1, -1, dtype=torch.int32)
        answers[row, columns["codes"]] = torch.arange(WIDTH * LEVELS, dtype=torch.int32)
        floats[row, columns["scores"]] = -torch.arange(WIDTH, dtype=torch.float32)
        scores = -torch.arange(WIDTH * LEVELS, dtype=torch.float32) / 2
        floats[row, columns["code_scores"]] = scores
    return answers, shapes


def hit(item: int, leaf: int) -> SearchHit:
    codes = (2 * leaf, 2 * leaf + 1)
    return SearchHit(item, codes, -float(leaf), tuple(-code / 2 for code in codes))


def test_hits_of_each_request_at_its_place() -> None:
    host, shapes = packed([(False, 4), (True, 4), (False, 2)])
    requests = [SearchRequest((1,), WIDTH, 3) for _ in range(3)]
    members = (2, 0, 1)  # places in the batch of the rows of this search
    first, poisoned, second = (
        collect_answers(requests, [(members, host, shapes)], num_items=100)[place]
        for place in members
    )
    assert first == SearchResult((hit(0, 3), hit(1, 2), hit(2, 1)))
    assert isinstance(poisoned, EngineFault)
    assert second == SearchResult((hit(20, 3), hit(21, 2)), Shortfall("filters", 2))


def test_answers_outlive_the_memory_they_were_read_from() -> None:
    host, shapes = packed([(False, 4)])
    request = SearchRequest((1,), WIDTH, WIDTH)
    (answer,) = collect_answers([request], [((0,), host, shapes)], num_items=100)
    host.zero_()
    assert isinstance(answer, SearchResult)
    assert answer.hits == tuple(hit(place, 3 - place) for place in range(4))


def test_hits_are_a_sequence_equal_to_a_tuple() -> None:
    def make(items: list[int]) -> PackedHits:
        rows = np.array(items, dtype=np.int32)
        codes = np.stack([rows, rows + 1], axis=1)
        scores = rows.astype(np.float32)
        return PackedHits(rows, codes, scores, codes.astype(np.float32))

    hits = make([5, 6])
    made = (SearchHit(5, (5, 6), 5.0, (5.0, 6.0)), SearchHit(6, (6, 7), 6.0, (6.0, 7.0)))
    assert len(hits) == 2
    assert hits == made
    assert made == hits
    assert hits == make([5, 6])
    assert hits != make([5, 7])
    assert hits != list(made)
    assert (hits[0], hits[-1], hits[1:], tuple(hits)) == (made[0], made[1], made[1:], made)
    assert type(hits[0].item_index) is int
    assert repr(hits) == repr(made)
    empty = make([])
    assert (len(empty), tuple(empty), empty[:1]) == (0, (), ())
