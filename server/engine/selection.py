"""From the last level's beams to items: read back once, filled leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rectokens.decoding.beam_step import Beams
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchHit, SearchRequest, SearchResult, Shortfall
from server.engine.types import EngineFault


def collect_results(
    requests: Sequence[SearchRequest],
    trie: CatalogTrie,
    beams: Beams,
    codes: Tensor,
    code_scores: Tensor,
) -> tuple[SearchResult | EngineFault, ...]:
    """Items of every request, best leaf first, a leaf's items in catalog order.

    Args:
        requests: the B requests of the batch.
        trie: the catalog's trie.
        beams: beams at the leaves, (B, W).
        codes: int64 (B, W, L).
        code_scores: float32 (B, W, L).
    """
    alive = torch.isfinite(beams.scores)
    leaves = torch.where(alive, beams.nodes - trie.level_offsets[-2], 0)
    first = trie.leaf_item_ptrs[leaves]
    last = trie.leaf_item_ptrs[leaves + 1]
    host = [t.cpu() for t in (alive, beams.scores, first, last, codes, code_scores, beams.poisoned)]
    results: list[SearchResult | EngineFault] = []
    for row, request in enumerate(requests):
        if bool(host[-1][row]):
            results.append(EngineFault("the model returned NaN or infinite logits"))
            continue
        live, scores, lo, hi, ids, parts, _ = (tensor[row] for tensor in host)
        results.append(_fill(request, trie.num_items, live, scores, lo, hi, ids, parts))
    return tuple(results)


def _fill(
    request: SearchRequest,
    num_items: int,
    live: Tensor,
    scores: Tensor,
    first: Tensor,
    last: Tensor,
    codes: Tensor,
    code_scores: Tensor,
) -> SearchResult:
    width = min(int(live.sum()), request.top_k)  # every live leaf has at least one allowed item
    excluded = frozenset(() if request.excluded_items is None else request.excluded_items.tolist())
    prefix = request.allowed_prefix
    listed = request.allowed_items
    allowed = None if listed is None else frozenset(listed.tolist())
    hits: list[SearchHit] = []
    columns = (t[:width].tolist() for t in (scores, first, last, codes, code_scores))
    for score, lo, hi, semantic_id, level_scores in zip(*columns, strict=True):
        for item in range(lo, hi):
            if item in excluded or (prefix is not None and prefix[item + 1] == prefix[item]):
                continue
            if allowed is not None and item not in allowed:
                continue
            hits.append(SearchHit(item, tuple(semantic_id), score, tuple(level_scores)))
            if len(hits) == request.top_k:
                return SearchResult(tuple(hits))
    reason = "catalog_exhausted" if num_items < request.top_k else "filters"
    return SearchResult(tuple(hits), Shortfall(reason, len(hits)))  # type: ignore[arg-type]
