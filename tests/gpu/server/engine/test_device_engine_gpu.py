"""The device engine on CUDA, captured: the reference's answers, whatever comes between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.kernels import compile_ahead
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.device.graphs import CapturedCall, CaptureError
from server.engine.device.searches import Searches
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import EngineFault
from tests.server.engine.device.device_cases import (
    KINDS,
    POOL,
    TOKENS,
    VOCAB,
    olmo2,
    random_catalog,
    requests_of,
)
from tests.server.engine.same_answers import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = DeviceOptions(Buckets((1, 2, 4), (4, 12), 32), prompt_rows=(64, 256))


@pytest.fixture(scope="module")
def make(tiny_lm: Callable[..., Any]) -> Callable[..., Any]:
    def made(kind: str) -> Any:
        model = olmo2() if kind == "olmo2" else tiny_lm(kind, VOCAB, seed=3)
        if kind == "gemma2":  # the attention of early transformers 5 leaves out its soft cap
            model.set_attn_implementation("eager")
        return model

    return made


@pytest.fixture(scope="module")
def models(make: Callable[..., Any]) -> dict[str, Any]:
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def engines(make: Callable[..., Any]) -> dict[str, DeviceEngine]:
    found = {}
    for kind in KINDS:
        engine = build_engine(make(kind).cuda(), TOKENS, POOL, OPTIONS)
        assert isinstance(engine, DeviceEngine), kind
        found[kind] = engine
    return found


def captured_searches(engine: DeviceEngine) -> dict[tuple[int, int], Any]:
    return {
        shape: run
        for shape, (_, run) in engine._searches._ready.items()
        if isinstance(run, CapturedCall)
    }


def test_start_up_compiles_side_by_side(make: Callable[..., Any]) -> None:
    triton = pytest.importorskip("triton")
    ahead, in_turn = [], []

    def note(**known: Any) -> None:
        (in_turn if compile_ahead._seen.get() is None else ahead).append(known["fn"].name)

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        options = DeviceOptions(Buckets((1, 3), (20, 200), 600), prompt_rows=(48, 192))
        engine = build_engine(make(KINDS[0]).bfloat16().cuda(), TOKENS, POOL, options)
        trie, _ = random_catalog(5, 40)
        found = engine.search([SearchRequest((1, 2, 3), 20, 5)], trie.to("cuda"))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert isinstance(found.results[0], SearchResult)
    assert ahead
    assert not in_turn


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equals_the_reference(
    kind: str, data: st.DataObject, models: dict[str, Any], engines: dict[str, DeviceEngine]
) -> None:
    items = data.draw(st.integers(1, 40))
    trie, codes = random_catalog(data.draw(st.integers(0, 10_000)), items)
    batch = data.draw(st.lists(requests_of(items), min_size=1, max_size=6))
    reference = ReferenceSearch(models[kind], TOKENS, codes)
    outcome = engines[kind].search(batch, trie.to("cuda"))
    for request, found in zip(batch, outcome.results, strict=True):
        assert_same(found, reference.search(request), atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_batches_begun_behind_others_equal_the_reference(
    data: st.DataObject, models: dict[str, Any], engines: dict[str, DeviceEngine]
) -> None:
    engine = engines["qwen3"]
    catalogs = [(trie.to("cuda"), codes) for trie, codes in (random_catalog(n, 40) for n in (1, 2))]
    begun: list[tuple[Any, list[SearchRequest], ReferenceSearch]] = []

    def check(run: Any, batch: list[SearchRequest], reference: ReferenceSearch) -> None:
        for request, found in zip(batch, run.finish().results, strict=True):
            assert_same(found, reference.search(request), atol=1e-4)

    for number in range(data.draw(st.integers(2, 6))):
        trie, codes = catalogs[data.draw(st.integers(0, 1))]
        batch = data.draw(st.lists(requests_of(40), min_size=1, max_size=6))
        run = engine.begin(engine.prepare(batch, trie))
        assert run is not None
        begun.append((run, batch, ReferenceSearch(models["qwen3"], TOKENS, codes)))
        if number % 2:
            check(*begun.pop(0))
    for one in begun:
        one[0].wait_for_prompts()
        check(*one)


def test_searches_are_captured_and_survive_a_catalog_swap(
    models: dict[str, Any], engines: dict[str, DeviceEngine]
) -> None:
    engine = engines["qwen3"]
    request = SearchRequest((7, 8, 9), 12, 12)
    graphs = None
    for seed, items in ((1, 40), (2, 36), (1, 40)):
        trie, codes = random_catalog(seed, items)
        (found,) = engine.search([request], trie.to("cuda")).results
        assert_same(found, ReferenceSearch(models["qwen3"], TOKENS, codes).search(request), 1e-4)
        before, graphs = graphs, captured_searches(engine)
        assert set(graphs) == set(OPTIONS.buckets.shapes())
        assert before is None or before == graphs
    assert set(engine._passes._ready) == {(rows, False) for rows in OPTIONS.prompt_rows}


def test_a_catalog_that_outgrows_the_shapes_is_captured_anew(
    make: Callable[..., Any], models: dict[str, Any]
) -> None:
    engine = build_engine(make("llama").cuda(), TOKENS, POOL, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    request = SearchRequest((7, 8, 9), 12, 12)
    for items in (6, 125, 20, 125):
        trie, codes = random_catalog(3, items)
        (found,) = engine.search([request], trie.to("cuda")).results
        assert_same(found, ReferenceSearch(models["llama"], TOKENS, codes).search(request), 1e-4)
        assert set(captured_searches(engine)) == set(OPTIONS.buckets.shapes())


def test_what_outgrows_the_shapes_is_captured_beside_what_runs(
    make: Callable[..., Any], models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(make("llama").cuda(), TOKENS, POOL, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    batch = [SearchRequest((7, 8, 9) * (n + 1), 12, 12) for n in range(4)]

    def check(trie: Any, codes: torch.Tensor) -> None:
        reference = ReferenceSearch(models["llama"], TOKENS, codes)
        for request, found in zip(batch, engine.search(batch, trie).results, strict=True):
            assert_same(found, reference.search(request), 1e-4)

    (small, few), (large, many) = random_catalog(3, 6), random_catalog(3, 125)
    small, large = small.to("cuda"), large.to("cuda")
    check(small, few)
    in_use = engine._searches
    getting_ready = threading.Thread(target=engine.get_ready, args=(large,))
    getting_ready.start()
    turns = 0
    while getting_ready.is_alive():
        check(small, few)
        turns += 1
    assert turns > 1
    check(small, few)
    assert engine._searches is in_use

    def no_more(*args: object) -> None:
        raise AssertionError("a search is captured while a batch waits")

    monkeypatch.setattr(Searches, "_make", no_more)
    for _ in range(3):
        check(large, many)
        check(small, few)
    assert engine._searches is not in_use
    assert set(captured_searches(engine)) == set(OPTIONS.buckets.shapes())


def test_alone_and_in_any_batch_the_same(engines: dict[str, DeviceEngine]) -> None:
    engine = engines["qwen3"]
    trie = random_catalog(5, 40)[0].to("cuda")
    batch = [
        SearchRequest(tuple(range(n % 9, n % 9 + 3 * n + 1)), n % 12 + 1, 1, temperature=n % 2,
                      seed=n, normalization=("vocab", "level", "children")[n % 3])
        for n in range(9)
    ]  # fmt: skip
    together = engine.search(batch, trie).results
    for request, found in zip(batch, together, strict=True):
        (alone,) = engine.search([request], trie).results
        assert isinstance(alone, SearchResult)
        assert_same(found, alone, 1e-4)


def test_outside_the_buckets_nothing_is_captured_and_all_is_right(
    models: dict[str, Any], engines: dict[str, DeviceEngine]
) -> None:
    trie, codes = random_catalog(5, 40)
    wide = SearchRequest(tuple(range(30)) * 3, 40, 40)
    # Wider than all buckets, and more rows than a captured pass.
    excluded = SearchRequest((3, 4), 4, 4, excluded_items=torch.arange(0, 40, 3))
    reference = ReferenceSearch(models["llama"], TOKENS, codes)
    found = engines["llama"].search([wide, excluded, wide, wide, wide], trie.to("cuda")).results
    assert_same(found[0], reference.search(wide), 1e-4)
    assert_same(found[1], reference.search(excluded), 1e-4)


def test_a_batch_larger_than_the_pool_is_answered_in_parts(
    make: Callable[..., Any], engines: dict[str, DeviceEngine]
) -> None:
    trie = random_catalog(5, 40)[0].to("cuda")
    small = build_engine(make("llama").cuda(), TOKENS, PoolOptions(2 * 64 * 384), OPTIONS)
    assert isinstance(small, DeviceEngine)
    batch = [SearchRequest(tuple(range(30)) * times, 4, 4) for times in (3, 1, 2, 4, 1)]
    for _ in range(2):
        wanted = engines["llama"].search(batch, trie).results
        for found, expected in zip(small.search(batch, trie).results, wanted, strict=True):
            assert isinstance(expected, SearchResult)
            assert_same(found, expected, 1e-4)


def test_prompts_of_many_rows_take_several_captured_passes(
    make: Callable[..., Any], models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DeviceOptions(OPTIONS.buckets, prompt_rows=(16, 32))
    engine = build_engine(make("qwen3").cuda(), TOKENS, POOL, options)
    assert isinstance(engine, DeviceEngine)
    trie, codes = random_catalog(1, 40)
    reference = ReferenceSearch(models["qwen3"], TOKENS, codes)
    batch = [SearchRequest(tuple(range(n % 30, n % 30 + n % 9 + 1)) * 3, 5, 5) for n in range(9)]
    monkeypatch.setattr(type(engine._model), "run_prompts", None)  # nothing runs uncaptured
    for request, found in zip(batch, engine.search(batch, trie.to("cuda")).results, strict=True):
        assert_same(found, reference.search(request), 1e-4)


def test_nan_weights_poison_only_their_request(make: Callable[..., Any]) -> None:
    model = make("llama").cuda()
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    with torch.no_grad():
        model.get_input_embeddings().weight[39] = float("nan")
    trie = random_catalog(2, 30)[0].to("cuda")
    batch = [SearchRequest((1, 39) * 40, 4, 4), SearchRequest((1, 2), 4, 4)]
    expected = engine.search(batch[1:], trie).results[0]
    assert isinstance(expected, SearchResult)
    for _ in range(3):
        bad, good = engine.search(batch, trie).results
        assert isinstance(bad, EngineFault)
        assert_same(good, expected, 1e-4)
    # Its pages, NaN and all, are given to others.
    for number in range(30):
        (found,) = engine.search([SearchRequest((number,) * 70, 4, 4)], trie).results
        assert isinstance(found, SearchResult)


def test_16_bits_give_nearly_the_same_items(make: Callable[..., Any]) -> None:
    trie = random_catalog(5, 60)[0].to("cuda")
    engines = [
        build_engine(make("qwen3").to("cuda", dtype), TOKENS, POOL, OPTIONS)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert all(isinstance(engine, DeviceEngine) for engine in engines)
    batch = [SearchRequest(tuple(range(n % 20, 30)), 12, 12) for n in range(12)]
    exact, rounded = (engine.search(batch, trie).results for engine in engines)
    shared = total = 0
    for one, other in zip(exact, rounded, strict=True):
        assert isinstance(one, SearchResult)
        assert isinstance(other, SearchResult)
        items = {hit.item_index for hit in one.hits}
        shared += len(items & {hit.item_index for hit in other.hits})
        total += len(items)
    assert shared / total > 0.8


def test_what_cannot_be_captured_leaves_the_device_usable() -> None:
    stream, memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def call() -> torch.Tensor:
        found = torch.ones(4, device="cuda") * 2
        return found + found.sum().item()

    with pytest.raises(CaptureError):
        CapturedCall(call, stream, memory)
    assert float((torch.ones(1 << 20, device="cuda") * 3).sum()) == 3 << 20
    another = CapturedCall(
        lambda: torch.ones(4, device="cuda") * 5,
        torch.cuda.Stream(),
        torch.cuda.graph_pool_handle(),
    )
    assert another().tolist() == [5.0] * 4
