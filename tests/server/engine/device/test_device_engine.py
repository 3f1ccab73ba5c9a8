"""The engine for devices gives the reference's answers; here uncaptured, by the definitions."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.engine import DeviceEngine
from server.engine.device.fused_decoder import FusedDecoder
from server.engine.device.graphs import CaptureError
from server.engine.device.module_decoder import ModuleDecoder
from server.engine.device.searches import Searches
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import EngineFault
from tests.server.engine.device.device_cases import (
    KINDS,
    OPTIONS,
    POOL,
    TOKENS,
    VOCAB,
    olmo2,
    random_catalog,
    requests_of,
)
from tests.server.engine.same_answers import assert_same


@pytest.fixture(scope="module")
def models(tiny_lm: Callable[..., Any]) -> dict[str, Any]:
    # Two of each: an engine changes its model's attention.
    return {kind: olmo2() if kind == "olmo2" else tiny_lm(kind, VOCAB, seed=3) for kind in KINDS}


@pytest.fixture(scope="module")
def engines(tiny_lm: Callable[..., Any]) -> dict[str, DeviceEngine]:
    found = {}
    for kind in KINDS:
        model = olmo2() if kind == "olmo2" else tiny_lm(kind, VOCAB, seed=3)
        engine = build_engine(model, TOKENS, POOL, OPTIONS)
        assert isinstance(engine, DeviceEngine)
        found[kind] = engine
    return found


@pytest.fixture
def engine(tiny_lm: Callable[..., Any]) -> DeviceEngine:
    """One of the test's own, whose searches are yet to be made."""
    made = build_engine(tiny_lm("llama", VOCAB, seed=3), TOKENS, POOL, OPTIONS)
    assert isinstance(made, DeviceEngine)
    return made


def test_common_layers_are_fused_and_others_run_by_their_modules(
    engines: dict[str, DeviceEngine],
) -> None:
    decoders = {kind: type(engine._model.decoder) for kind, engine in engines.items()}
    assert decoders.pop("olmo2") is ModuleDecoder
    assert set(decoders.values()) == {FusedDecoder}


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_weights_that_run_together_are_held_once_and_the_model_goes_on(
    kind: str, tiny_lm: Callable[..., Any]
) -> None:
    model = tiny_lm(kind, VOCAB, seed=3)
    ids = torch.tensor([[1, 5, 2, 7]])
    with torch.no_grad():
        before = model(ids).logits
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    decoder = engine._model.decoder
    assert isinstance(decoder, FusedDecoder)
    for layer, plan in zip(model.get_decoder().layers, decoder.layers, strict=True):
        feed, attention = layer.mlp, layer.self_attn
        for held, parts in (
            (plan.feed.gate_up.weight, (feed.gate_proj, feed.up_proj)),
            (plan.qkv.weight, (attention.q_proj, attention.k_proj, attention.v_proj)),
        ):
            places = {part.weight.untyped_storage().data_ptr() for part in parts}
            assert places == {held.untyped_storage().data_ptr()}
            assert held.numel() == sum(part.weight.numel() for part in parts)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, before, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_the_reference(
    kind: str, data: st.DataObject, models: dict[str, Any], engines: dict[str, DeviceEngine]
) -> None:
    items = data.draw(st.integers(1, 40))
    trie, codes = random_catalog(data.draw(st.integers(0, 10_000)), items)
    batch = data.draw(st.lists(requests_of(items), min_size=1, max_size=6))
    reference = ReferenceSearch(models[kind], TOKENS, codes)
    outcome = engines[kind].search(batch, trie)
    for request, found in zip(batch, outcome.results, strict=True):
        assert_same(found, reference.search(request), atol=1e-4)


def test_a_returning_prompt_is_cached_and_gives_the_same(
    tiny_lm: Callable[..., Any], engines: dict[str, DeviceEngine]
) -> None:
    trie, _ = random_catalog(5, 40)
    engine = engines["qwen3"]
    history = tuple(i % 7 + 20 for i in range(100))
    first = engine.search([SearchRequest(history, 6, 6)], trie)
    grown = SearchRequest((*history, 3, 4), 6, 6)
    again = engine.search([grown, SearchRequest(history[:30], 6, 6)], trie)
    assert first.cached_tokens == (0,)
    assert again.cached_tokens == (64, 0)
    alone = build_engine(tiny_lm("qwen3", VOCAB, seed=3), TOKENS, None, OPTIONS).search(
        [grown], trie
    )
    assert alone.cached_tokens == (0,)
    assert isinstance(alone.results[0], SearchResult)
    assert_same(again.results[0], alone.results[0], 1e-4)


def test_a_catalog_that_outgrows_the_shapes_is_made_ready_beside(
    engine: DeviceEngine, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = SearchRequest((7, 8, 9), 12, 12)
    (small, few), (large, many) = random_catalog(3, 6), random_catalog(3, 125)
    with pytest.raises(ValueError, match="codes"):
        engine.get_ready(CatalogTrie.from_codes(torch.zeros(1, 3, dtype=torch.long), 4)[0])

    def check(trie: CatalogTrie, codes: torch.Tensor) -> None:
        (found,) = engine.search([request], trie).results
        assert_same(found, ReferenceSearch(models["llama"], TOKENS, codes).search(request), 1e-4)

    check(small, few)
    in_use = engine._searches
    getting_ready = threading.Thread(target=engine.get_ready, args=(large,))
    getting_ready.start()
    while getting_ready.is_alive():
        check(small, few)
    assert engine._searches is in_use

    def no_more(*args: object) -> None:
        raise AssertionError("a search is made while a batch waits")

    monkeypatch.setattr(Searches, "_make", no_more)
    check(large, many)
    assert engine._searches is not in_use
    check(small, few)
    check(large, many)
    engine.get_ready(small)
    check(small, few)


def test_one_catalog_at_most_is_kept_ready(engine: DeviceEngine) -> None:
    request = SearchRequest((7, 8, 9), 4, 4)
    small, large, other = (random_catalog(3, items)[0] for items in (6, 125, 120))
    engine.search([request], small)
    engine.get_ready(large)
    assert engine._made is not None
    first = weakref.ref(engine._made[1])
    engine.search([request], small)
    assert first() is not None
    engine.get_ready(other)
    gc.collect()
    assert first() is None


@contextmanager
def failing_captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Searches are captured as on a GPU, in vain."""

    def fail(*_: object) -> None:
        raise CaptureError("out of memory")

    captured = Searches._captured

    def capture(searches: Any, search: Any) -> Any:
        searches._capture, searches._stream, searches._memory = True, None, None
        return captured(searches, search)

    with monkeypatch.context() as patch:
        patch.setattr("server.engine.device.searches.CapturedCall", fail)
        patch.setattr(Searches, "_captured", capture)
        yield


def test_searches_that_could_not_be_captured_beside_others_do_not_take_their_place(
    engine: DeviceEngine, tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could another time; these would be slow for as long as the model is served."""
    request = SearchRequest((7, 8, 9), 4, 4)
    (small, _), (large, codes) = random_catalog(3, 6), random_catalog(3, 125)
    engine.search([request], small)

    with failing_captures(monkeypatch):
        engine.get_ready(large)
    assert engine._made is None
    (found,) = engine.search([request], large).results
    model = tiny_lm("llama", VOCAB, seed=3)
    assert_same(found, ReferenceSearch(model, TOKENS, codes).search(request), 1e-4)


def test_searches_that_memory_was_too_small_for_are_made_once_it_is_there(
    engine: DeviceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a model that was served until then, beside which this one was loaded."""
    trie, _ = random_catalog(3, 30)
    batch = [SearchRequest((7, 8, 9), 4, 4), SearchRequest((7, 8), 12, 4)]
    make, room = Searches._make, 0

    def make_some(searches: Any, batch: int, width: int) -> Any:
        nonlocal room
        room -= 1
        if room < 0:
            raise torch.OutOfMemoryError("tried to allocate 8 GiB")
        return make(searches, batch, width)

    with monkeypatch.context() as patch:
        patch.setattr(Searches, "_make", make_some)
        room = 2
        expected = engine.search(batch, trie).results
    assert len(engine._searches._ready) == 2
    engine.get_ready(trie)
    assert engine.search(batch, trie).results == expected
    assert len(engine._searches._ready) == len(OPTIONS.buckets.shapes())
    assert engine._made is None
    in_use = engine._searches
    engine.get_ready(trie)
    assert engine._made is None
    assert engine.search(batch, trie).results == expected
    assert engine._searches is in_use


def test_searches_that_could_not_be_captured_at_first_are_made_once_more(
    engine: DeviceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture gives nothing back to make room: memory that is short may show in one."""
    trie, _ = random_catalog(3, 30)
    batch = [SearchRequest((7, 8, 9), 4, 4)]

    with failing_captures(monkeypatch):
        expected = engine.search(batch, trie).results
    slow = engine._searches
    engine.get_ready(trie)
    assert engine.search(batch, trie).results == expected
    assert engine._searches is not slow
    in_use = engine._searches
    engine.get_ready(trie)
    assert engine.search(batch, trie).results == expected
    assert engine._searches is in_use


def test_memory_that_stays_too_small_is_asked_for_once_more_only(
    engine: DeviceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying takes seconds, and memory that batches may want."""
    trie, _ = random_catalog(3, 30)
    asked = []

    def fail(searches: Any, batch: int, width: int) -> Any:
        asked.append(searches)
        raise torch.OutOfMemoryError("tried to allocate 8 GiB")

    monkeypatch.setattr(Searches, "_make", fail)
    expected = engine.search([SearchRequest((7, 8, 9), 4, 4)], trie).results
    for _ in range(3):
        engine.get_ready(trie)
        assert engine._made is None
    assert len(set(map(id, asked))) == 2
    assert engine.search([SearchRequest((7, 8, 9), 4, 4)], trie).results == expected


def test_what_was_made_for_a_catalog_that_is_not_taken_goes_with_it(
    engine: DeviceEngine,
) -> None:
    request = SearchRequest((7, 8, 9), 4, 4)
    small, other = (random_catalog(3, items)[0] for items in (6, 120))
    expected = engine.search([request], small).results
    for let_go in (engine.let_go, lambda _: engine.get_ready(small)):
        large = random_catalog(3, 125)[0]
        engine.get_ready(large)
        engine.let_go(other)
        assert engine._made is not None
        arrays = weakref.ref(large.row_ptrs)
        let_go(large)
        del large
        gc.collect()
        assert arrays() is None
    assert engine.search([request], small).results == expected


def test_long_prompts_are_computed_in_several_passes(
    tiny_lm: Callable[..., Any], engines: dict[str, DeviceEngine]
) -> None:
    trie, _ = random_catalog(5, 40)
    engine = build_engine(tiny_lm("qwen3", VOCAB, seed=3), TOKENS, None, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    engine._model.max_pass_rows = 13
    batch = [SearchRequest(tuple(range(n % 30, n % 30 + n % 9 + 1)) * 3, 5, 5) for n in range(6)]
    whole = engines["qwen3"].search(batch, trie).results
    for found, expected in zip(engine.search(batch, trie).results, whole, strict=True):
        assert isinstance(expected, SearchResult)
        assert_same(found, expected, 1e-4)


def test_embeddings_and_tokens_mean_the_same(engines: dict[str, DeviceEngine]) -> None:
    trie, _ = random_catalog(5, 40)
    engine = engines["llama"]
    ids = (4, 9, 2, 30, 7)
    embeds = engine._model.embed(torch.tensor(ids)).detach()
    outcome = engine.search(
        [
            SearchRequest((8, 1), 3, 3),
            SearchRequest((), 5, 5, prompt_embeds=embeds),
            SearchRequest(ids, 5, 5),
            SearchRequest((), 5, 5, prompt_embeds=embeds[:, :4]),
        ],
        trie,
    )
    by_embeds, by_ids = outcome.results[1:3]
    assert isinstance(by_ids, SearchResult)
    assert_same(by_embeds, by_ids, 1e-6)
    assert isinstance(outcome.results[3], EngineFault)
    assert "hidden size 4" in outcome.results[3].message


def test_a_batch_larger_than_the_pool_is_answered_in_parts(tiny_lm: Callable[..., Any]) -> None:
    trie, _ = random_catalog(5, 40)
    # 64 tokens a page, 3 layers x 2 heads x 8 x 2 x 4 bytes a token: two pages.
    engine = build_engine(
        tiny_lm("llama", VOCAB, seed=3), TOKENS, PoolOptions(2 * 64 * 384), OPTIONS
    )
    plenty = build_engine(tiny_lm("llama", VOCAB, seed=3), TOKENS, None, OPTIONS)
    assert engine.max_prompt_tokens == 126
    batch = [SearchRequest(tuple(range(30)) * times, 4, 4) for times in (3, 1, 2, 4, 1)]
    for _ in range(2):
        outcome = engine.search(batch, trie)
        wanted = plenty.search(batch, trie)
        for found, expected in zip(outcome.results, wanted.results, strict=True):
            assert isinstance(expected, SearchResult)
            assert_same(found, expected, 1e-4)


def test_a_prompt_beyond_the_pool_is_refused(tiny_lm: Callable[..., Any]) -> None:
    trie, _ = random_catalog(5, 40)
    engine = build_engine(tiny_lm("llama", VOCAB, seed=3), TOKENS, PoolOptions(64 * 384), OPTIONS)
    assert engine.max_prompt_tokens == 64
    long, short = engine.search(
        [SearchRequest((1,) * 65, 4, 4), SearchRequest((1,) * 64, 4, 4)], trie
    ).results
    assert isinstance(long, EngineFault)
    assert "prompt has 65 tokens; the model takes 64" in long.message
    assert isinstance(short, SearchResult)


def test_a_beam_beyond_all_searches_is_refused_alone(engines: dict[str, DeviceEngine]) -> None:
    trie, _ = random_catalog(5, 40)
    wide, good = (
        engines["llama"]
        .search([SearchRequest((1,), 8_193, 4), SearchRequest((1,), 4, 4)], trie)
        .results
    )
    assert isinstance(wide, EngineFault)
    assert "beam_width is 8193; searches on a GPU take up to 8192" in wide.message
    assert isinstance(good, SearchResult)


def test_a_poisoned_request_fails_alone_and_is_not_cached(tiny_lm: Callable[..., Any]) -> None:
    model = tiny_lm("llama", VOCAB, seed=4)
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    with torch.no_grad():
        model.get_input_embeddings().weight[39] = float("nan")
    trie, _ = random_catalog(2, 30)
    batch = [SearchRequest((1, 39) * 40, 4, 4), SearchRequest((1, 2), 4, 4)]
    for _ in range(2):
        outcome = engine.search(batch, trie)
        bad, good = outcome.results
        assert isinstance(bad, EngineFault)
        assert "NaN" in bad.message
        assert isinstance(good, SearchResult)
        assert len(good.hits) == 4
        assert outcome.cached_tokens == (0, 0)


def test_an_exception_in_a_batch_leaves_the_engine_usable(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(tiny_lm("llama", VOCAB, seed=4), TOKENS, POOL, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    trie, _ = random_catalog(2, 30)
    batch = [SearchRequest((1, 2) * 40, 4, 4), SearchRequest((1, 2), 4, 4)]
    expected = engine.search(batch, trie).results
    free = engine._cache.available_pages
    with monkeypatch.context() as broken:
        broken.setattr(type(engine._model), "beam_pass", _fail)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            engine.search(batch, trie)
    assert engine._cache.available_pages == free
    again = engine.search(batch, trie)
    assert again.results == expected
    assert again.cached_tokens == (64, 0)


def test_searches_that_there_is_no_memory_for_are_made_on_demand(
    models: dict[str, Any], engine: DeviceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = engine._searches._make

    def scarce(batch: int, width: int) -> Any:
        if batch * width > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(batch, width)

    monkeypatch.setattr(engine._searches, "_make", scarce)
    trie, codes = random_catalog(5, 40)
    reference = ReferenceSearch(models["llama"], TOKENS, codes)
    batch = [SearchRequest((n,), 12, 12) for n in range(3)] + [SearchRequest((9,), 3, 3)]
    for request, found in zip(batch, engine.search(batch, trie).results, strict=True):
        assert_same(found, reference.search(request), 1e-4)


def _fail(*_: Any) -> Tensor:
    raise RuntimeError("a kernel failed")


def test_catalogs_may_change_from_batch_to_batch(
    models: dict[str, Any], engines: dict[str, DeviceEngine]
) -> None:
    # The last one is larger than the shapes that the others made.
    for seed, items in ((1, 20), (2, 25), (1, 20), (3, 125)):
        trie, codes = random_catalog(seed, items)
        request = SearchRequest((7, 8, 9), 12, 12)
        (found,) = engines["qwen3"].search([request], trie).results
        assert_same(found, ReferenceSearch(models["qwen3"], TOKENS, codes).search(request), 1e-4)


def test_who_has_left_costs_nothing(engines: dict[str, DeviceEngine]) -> None:
    trie, _ = random_catalog(2, 30)
    engine = engines["llama"]
    batch = [SearchRequest((1, 2), 4, 4), SearchRequest((3,), 4, 4)]
    gone, there = engine.run(engine.prepare(batch, trie), lambda row: row == 0).results
    assert isinstance(gone, EngineFault)
    assert isinstance(there, SearchResult)
    outcome = engine.run(engine.prepare(batch, trie), lambda _: True)
    assert all(isinstance(result, EngineFault) for result in outcome.results)


def test_filters_of_another_catalog_are_refused(engines: dict[str, DeviceEngine]) -> None:
    trie, _ = random_catalog(2, 30)
    prefix = torch.zeros(30, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"shape \(30,\); expected \(31,\)"):
        engines["llama"].prepare([SearchRequest((1,), 4, 4, allowed_prefix=prefix)], trie)
    listed = torch.tensor([3, 30])
    with pytest.raises(ValueError, match="reach from 3 to 30; the catalog has items 0 to 29"):
        engines["llama"].prepare([SearchRequest((1,), 4, 4, allowed_items=listed)], trie)
