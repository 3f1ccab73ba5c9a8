"""Random requests of every kind, each answered alone and in two random batches.

``RANDOM_REQUESTS`` sets how many (default 250); ``make chaos`` asks 10,000. Whatever a request is
and whoever shares its batch: only items of the catalog, none twice, none that its filters exclude,
as many as there are up to ``top_k``, and the same answer each time, samples included.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from rectokens.schemas.search import NORMALIZATIONS, SearchRequest, SearchResult
from server.engine.pool_setup import PoolOptions
from server.queries import RecommendQuery
from server.recommender import prepare
from server.release import Release

REQUESTS = int(os.environ.get("RANDOM_REQUESTS", "250"))
TOLERANCE = 1e-4
# (model, items, whether prompts are kept)
RELEASES = [
    ("qwen3", 400, True),
    ("mistral-sliding", 90, True),
    ("gemma2", 7, False),
    ("llama", 1_500, False),
]


@pytest.fixture(scope="module")
def releases(
    tiny_lm: Callable[..., Any], make_real_release: Callable[..., Release]
) -> list[Release]:
    pool = PoolOptions(memory_bytes=2 << 20)
    return [
        make_real_release(
            tiny_lm(kind, 64, seed=11), items, seed=items, pool=pool if kept else None
        )
        for kind, items, kept in RELEASES
    ]


def random_query(rng: random.Random, items: int) -> RecommendQuery:
    def some(limit: int, unknown: float = 0.1) -> tuple[str, ...]:
        ids = [f"item-{rng.randrange(items)}" for _ in range(rng.randrange(limit + 1))]
        return tuple(f"{one}-gone" if rng.random() < unknown else one for one in ids)

    history = some(14)
    if history and all(one.endswith("-gone") for one in history):
        history = ("item-0", *history)
    top_k = rng.choice([1, 2, 5, 10, 25])
    return RecommendQuery(
        parts=tuple(history),
        parts_param="history",
        top_k=top_k,
        beam_width=top_k + rng.choice([0, 0, 1, 7, 30]),
        temperature=rng.choice([0.0, 0.0, 0.5, 1.0, 3.0]),
        seed=rng.randrange(2**63),
        exclude_history=rng.random() < 0.6,
        exclude_items=some(rng.choice([0, 3, 40, items])),
        constraint_sets=rng.choice([(), (), ("even",), ("third",), ("few",), ("even", "third")]),
        normalization=rng.choice(NORMALIZATIONS),
        with_metadata=False,
        with_level_scores=False,
        deadline_s=float("inf"),
        allow_items=rng.choice([None, None, None, (), some(60), some(items)]),
    )


def allowed_rows(query: RecommendQuery, items: int) -> set[int]:
    """By going through all items."""
    barred = set(query.exclude_items)
    if query.exclude_history:
        barred |= set(query.parts)
    members = {"even": range(0, items, 2), "third": range(0, items, 3), "few": range(7)}
    return {
        row
        for row in range(items)
        if f"item-{row}" not in barred
        and (query.allow_items is None or f"item-{row}" in query.allow_items)
        and all(row in members[name] for name in query.constraint_sets)
    }


def batches_of(
    rng: random.Random, searches: Sequence[SearchRequest], largest: int
) -> Iterator[list[int]]:
    places = list(range(len(searches)))
    rng.shuffle(places)
    while places:
        count = rng.randint(1, largest)
        yield places[:count]
        places = places[count:]


def answers_in_batches(
    rng: random.Random, release: Release, searches: Sequence[SearchRequest], largest: int
) -> list[SearchResult]:
    answers: dict[int, SearchResult] = {}
    for batch in batches_of(rng, searches, largest):
        found = release.engine.search([searches[place] for place in batch], release.trie).results
        for place, result in zip(batch, found, strict=True):
            assert isinstance(result, SearchResult), result
            answers[place] = result
    return [answers[place] for place in range(len(searches))]


def assert_sound(result: SearchResult, query: RecommendQuery, release: Release) -> None:
    catalog = release.catalog
    rows = [hit.item_index for hit in result.hits]
    # The catalog orders items by semantic ID: its index is not the number in the id.
    numbers = [int(one.removeprefix("item-")) for one in catalog.ids_of(rows)]
    allowed = allowed_rows(query, catalog.num_items)
    assert len(set(rows)) == len(rows) == min(query.top_k, len(allowed))
    assert set(numbers) <= allowed
    assert catalog.codes_of(rows).tolist() == [list(hit.semantic_id) for hit in result.hits]
    assert (result.shortfall is None) == (len(rows) == query.top_k)
    for hit in result.hits:
        assert float("-inf") < hit.score <= TOLERANCE
        assert sum(hit.level_scores) == pytest.approx(hit.score, abs=TOLERANCE)
    if query.temperature == 0:
        scores = [hit.score for hit in result.hits]
        assert scores == sorted(scores, reverse=True)


def same(found: SearchResult, expected: SearchResult, temperature: float) -> bool:
    """Whether two answers to one request are the same, but for order among equal scores."""
    mine = {hit.item_index: hit.score for hit in found.hits}
    theirs = {hit.item_index: hit.score for hit in expected.hits}
    for row in mine.keys() & theirs.keys():
        assert mine[row] == pytest.approx(theirs[row], abs=TOLERANCE)
    if temperature > 0:
        return list(mine) == list(theirs)
    # The last place may go to either of two items that score the same.
    last = min([*mine.values(), *theirs.values()], default=0.0) + TOLERANCE
    either = mine | theirs
    return all(either[row] <= last for row in mine.keys() ^ theirs.keys()) and all(
        abs(a.score - b.score) <= TOLERANCE for a, b in zip(found.hits, expected.hits, strict=True)
    )


@pytest.mark.parametrize("number", range(len(RELEASES)), ids=[kind for kind, *_ in RELEASES])
def test_every_answer_is_sound_and_the_same_in_any_company(
    number: int, releases: list[Release]
) -> None:
    release = releases[number]
    items = release.catalog.num_items
    rng = random.Random(number)
    left = -(-REQUESTS // len(RELEASES))
    asked, differing = left, 0
    while left > 0:
        queries = [random_query(rng, items) for _ in range(min(left, 100))]
        left -= len(queries)
        searches = [prepare(query, release).search for query in queries]
        alone = answers_in_batches(rng, release, searches, largest=1)
        for query, result in zip(queries, alone, strict=True):
            assert_sound(result, query, release)
        for largest in (8, 25):
            together = answers_in_batches(rng, release, searches, largest)
            for query, result, expected in zip(queries, together, alone, strict=True):
                assert_sound(result, query, release)
                differing += not same(result, expected, query.temperature)
    # Two beams that score the same to float32's rounding may change places at any level, and what
    # is below them with them; anything else would differ far more often.
    assert differing <= 2 * asked / 1_000
