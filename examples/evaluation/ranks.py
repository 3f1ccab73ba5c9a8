"""Ranks of held-out items among an engine's answers, and the figures they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rectokens.catalog.catalog import Catalog
from rectokens.prompts.builder import PromptBuilder
from rectokens.prompts.parts import ItemPart
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import Normalization, SearchRequest, SearchResult
from server.demo.baselines import figures_of_ranks
from server.demo.data import HeldOut
from server.engine.types import SearchEngine

RECALL_AT = (1, 5, 10, 20)
NDCG_AT = (5, 10, 20)
LARGEST_K = 20


def figures(ranks: Sequence[int | None], largest: int = LARGEST_K) -> dict[str, float]:
    """``recall@1`` to ``recall@20`` and ``ndcg@5`` to ``ndcg@20``; rank None is not found.

    Args:
        ranks: from 1.
        largest: no k above this one.

    Raises:
        ValueError: no ranks.
    """
    at = {k: figures_of_ranks(ranks, k) for k in RECALL_AT if k <= largest}
    recalls = {f"recall@{k}": found.recall for k, found in at.items()}
    return {**recalls, **{f"ndcg@{k}": at[k].ndcg for k in NDCG_AT if k <= largest}}


class Searches:
    """Searches whose right answers are known, to be put to any engine.

    Every item of the catalog competes. Items that share a semantic ID follow one another in the
    catalog's order, so a target's rank counts those of its leaf that come before it.

    Args:
        requests: of one catalog.
        targets: the item index of each one's right answer.
    """

    def __init__(self, requests: Sequence[SearchRequest], targets: Sequence[int]) -> None:
        self.requests, self.targets = list(requests), list(targets)
        # Prompts of one length side by side need no padding.
        self._order = sorted(
            range(len(self.requests)), key=lambda at: self.requests[at].prompt_length
        )

    def ranks(
        self,
        engine: SearchEngine,
        trie: CatalogTrie,
        *,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> list[int | None]:
        """Rank of each target among the answers, from 1, None where it is missing.

        Args:
            engine: the model.
            trie: the catalog's, on the engine's device.
            batch_size: searches together.
            progress: called with the number of new answers.

        Raises:
            RuntimeError: the engine failed on a search.
        """
        ranks: list[int | None] = [None] * len(self.requests)
        for first in range(0, len(self._order), batch_size):
            batch = self._order[first : first + batch_size]
            outcome = engine.search([self.requests[at] for at in batch], trie)
            for at, result in zip(batch, outcome.results, strict=True):
                ranks[at] = _rank(result, self.targets[at])
            if progress is not None:
                progress(len(batch))
        return ranks


def held_out_searches(
    catalog: Catalog,
    prompts: PromptBuilder,
    item_ids: Sequence[str],
    questions: Sequence[HeldOut],
    *,
    exclude_history: bool,
    beam_width: int = 50,
    top_k: int = LARGEST_K,
    normalization: Normalization = "children",
    max_prompt_tokens: int | None = None,
) -> Searches:
    """Held-out questions as searches of a catalog.

    Args:
        catalog: that is searched.
        prompts: of the models that are asked.
        item_ids: ids of the rows that questions name.
        questions: histories and targets.
        exclude_history: whether the history's items are left out of the answers.
        beam_width, top_k, normalization: of the search.
        max_prompt_tokens: longest prompt of the engines.

    Raises:
        ValueError: an item that the catalog does not have.
    """
    index = catalog.index_of(list(item_ids))
    if bool((index < 0).any()):
        missing = item_ids[int((index < 0).nonzero()[0])]
        raise ValueError(f"the catalog has no item {missing!r}, which the data names")
    parts = [ItemPart(tuple(codes)) for codes in catalog.codes_of(index).tolist()]
    places = index.tolist()
    requests = []
    for question in questions:
        history = [parts[row] for row in question.history]
        excluded = sorted({places[row] for row in question.history}) if exclude_history else []
        requests.append(
            SearchRequest(
                prompts.build(history, max_tokens=max_prompt_tokens).token_ids,
                beam_width=beam_width,
                top_k=top_k,
                normalization=normalization,
                excluded_items=torch.tensor(excluded) if excluded else None,
            )
        )
    return Searches(requests, [places[question.target] for question in questions])


def _rank(result: Any, target: int) -> int | None:
    if not isinstance(result, SearchResult):
        raise RuntimeError(f"the engine failed on a question: {result.message}")
    found = [hit.item_index for hit in result.hits]
    return found.index(target) + 1 if target in found else None
