"""With the vocab rule the engine returns what Hugging Face's constrained beam search returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.loading import build_engine

LEVELS, CODES, VOCAB, PAD = 3, 6, 40, 0
TOKENS = ItemTokens(
    offset=12, level_stride=CODES, num_levels=LEVELS, codebook_size=CODES, start_token_id=3
)


def hf_beam_search(
    model: Any, prompts: list[list[int]], items: set[tuple[int, ...]], width: int
) -> list[list[tuple[tuple[int, ...], float]]]:
    """(semantic ID, score) of every returned sequence, by ``generate`` with a prefix function."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def allowed(_: int, generated: torch.Tensor) -> list[int]:
        prefix = TOKENS.decode(generated[longest:].tolist())
        depth = len(prefix)
        following = {item[depth] for item in items if item[:depth] == prefix}
        return [TOKENS.token_id(depth, code) for code in sorted(following)]

    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=LEVELS,
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=PAD,
        eos_token_id=None,
        early_stopping=False,
    )
    found = [TOKENS.decode(row[longest:].tolist()) for row in output.sequences]
    pairs = list(zip(found, output.sequences_scores.tolist(), strict=True))
    return [pairs[i : i + width] for i in range(0, len(pairs), width)]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("width", [2, 5, 20])
def test_same_items_and_scores(kind: str, width: int, tiny_lm: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, CODES, (60, LEVELS), generator=generator).unique(dim=0)
    assert len(codes) >= width
    items = {tuple(row) for row in codes.tolist()}
    prompts = [
        torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in (1, 4, 9, 15)
    ]
    expected = hf_beam_search(tiny_lm(kind, VOCAB, seed=7), prompts, items, width)

    engine = build_engine(tiny_lm(kind, VOCAB, seed=7), TOKENS)
    trie, _ = CatalogTrie.from_codes(codes, CODES)
    requests = [
        SearchRequest(tuple(prompt), width, width, normalization="vocab") for prompt in prompts
    ]
    for found, theirs in zip(engine.search(requests, trie).results, expected, strict=True):
        assert isinstance(found, SearchResult)
        assert [hit.semantic_id for hit in found.hits] == [sid for sid, _ in theirs]
        assert [hit.score for hit in found.hits] == pytest.approx(
            [score for _, score in theirs], abs=1e-4
        )
