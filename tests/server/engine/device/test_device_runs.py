"""Batches that are begun before others are finished: the answers that they have by themselves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.engine import DeviceEngine
from server.engine.device.searches import Searches
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import EngineFault
from tests.server.engine.device.device_cases import (
    OPTIONS,
    POOL,
    TOKENS,
    VOCAB,
    random_catalog,
    requests_of,
)
from tests.server.engine.same_answers import assert_same

MakeEngine = Callable[..., DeviceEngine]


@pytest.fixture
def make_engine(tiny_lm: Callable[..., Any]) -> MakeEngine:
    def make(pool: PoolOptions | None = POOL) -> DeviceEngine:
        engine = build_engine(tiny_lm("llama", VOCAB, seed=3), TOKENS, pool, OPTIONS)
        assert isinstance(engine, DeviceEngine)
        return engine

    return make


@pytest.fixture(scope="module")
def engine(tiny_lm: Callable[..., Any]) -> DeviceEngine:
    # 64 tokens a page, 384 bytes a token: prompts of three requests may already be too long.
    pool = PoolOptions(4 * 64 * 384)
    engine = build_engine(tiny_lm("llama", VOCAB, seed=3), TOKENS, pool, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    return engine


@pytest.fixture(scope="module")
def model(tiny_lm: Callable[..., Any]) -> Any:
    return tiny_lm("llama", VOCAB, seed=3)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equal_the_reference(data: st.DataObject, engine: DeviceEngine, model: Any) -> None:
    catalogs = [random_catalog(data.draw(st.integers(0, 99)), 30) for _ in range(2)]
    begun: list[tuple[Any, list[SearchRequest], ReferenceSearch]] = []
    for _ in range(data.draw(st.integers(2, 5))):
        trie, codes = catalogs[data.draw(st.integers(0, 1))]
        batch = data.draw(st.lists(requests_of(30), min_size=1, max_size=4))
        run = engine.start(engine.prepare(batch, trie))
        begun.append((run, batch, ReferenceSearch(model, TOKENS, codes)))
        if data.draw(st.booleans()):
            _check(*begun.pop(0))
    for one in begun:
        one[0].wait_for_prompts()
        _check(*one)


def _check(run: Any, batch: list[SearchRequest], reference: ReferenceSearch) -> None:
    for request, found in zip(batch, run.finish().results, strict=True):
        assert_same(found, reference.search(request), 1e-4)


def test_pages_are_held_until_the_end_and_found_after_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    trie, _ = random_catalog(2, 30)
    batch = engine.prepare([SearchRequest((1, 2) * 40, 4, 4)], trie)
    free = engine._cache.available_pages
    first, second = engine.start(batch), engine.start(batch)
    assert engine._cache.available_pages == free - 4
    outcomes = [first.finish(), second.finish()]
    assert engine._cache.available_pages == free
    assert [outcome.cached_tokens for outcome in outcomes] == [(0,), (0,)]
    assert engine.run(batch).cached_tokens == (64,)


def test_one_that_needs_pages_waits_for_those_who_hold_them(make_engine: MakeEngine) -> None:
    engine = make_engine(PoolOptions(2 * 64 * 384))
    trie, _ = random_catalog(2, 30)
    long = engine.prepare([SearchRequest((1, 2) * 40, 4, 4)], trie)
    first, second = engine.start(long), engine.start(long)
    assert isinstance(first.finish().results[0], SearchResult)
    assert second.finish().results == engine.run(long).results


def test_what_was_begun_ends_before_other_searches_take_over(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    trie, _ = random_catalog(2, 30)
    batch = engine.prepare([SearchRequest((1, 2), 4, 4)], trie)
    with monkeypatch.context() as patch:
        patch.setattr(Searches, "_make", _no_memory)
        expected = engine.run(batch).results
    first = engine.start(batch)
    engine.get_ready(trie)
    assert engine._made is not None
    assert first.parts
    second = engine.start(batch)
    assert engine._made is None
    assert first.parts == []
    assert first.finish().results == second.finish().results == expected


def test_one_that_fails_leaves_the_others_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    trie, _ = random_catalog(2, 30)
    batch = engine.prepare([SearchRequest((1, 2), 4, 4)], trie)
    expected = engine.run(batch).results
    free = engine._cache.available_pages
    first = engine.start(batch)
    with monkeypatch.context() as broken:
        broken.setattr(type(engine._model), "beam_pass", _fail)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            engine.start(batch)
    unreadable = engine.start(batch)
    with monkeypatch.context() as broken:
        broken.setattr("server.engine.device.answers.answer_columns", _fail)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            unreadable.finish()
    third = engine.start(batch)
    assert first.finish().results == third.finish().results == expected
    assert engine._cache.available_pages == free


@pytest.mark.parametrize("where", ["beginning", "end", "another's turn"])
def test_one_that_fails_is_in_memory_no_longer_than_its_caller_has_it(
    where: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its searches gave and its filters would stay until garbage is collected."""
    engine = make_engine()
    trie, _ = random_catalog(2, 30)
    request = SearchRequest((1, 2), 4, 4, allowed_items=torch.tensor([1, 2, 3]))
    batch = engine.prepare([request], trie)
    filters = weakref.ref(batch.requests[0].allowed_prefix)
    broken = "server.engine.device.answers.answer_columns"
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            if where == "beginning":
                patch.setattr(type(engine._model), "beam_pass", _fail)
            run = None if where == "beginning" else engine.start(batch)
            patch.setattr(broken, _fail)
            if where == "another's turn":
                other, _ = random_catalog(3, 30)
                engine.start(engine.prepare([SearchRequest((1, 2), 4, 4)], other))
            with pytest.raises(RuntimeError, match="a kernel failed"):
                _ = run.finish() if run is not None else engine.start(batch)
        del run, batch
        engine._searches._ready.clear()  # they have the filters of their last batch
        assert filters() is None
    finally:
        gc.enable()


def test_who_has_left_by_the_beginning_costs_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    trie, _ = random_catalog(2, 30)
    batch = engine.prepare([SearchRequest((1, 2), 4, 4), SearchRequest((3,), 4, 4)], trie)
    nobody = engine.start(batch, lambda _: True)
    assert nobody.parts == []
    nobody.wait_for_prompts()
    assert all(isinstance(result, EngineFault) for result in nobody.finish().results)


def test_without_captured_searches_batches_are_run_whole(make_engine: MakeEngine) -> None:
    engine = make_engine()
    trie, _ = random_catalog(2, 30)
    assert engine.begin(engine.prepare([SearchRequest((1, 2), 4, 4)], trie)) is None


def _fail(*_: Any) -> Tensor:
    raise RuntimeError("a kernel failed")


def _no_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("tried to allocate 8 GiB")
