"""How often a model's constrained search finds the item that a sample answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.data.amazon import AmazonReviews
from examples.data.batch import PADDING
from examples.data.precomputed import PrecomputedSequenceDataset
from examples.evaluation.ranks import Searches
from examples.finetune.samples import begins_with_item
from rectokens.catalog.build import build_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest
from server.demo.baselines import figures_of_ranks
from server.demo.data import item_counts
from server.engine.engine import Engine
from server.engine.runners import PerBeamRunner


@dataclass(frozen=True, eq=False)
class ItemCatalog:
    """The items of a data set as a catalog.

    Attributes:
        catalog: of all items, in a leaf by training count.
        place: item index of each row of the data.
    """

    catalog: Catalog
    place: Tensor

    @classmethod
    def of(
        cls, reviews: AmazonReviews, codes: Tensor, codebook_size: int, fingerprint: str
    ) -> ItemCatalog:
        """From all items' semantic IDs, int64 (N, L)."""
        data = reviews.data
        catalog = build_catalog(
            data.item_ids,
            codes,
            codebook_size=codebook_size,
            tokenizer_fingerprint=fingerprint,
            prior=item_counts(reviews.leave_one_out.train, len(data.item_ids)).tolist(),
            metadata=data.metadata,
        )
        return cls(catalog, catalog.index_of(list(data.item_ids)))


def sample_searches(
    samples: PrecomputedSequenceDataset,
    items: ItemCatalog,
    start_token_id: int,
    *,
    beam_width: int,
    top_k: int,
    num_examples: int | None,
    seed: int,
    exclude_history: bool = False,
) -> Searches:
    """Searches for the items that samples answer with.

    Args:
        samples: a file with ``targets`` (and for ``exclude_history`` ``histories``); those whose
            answer does not begin with an item are left out.
        items: the catalog.
        start_token_id: of the model.
        beam_width, top_k: of the search.
        num_examples: a seeded sample of so many; None for all.
        seed: of that sample.
        exclude_history: whether the history's items are left out of the answers.

    Raises:
        ValueError: no sample is answered with an item, or the file does not say with which.
    """
    if "targets" not in samples.meta:
        raise ValueError("the samples do not say which items they answer with: no 'targets'")
    asked = list(begins_with_item(samples, start_token_id))
    if not asked:
        raise ValueError("none of the samples is answered with an item")
    if num_examples is not None and num_examples < len(asked):
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(len(asked), size=num_examples, replace=False))
        asked = [asked[int(place)] for place in chosen]
    targets = samples.meta["targets"]
    requests = []
    for at, answer in asked:
        excluded = None
        if exclude_history:
            history = samples.meta["histories"][at]
            excluded = items.place[history[history != PADDING]].unique()
        requests.append(
            SearchRequest(
                # The start token is asked for, so it ends the prompt.
                tuple(samples[at]["input_ids"][: answer + 1].tolist()),
                beam_width=beam_width,
                top_k=top_k,
                normalization="children",
                excluded_items=excluded if excluded is not None and len(excluded) else None,
            )
        )
    return Searches(requests, [int(items.place[int(targets[at])]) for at, _ in asked])


def recalls(ranks: Sequence[int | None], at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of ranks up to each k."""
    return {f"recall@{k}": figures_of_ranks(ranks, k).recall for k in at}


@torch.no_grad()
def search_in_training(
    model: Any, tokens: ItemTokens, searches: Searches, items: ItemCatalog, batch_size: int
) -> list[int | None]:
    """Ranks by a model that is being trained; nothing of it is changed.

    Args:
        model: the causal LM without wrapper; its mode is put back.
        tokens: its item tokens.
        searches: what to ask.
        items: the catalog.
        batch_size: searches together.
    """
    training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        engine: Any = Engine(model, tokens, PerBeamRunner(model, tokens))
        trie = items.catalog.trie.to(engine.device)
        return searches.ranks(engine, trie, batch_size=batch_size)
    finally:
        model.train(training)
        model.config.use_cache = use_cache
