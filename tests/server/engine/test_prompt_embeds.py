"""A prompt given as input embeddings is answered like the token ids they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest, SearchResult
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.runners import PerBeamRunner, SharedContextRunner
from server.engine.types import EngineFault

CODES, LEVELS, VOCAB = 5, 3, 40
TOKENS = ItemTokens(
    offset=11, level_stride=6, num_levels=LEVELS, codebook_size=CODES, start_token_id=3
)
# gemma2 scales its embeddings inside the model: what is handed in must be what the layer gives.
KINDS = ["qwen3", "gemma2"]


@pytest.fixture(scope="module")
def catalog() -> tuple[CatalogTrie, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = (torch.rand(40, LEVELS, generator=generator) ** 2 * CODES).long()
    trie, order = CatalogTrie.from_codes(codes, CODES)
    return trie, codes[order]


@pytest.fixture(scope="module")
def engines(tiny_lm: Callable[..., Any]) -> dict[tuple[str, str], tuple[Engine, Any]]:
    """By kind and runner: the engine and its model."""
    found = {}
    for kind in KINDS:
        shared = build_engine(tiny_lm(kind, VOCAB, seed=3), TOKENS)
        assert isinstance(shared._runner, SharedContextRunner)
        model = tiny_lm(kind, VOCAB, seed=3)
        per_beam = Engine(model, TOKENS, PerBeamRunner(model, TOKENS))
        found[kind, "shared"] = (shared, tiny_lm(kind, VOCAB, seed=3))
        found[kind, "per beam"] = (per_beam, model)
    return found


@st.composite
def requests(draw: st.DrawFn) -> SearchRequest:
    width = draw(st.integers(1, 10))
    return SearchRequest(
        prompt=tuple(draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))),
        beam_width=width,
        top_k=draw(st.integers(1, width)),
        temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
        seed=draw(st.integers(0, 2**40)),
        normalization=draw(st.sampled_from(NORMALIZATIONS)),
    )


def embedded(request: SearchRequest, model: Any) -> SearchRequest:
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(torch.tensor(request.prompt))
    return replace(request, prompt=(), prompt_embeds=embeds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runner", ["shared", "per beam"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_embeddings_of_the_ids_give_the_answer_of_the_ids(
    kind: str, runner: str, data: st.DataObject, engines: Any, catalog: Any
) -> None:
    """Alone, all of a batch, and mixed with ids: equal to the last bit, as nothing differs."""
    engine, model = engines[kind, runner]
    trie, _ = catalog
    batch = data.draw(st.lists(requests(), min_size=1, max_size=4))
    as_embeds = data.draw(st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)))
    expected = engine.search(batch, trie).results
    assert all(isinstance(result, SearchResult) for result in expected)
    mixed = [embedded(r, model) if flag else r for r, flag in zip(batch, as_embeds, strict=True)]
    assert engine.search(mixed, trie).results == expected
    assert engine.search([embedded(r, model) for r in batch], trie).results == expected
    alone = engine.search(batch[:1], trie).results
    assert engine.search([embedded(batch[0], model)], trie).results == alone


@settings(max_examples=15, deadline=None)
@given(request=requests())
def test_the_reference_takes_embeddings_too(
    request: SearchRequest, engines: Any, catalog: Any
) -> None:
    engine, model = engines["qwen3", "shared"]
    trie, codes = catalog
    reference = ReferenceSearch(model, TOKENS, codes)
    expected = reference.search(request)
    found = reference.search(embedded(request, model))
    assert found == expected
    (fast,) = engine.search([embedded(request, model)], trie).results
    assert [hit.item_index for hit in fast.hits] == [hit.item_index for hit in expected.hits]
    assert [h.score for h in fast.hits] == pytest.approx([h.score for h in expected.hits], abs=1e-4)


def test_embeddings_may_be_of_another_float_type(engines: Any, catalog: Any) -> None:
    engine, model = engines["qwen3", "shared"]
    request = embedded(SearchRequest((1, 2, 3), 4, 4), model)
    assert request.prompt_embeds is not None
    coarse = replace(request, prompt_embeds=request.prompt_embeds.bfloat16())
    fine = replace(request, prompt_embeds=coarse.prompt_embeds.float())
    first, second = engine.search([coarse, fine], catalog[0]).results
    assert first == second


def test_embeddings_at_fault_fail_alone(engines: Any, catalog: Any) -> None:
    engine, model = engines["qwen3", "shared"]
    good = embedded(SearchRequest((1, 2, 3), 4, 4), model)
    poisoned = torch.full((2, 32), float("nan"))
    bad = [
        replace(good, prompt_embeds=torch.ones(2, 31)),
        replace(good, prompt_embeds=torch.ones(500, 32)),
        replace(good, prompt_embeds=poisoned),
    ]
    *faults, answer = engine.search([*bad, good], catalog[0]).results
    assert [type(fault) for fault in faults] == [EngineFault] * 3
    assert "hidden size 31; the model's is 32" in faults[0].message
    assert "prompt has 500 tokens; the model takes 126" in faults[1].message
    assert "NaN" in faults[2].message
    assert len(answer.hits) == 4


@pytest.mark.parametrize(
    ("prompt", "embeds", "message"),
    [
        ((1,), torch.ones(1, 4), "both given"),
        ((), torch.ones(0, 4), "prompt is empty"),
        ((), torch.ones(4), r"shape \(4,\)"),
        ((), torch.ones(1, 4, dtype=torch.long), "int64"),
        ((), None, "prompt is empty"),
    ],
)
def test_a_request_is_ids_or_embeddings(
    prompt: tuple[int, ...], embeds: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SearchRequest(prompt, 1, 1, prompt_embeds=embeds)
