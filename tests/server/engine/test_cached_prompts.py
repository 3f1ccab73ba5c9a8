"""A prompt whose beginning is kept gets the answer of a prompt that is computed in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine import pool_setup
from server.engine.device.engine import DeviceOptions
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions, pool_bytes
from server.engine.pooled_prompts import PromptPool
from server.engine.prefix_cache import PrefixCache
from server.engine.runners import PerBeamRunner, SharedContextRunner
from server.engine.types import EngineFault
from tests.server.engine.small_items import TOKENS, TRIE, VOCAB

KINDS = ["qwen3", "llama", "mistral-sliding", "gemma2"]
PAGE_BYTES = 16 * 3 * 2 * 2 * 8 * 4  # of the tiny models: layers, keys and values, heads, D, fp32


def engine_of(model: Any, pages: int = 400) -> Engine:
    return build_engine(model, TOKENS, PoolOptions(memory_bytes=pages * PAGE_BYTES))


@pytest.fixture(scope="module")
def pairs(tiny_lm: Callable[..., Any]) -> dict[str, tuple[Engine, Engine]]:
    """Engines that keep prompts, and the same without."""
    return {
        kind: (
            engine_of(tiny_lm(kind, VOCAB, seed=3), pages=12),
            build_engine(tiny_lm(kind, VOCAB, seed=3), TOKENS),
        )
        for kind in KINDS
    }


def request(prompt: Sequence[int], **fields: Any) -> SearchRequest:
    return SearchRequest(tuple(prompt), beam_width=6, top_k=6, **fields)


def tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def assert_same(
    found: Sequence[SearchResult | EngineFault], expected: Sequence[SearchResult | EngineFault]
) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert isinstance(mine, SearchResult)
        assert isinstance(theirs, SearchResult)
        # Near ties may swap places between two ways of computing; scores may not.
        assert [hit.score for hit in mine.hits] == pytest.approx(
            [hit.score for hit in theirs.hits], abs=1e-5
        )
        scores = {hit.item_index: hit.score for hit in theirs.hits}
        worst = theirs.hits[-1].score
        for hit in mine.hits:
            assert hit.score == pytest.approx(scores.get(hit.item_index, worst), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_growing_histories_in_mixed_batches(
    kind: str, data: st.DataObject, pairs: dict[str, tuple[Engine, Engine]]
) -> None:
    cached, plain = pairs[kind]
    assert cached.prefix_cache is not None
    users = st.integers(0, 3)
    for _ in range(data.draw(st.integers(1, 4))):
        batch = []
        for user in data.draw(st.lists(users, min_size=1, max_size=4)):
            prompt = tokens(100, user)[: data.draw(st.integers(1, 100))]
            if data.draw(st.booleans()):
                batch.append(request(prompt))
            else:
                rows = torch.tensor(prompt)
                embeds = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(5))[rows]
                batch.append(SearchRequest((), 6, 6, prompt_embeds=embeds))
        outcome = cached.search(batch, TRIE)
        assert_same(outcome.results, plain.search(batch, TRIE).results)
        for one, hit in zip(batch, outcome.cached_tokens, strict=True):
            assert 0 <= hit < one.prompt_length
            assert hit % 16 == 0
            assert one.prompt or hit == 0


@pytest.mark.parametrize("kind", KINDS)
def test_context_and_logits_are_those_of_the_whole_prompt(
    kind: str, tiny_lm: Callable[..., Any]
) -> None:
    engine = engine_of(tiny_lm(kind, VOCAB, seed=3))
    runner = engine._runner
    assert isinstance(runner, SharedContextRunner)
    prompts = [tokens(90, 1), tokens(40, 2), tokens(7, 3)]
    engine.search([request(prompts[0][:70]), request(prompts[1][:20])], TRIE)
    session: Any = runner.session()
    with torch.inference_mode():
        level = session.prefill(prompts, with_vocab_norm=True)
    assert list(session.cached_tokens) == [64, 16, 0]
    context = session._context
    session.close()
    runner.pool = None
    fresh: Any = runner.session()
    with torch.inference_mode():
        expected = fresh.prefill(prompts, with_vocab_norm=True)
    torch.testing.assert_close(level.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(level.vocab_log_norm, expected.vocab_log_norm, atol=1e-5, rtol=1e-5)
    for layer, keys in fresh._context.keys.items():
        for row, length in enumerate(map(len, prompts)):
            torch.testing.assert_close(
                context.keys[layer][row, :, :length], keys[row, :, :length], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                context.values[layer][row, :, :length],
                fresh._context.values[layer][row, :, :length],
                atol=1e-5,
                rtol=1e-5,
            )


def test_a_returning_user_pays_for_new_items_only(tiny_lm: Callable[..., Any]) -> None:
    engine = engine_of(tiny_lm("qwen3", VOCAB, seed=3))
    history = tokens(100, 1)
    computed = []
    decoder = engine._runner.decoder  # type: ignore[attr-defined]
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    for length, cached in ((70, 0), (75, 64), (75, 64), (98, 64), (100, 96)):
        computed.clear()
        outcome = engine.search([request(history[:length])], TRIE)
        assert outcome.cached_tokens == (cached,)
        assert computed[0] == length - cached
    stats = engine.prefix_cache
    assert stats is not None
    assert (stats.queried_tokens, stats.hit_tokens) == (418, 288)


def test_a_prompt_is_found_by_others_only_if_its_request_went_well(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lm("llama", VOCAB, seed=4)
    engine = engine_of(model)
    good, bad = tokens(50, 1), tokens(50, 2)
    failing = engine._runner.head  # type: ignore[attr-defined]

    def poison(*args: Any, **kwargs: Any) -> Any:
        level = failing(*args, **kwargs)
        level.logits[1] = float("nan")
        return level

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "head", poison)
        results = engine.search([request(good), request(bad)], TRIE).results
        assert isinstance(results[0], SearchResult)
        assert isinstance(results[1], EngineFault)
    assert engine.search([request(good), request(bad)], TRIE).cached_tokens == (48, 0)
    assert engine.search([request(bad)], TRIE).cached_tokens == (48,)


def test_a_batch_that_fails_leaves_nothing_behind(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_lm("llama", VOCAB, seed=4))
    cache = engine._runner.prefix_cache
    assert cache is not None

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no memory left")

    for broken in ("head", "run_prompts"):
        with monkeypatch.context() as patched:
            patched.setattr(engine._runner, broken, fail)
            with pytest.raises(MemoryError):
                engine.search([request(tokens(50, 1))], TRIE)
        assert cache.free_pages == cache.num_pages
    assert engine.search([request(tokens(50, 1))], TRIE).cached_tokens == (0,)


@pytest.mark.parametrize("pages", [1, 2, 5])
def test_more_prompt_than_pages_is_answered_all_the_same(
    pages: int, tiny_lm: Callable[..., Any]
) -> None:
    engine = engine_of(tiny_lm("qwen3", VOCAB, seed=3), pages=pages)
    plain = build_engine(tiny_lm("qwen3", VOCAB, seed=3), TOKENS)
    batch = [request(tokens(length, seed)) for seed, length in enumerate((100, 40, 17))]
    for _ in range(3):
        assert_same(engine.search(batch, TRIE).results, plain.search(batch, TRIE).results)
    (cached,) = engine.search(batch[:1], TRIE).cached_tokens
    (again,) = engine.search(batch[:1], TRIE).cached_tokens
    assert again == pages * 16
    assert cached <= again


def test_models_that_are_run_beam_by_beam_keep_nothing(tiny_lm: Callable[..., Any]) -> None:
    model = tiny_lm("llama", VOCAB, seed=4)
    engine = Engine(model, TOKENS, PerBeamRunner(model, TOKENS))
    assert engine.prefix_cache is None
    assert engine.search([request(tokens(50, 1))], TRIE).cached_tokens == (0,)


def test_a_model_for_which_keeping_changes_the_logits_keeps_nothing(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = pool_setup.KVPool.read

    def shifted(self: Any, layer: int, pages: Any) -> Any:
        keys, values = read(self, layer, pages)
        return keys + 0.5, values

    monkeypatch.setattr(pool_setup.KVPool, "read", shifted)
    engine = engine_of(tiny_lm("llama", VOCAB, seed=4))
    assert engine.prefix_cache is None
    assert "prompts are not kept for this model" in caplog.text


def test_a_model_that_cannot_run_kept_prompts_keeps_nothing(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("of another shape")

    monkeypatch.setattr(pool_setup.KVPool, "read", fail)
    engine = engine_of(tiny_lm("llama", VOCAB, seed=4))
    assert engine.prefix_cache is None
    assert "of another shape" in caplog.text
    assert isinstance(engine.search([request(tokens(50, 1))], TRIE).results[0], SearchResult)


def test_a_model_of_few_positions_keeps_nothing(tiny_lm: Callable[..., Any]) -> None:
    model = tiny_lm("llama", VOCAB, seed=4)
    model.config.max_position_embeddings = 32
    assert engine_of(model).prefix_cache is None


def test_pages_are_given_back_when_leasing_them_fails(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_lm("llama", VOCAB, seed=4))
    cache = engine._runner.prefix_cache
    assert cache is not None
    with monkeypatch.context() as patched:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise MemoryError("no memory for a table of pages")

        patched.setattr("server.engine.pooled_prompts.page_indices", fail)
        with pytest.raises(MemoryError):
            engine.search([request(tokens(50, 1))], TRIE)
    assert cache.free_pages == cache.num_pages


def test_memory_without_a_page_is_refused(tiny_lm: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"1000 bytes .* hold no page"):
        build_engine(tiny_lm("llama", VOCAB), TOKENS, PoolOptions(memory_bytes=1_000))


def test_memory_suits_the_device_unless_it_is_given() -> None:
    cpu = torch.device("cpu")
    assert pool_bytes(PoolOptions(), cpu) == 512 << 20
    assert pool_bytes(PoolOptions(memory_bytes=7), cpu) == 7


def test_pages_and_cache_must_fit(tiny_lm: Callable[..., Any]) -> None:
    engine = engine_of(tiny_lm("llama", VOCAB))
    pool = engine._runner.pool  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"the cache has .* \(3, 16\); the pool has \(400, 16\)"):
        PromptPool(pool.pages, PrefixCache(3, 16))


@pytest.mark.parametrize("options", [None, DeviceOptions()], ids=["any device", "for devices"])
def test_a_page_that_was_spoilt_is_not_kept(options: DeviceOptions | None, tiny_lm: Any) -> None:
    """What is used is never evicted: whoever begins alike would fail for as long as they come."""
    model = tiny_lm("llama", VOCAB, seed=3)
    engine = build_engine(model, TOKENS, PoolOptions(memory_bytes=64 * 4 * PAGE_BYTES), options)
    one, other = request(tokens(70, 1)), request([*tokens(70, 1), 5])
    expected = engine.search([one, other], TRIE).results
    pool = engine._runner.pool.pages if isinstance(engine, Engine) else engine._model.pool
    for keys in pool.keys.values():
        keys.fill_(torch.nan)
    (spoilt,) = engine.search([one], TRIE).results
    assert isinstance(spoilt, EngineFault)
    assert_same(engine.search([one, other], TRIE).results, expected)
    outcome = engine.search([one, other], TRIE)
    assert_same(outcome.results, expected)
    assert outcome.cached_tokens == (64, 64)
