"""The engine gives the reference's answers, whatever the model, the batch and the filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest, SearchResult
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.runners import PerBeamRunner, SharedContextRunner
from server.engine.types import EngineFault
from tests.server.engine.same_answers import assert_same

LEVELS, CODES = 3, 5
VOCAB = 40
TOKENS = ItemTokens(
    offset=11, level_stride=6, num_levels=LEVELS, codebook_size=CODES, start_token_id=3
)
KINDS = ["qwen3", "llama", "mistral-sliding", "gemma2"]


def sorted_codes(codes: Tensor) -> tuple[CatalogTrie, Tensor]:
    trie, order = CatalogTrie.from_codes(codes, CODES)
    return trie, codes[order]


def random_catalog(seed: int, items: int) -> tuple[CatalogTrie, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Squaring skews the fan-out: some nodes have one child, some all of them.
    codes = (torch.rand(items, LEVELS, generator=generator) ** 2 * CODES).long()
    return sorted_codes(codes)


@pytest.fixture(scope="module")
def models(tiny_lm: Callable[..., Any]) -> dict[str, Any]:
    return {kind: tiny_lm(kind, VOCAB, seed=3) for kind in KINDS}


@pytest.fixture(scope="module")
def engines(models: dict[str, Any]) -> dict[str, Engine]:
    return {kind: build_engine(model, TOKENS) for kind, model in models.items()}


@st.composite
def requests_of(draw: st.DrawFn, num_items: int) -> SearchRequest:
    width = draw(st.integers(1, 12))
    excluded = draw(st.none() | st.sets(st.integers(0, num_items - 1)))
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=num_items, max_size=num_items))
    listed = draw(st.none() | st.none() | st.sets(st.integers(0, num_items - 1)))
    prefix = None
    if allowed is not None:
        counts = torch.tensor([False, *allowed]).int()
        prefix = counts.cumsum(0).int()
    return SearchRequest(
        prompt=tuple(draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))),
        beam_width=width,
        top_k=draw(st.integers(1, width)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.0, 2.5])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        normalization=draw(st.sampled_from(NORMALIZATIONS)),
        excluded_items=None if excluded is None else torch.tensor(sorted(excluded)).long(),
        allowed_prefix=prefix,
        allowed_items=None if listed is None else torch.tensor(sorted(listed)).long(),
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_reference(
    kind: str, data: st.DataObject, models: dict[str, Any], engines: dict[str, Engine]
) -> None:
    items = data.draw(st.integers(1, 40))
    trie, codes = random_catalog(data.draw(st.integers(0, 10_000)), items)
    batch = data.draw(st.lists(requests_of(items), min_size=1, max_size=4))
    reference = ReferenceSearch(models[kind], TOKENS, codes)
    outcome = engines[kind].search(batch, trie)
    for request, found in zip(batch, outcome.results, strict=True):
        assert_same(found, reference.search(request), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_shared_for_attention_models(kind: str, engines: dict[str, Engine]) -> None:
    assert isinstance(engines[kind]._runner, SharedContextRunner)


def test_the_context_is_stored_once_however_wide_the_beam(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    engine = engines["llama"]
    original = SharedContextRunner.session

    def spying(runner: SharedContextRunner) -> Any:
        session: Any = original(runner)
        shapes.append(session)
        return session

    monkeypatch.setattr(SharedContextRunner, "session", spying)
    trie, _ = random_catalog(1, 40)
    engine.search([SearchRequest((1, 2, 3), 12, 12), SearchRequest((4,), 12, 12)], trie)
    context = shapes[0]._context
    assert {tuple(key.shape) for key in context.keys.values()} == {(2, 2, 3, 8)}


def test_a_request_alone_and_in_a_batch(engines: dict[str, Engine]) -> None:
    trie, _ = random_catalog(5, 40)
    generator = torch.Generator().manual_seed(0)
    batch = [
        SearchRequest(
            prompt=tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()),
            beam_width=width,
            top_k=width,
            temperature=temperature,
            seed=width,
        )
        for length, width, temperature in [(3, 4, 0.0), (17, 10, 1.0), (1, 7, 0.5), (9, 2, 0.0)]
    ]
    together = engines["qwen3"].search(batch, trie).results
    for request, found in zip(batch, together, strict=True):
        (alone,) = engines["qwen3"].search([request], trie).results
        assert isinstance(alone, SearchResult)
        assert_same(found, alone, atol=1e-5)


def test_filtered_requests_get_top_k_whenever_that_many_exist(engines: dict[str, Engine]) -> None:
    trie, codes = random_catalog(9, 60)
    for kept in range(0, 61, 4):
        allowed = torch.zeros(60, dtype=torch.int32)
        chosen = torch.randperm(60, generator=torch.Generator().manual_seed(kept))[:kept]
        allowed[chosen] = 1
        prefix = torch.cat([torch.zeros(1, dtype=torch.int32), allowed.cumsum(0).int()])
        request = SearchRequest((2, 5), 10, 10, allowed_prefix=prefix)
        (found,) = engines["llama"].search([request], trie).results
        assert isinstance(found, SearchResult)
        returned = [hit.item_index for hit in found.hits]
        assert len(returned) == min(10, kept)
        assert len(set(returned)) == len(returned)
        assert set(returned) <= set(chosen.tolist())
        for hit in found.hits:
            assert hit.semantic_id == tuple(codes[hit.item_index].tolist())


def test_a_caller_that_leaves_between_levels_is_dropped_and_the_others_are_not(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["llama"]
    trie, _ = random_catalog(9, 60)
    batch = [SearchRequest((2, 5), 12, 10), SearchRequest((7,), 3, 3), SearchRequest((1, 4), 4, 4)]
    alone = [engine.search([request], trie).results[0] for request in batch]
    widths = []
    original = type(engine._runner.session()).advance

    def spying(session: Any, parents: Tensor, *rest: Any, **kwargs: Any) -> Any:
        widths.append(parents.shape[1])
        return original(session, parents, *rest, **kwargs)

    monkeypatch.setattr(type(engine._runner.session()), "advance", spying)
    prepared = engine.prepare(batch, trie)
    gone, *stayed = engine.run(prepared, lambda row: row == 0 and len(widths) == 1).results
    assert isinstance(gone, EngineFault)
    # The widest left after the first level: the second is as wide as the next widest only.
    assert widths == [5, 4]  # five codes at the first level
    for found, expected in zip(stayed, alone[1:], strict=True):
        assert isinstance(expected, SearchResult)
        assert_same(found, expected, atol=1e-5)

    widths.clear()
    outcome = engine.run(prepared, lambda row: len(widths) == 1)
    assert all(isinstance(result, EngineFault) for result in outcome.results)
    assert len(widths) == 1


def test_nothing_allowed_is_a_shortfall_not_an_error(engines: dict[str, Engine]) -> None:
    trie, _ = random_catalog(9, 12)
    request = SearchRequest((2, 5), 5, 5, excluded_items=torch.arange(12))
    neighbour = SearchRequest((2, 5), 5, 5)
    none, some = engines["qwen3"].search([request, neighbour], trie).results
    assert isinstance(none, SearchResult)
    assert isinstance(some, SearchResult)
    assert none.hits == ()
    assert none.shortfall is not None
    assert none.shortfall.reason == "filters"
    assert len(some.hits) == 5


def test_a_poisoned_request_fails_alone(tiny_lm: Callable[..., Any]) -> None:
    model = tiny_lm("llama", VOCAB, seed=4)
    with torch.no_grad():
        model.get_input_embeddings().weight[39] = float("nan")
    engine = build_engine(model, TOKENS)
    trie, _ = random_catalog(2, 30)
    bad, good = engine.search(
        [SearchRequest((1, 39), 4, 4), SearchRequest((1, 2), 4, 4)], trie
    ).results
    assert isinstance(bad, EngineFault)
    assert "NaN" in bad.message
    assert isinstance(good, SearchResult)
    assert len(good.hits) == 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((1,) * 500, "prompt has 500 tokens; the model takes 126"),
        ((1, 40), "token ids 1 to 40; allowed are 0 to 39"),
        ((-1, 4), "token ids -1 to 4; allowed are 0 to 39"),
    ],
)
def test_a_prompt_the_model_cannot_take(
    prompt: tuple[int, ...], message: str, engines: dict[str, Engine]
) -> None:
    trie, _ = random_catalog(2, 30)
    bad, good = (
        engines["llama"]
        .search([SearchRequest(prompt, 4, 4), SearchRequest((1, 2), 4, 4)], trie)
        .results
    )
    assert isinstance(bad, EngineFault)
    assert message in bad.message
    assert isinstance(good, SearchResult)


def test_a_catalog_of_another_shape_is_refused(engines: dict[str, Engine]) -> None:
    trie, _ = CatalogTrie.from_codes(torch.tensor([[0, 1]]), CODES)
    with pytest.raises(ValueError, match="2 levels of 5 codes; the model has 3 of 5"):
        engines["qwen3"].search([SearchRequest((1,), 1, 1)], trie)


def test_item_tokens_beyond_the_vocabulary_are_refused(tiny_lm: Callable[..., Any]) -> None:
    tokens = ItemTokens(30, 6, LEVELS, CODES, start_token_id=0)
    with pytest.raises(ValueError, match="item token ids reach 46; the model's vocabulary has 40"):
        build_engine(tiny_lm("qwen3", VOCAB), tokens)


@pytest.fixture(scope="module")
def recurrent_model() -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_5 import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.2)
    assert "linear_attention" in model.config.get_text_config().layer_types
    return model


def test_recurrent_layers_get_a_state_per_beam(recurrent_model: Any) -> None:
    engine = build_engine(recurrent_model, TOKENS)
    assert isinstance(engine._runner, PerBeamRunner)
    trie, codes = random_catalog(7, 40)
    batch = [
        SearchRequest((1, 2, 3, 4), 6, 6),
        SearchRequest((9,), 3, 2, normalization="vocab"),
        SearchRequest((5, 6), 8, 8, temperature=1.0, seed=3),
    ]
    reference = ReferenceSearch(recurrent_model, TOKENS, codes)
    for request, found in zip(batch, engine.search(batch, trie).results, strict=True):
        assert_same(found, reference.search(request), atol=1e-4)
