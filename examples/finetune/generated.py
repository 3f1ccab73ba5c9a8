"""Answers of the library's constrained generation as items of a catalog."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.evaluation.ranks import Searches
from examples.finetune.chat_model import ChatModel
from rectokens.catalog.catalog import Catalog
from rectokens.decoding.constrained_decoding import autoregressive_generate
from rectokens.schemas.config import GenerationConfig


class Leaves:
    """Item indices by semantic ID, in the order of the catalog."""

    def __init__(self, catalog: Catalog) -> None:
        codes = catalog.codes_of(torch.arange(catalog.num_items))
        self._items: dict[tuple[int, ...], list[int]] = {}
        for item, one in enumerate(codes.tolist()):
            self._items.setdefault(tuple(one), []).append(item)

    def items(self, codes: Sequence[int]) -> list[int]:
        """Of a semantic ID; none where no item has it."""
        return self._items.get(tuple(codes), [])


def generate_codes(
    loaded: ChatModel, prompt: Sequence[int], beam_size: int, attr_path: str | None
) -> tuple[list[list[int]], list[float]]:
    """The best semantic IDs after a prompt that ends in the start token, and their scores.

    Raises:
        AttributeError, TypeError: there is no linear layer at ``attr_path``.
    """
    ids = torch.tensor([list(prompt)], device=loaded.model.device)
    config = GenerationConfig(
        steps=loaded.tokenizer.num_levels, k=beam_size, beam_size=beam_size, temperature=0.0
    )
    found: Tensor
    found, scores = autoregressive_generate(
        loaded.model, loaded.trie, ids, config, attr_path, return_scores=True
    )
    tokens = loaded.tokenizer.item_tokens
    rows = zip(found[0].tolist(), scores[0].tolist(), strict=True)
    kept = [(list(tokens.decode(row)), score) for row, score in rows if row[0] >= 0]
    return [codes for codes, _ in kept], [score for _, score in kept]


def generated_ranks(
    loaded: ChatModel, searches: Searches, attr_path: str | None
) -> list[int | None]:
    """Ranks as :meth:`~examples.evaluation.ranks.Searches.ranks` gives, by the library alone."""
    leaves = Leaves(loaded.items.catalog)
    ranks: list[int | None] = []
    for request, target in zip(searches.requests, searches.targets, strict=True):
        left_out = request.excluded_items
        excluded = set() if left_out is None else set(left_out.tolist())
        codes, _ = generate_codes(loaded, request.prompt, request.beam_width, attr_path)
        answer = [item for one in codes for item in leaves.items(one) if item not in excluded]
        answer = answer[: request.top_k]
        ranks.append(answer.index(target) + 1 if target in answer else None)
    return ranks
