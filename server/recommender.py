"""From a query in item ids to a catalog search and back to item ids.

The bridge between HTTP, which knows no tensors, and the engine, which knows no HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.catalog.catalog import Catalog
from rectokens.prompts.parts import BuiltPrompt
from rectokens.schemas.search import SearchRequest, SearchResult
from server.batching.batcher import Batcher
from server.batching.interfaces import Answer
from server.errors import ErrorKind, ServiceError, invalid
from server.prompts import embeds_of, history_prompt, tokens_prompt, unknown_items
from server.queries import EmbedsPrompt, RecommendQuery
from server.release import Release

T = TypeVar("T")

# Metadata is looked up row by row.
_QUICK_ROWS = 64
# Seeds the server draws stay exact in a client's float64.
_DRAWN_SEED_BITS = 53
_NO_TOKENS = BuiltPrompt((), items_used=0, items_truncated=0)


@dataclass(frozen=True, slots=True)
class PreparedSearch:
    """A query ready for the engine, and what the answer must tell about it."""

    search: SearchRequest
    prompt: BuiltPrompt
    unknown_items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One recommended item; see ``SearchHit`` for the figures."""

    item_id: str
    score: float
    semantic_id: tuple[int, ...]
    level_scores: tuple[float, ...]
    metadata: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer to a query, and where its time went."""

    release: Release
    items: tuple[Item, ...]
    prepared: PreparedSearch
    answer: Answer


class Recommender:
    """Answers queries through a batcher.

    Args:
        batcher: where searches queue.
        prepare_threads: threads for queries and answers that take long to turn into a prompt or
            out of item indices, so that the event loop stays free.
        max_embeds: most prompts given as embeddings that are held at once. Beam rows do not
            bound their memory.
    """

    def __init__(self, batcher: Batcher, prepare_threads: int, max_embeds: int) -> None:
        self._batcher = batcher
        self._max_embeds = max_embeds
        self._embeds_held = 0
        self._pool = ThreadPoolExecutor(prepare_threads, thread_name_prefix="prepare")

    async def recommend(self, query: RecommendQuery, release: Release) -> Recommendation:
        """Answer a query from one release.

        The place in the queue is taken before any work is done, so an overloaded service
        refuses in microseconds.

        Raises:
            ServiceError: a value the release does not take, or no answer from the batcher.
        """
        with (
            self._hold_embeds(query),
            self._batcher.admit(query.beam_width, query.deadline_s) as place,
        ):
            prepared = await self._call(query.is_quick, prepare, query, release)
            answer = await self._batcher.run(place, release, prepared.search)
        quick = not query.with_metadata or len(answer.result.hits) <= _QUICK_ROWS
        items = await self._call(quick, present, answer.result, query, release.catalog)
        return Recommendation(release, items, prepared, answer)

    @contextmanager
    def _hold_embeds(self, query: RecommendQuery) -> Iterator[None]:
        if not isinstance(query.prompt, EmbedsPrompt):
            yield
            return
        if self._embeds_held >= self._max_embeds:
            raise ServiceError(
                ErrorKind.OVERLOADED,
                f"{self._embeds_held} prompts given as embeddings are waiting or running; "
                f"at most {self._max_embeds}",
                param=query.parts_param,
                retry_after_s=1.0,
            )
        self._embeds_held += 1
        try:
            yield
        finally:
            self._embeds_held -= 1

    async def _call(self, quick: bool, function: Callable[..., T], *args: Any) -> T:
        """The function's result, on the event loop only if that is quick."""
        if quick:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """Let go of the threads; queries not begun are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def prepare(query: RecommendQuery, release: Release) -> PreparedSearch:
    """Item ids to codes, codes to a prompt, filters to item indices.

    Raises:
        ServiceError: no item of the history is known and there is no text, an unknown
            constraint set, text for a model that takes none, a prompt that is too long, or
            token ids or embeddings that are not acceptable.
    """
    catalog = release.catalog
    # Arrays: what is done to a few hundred numbers takes torch several times as long.
    history = catalog.find(query.item_ids)
    is_known = history >= 0
    known = history if is_known.all() else history[is_known]
    unknown = unknown_items(query, is_known, catalog)
    embeds = None
    if isinstance(query.prompt, EmbedsPrompt):
        prompt, embeds = _NO_TOKENS, embeds_of(query.prompt, query.parts_param, release)
    elif query.prompt is not None:
        prompt = tokens_prompt(query.prompt, query.parts_param, release)
    else:
        prompt = history_prompt(query, is_known, catalog.code_rows(known), release)
    excluded = [known] if query.exclude_history else []
    if query.exclude_items:
        indices = catalog.find(query.exclude_items)
        excluded.append(indices[indices >= 0])
    search = SearchRequest(
        prompt=prompt.token_ids,
        beam_width=query.beam_width,
        top_k=query.top_k,
        temperature=query.temperature,
        seed=secrets.randbits(_DRAWN_SEED_BITS) if query.seed is None else query.seed,
        normalization=query.normalization,
        excluded_items=_sorted_unique(excluded),
        allowed_prefix=_allowed_prefix(query.constraint_sets, catalog),
        allowed_items=_allowed_items(query.allow_items, catalog),
        prompt_embeds=embeds,
    )
    return PreparedSearch(search, prompt, unknown)


def present(result: SearchResult, query: RecommendQuery, catalog: Catalog) -> tuple[Item, ...]:
    """Search hits as items of the catalog, in the order of the hits."""
    item_ids = catalog.ids_of([hit.item_index for hit in result.hits])
    return tuple(
        Item(
            item_id=item_id,
            score=hit.score,
            semantic_id=hit.semantic_id,
            level_scores=hit.level_scores,
            metadata=catalog.metadata_of(hit.item_index) if query.with_metadata else None,
        )
        for hit, item_id in zip(result.hits, item_ids, strict=True)
    )


def _allowed_prefix(names: Sequence[str], catalog: Catalog) -> Tensor | None:
    unknown = [name for name in names if name not in catalog.constraint_sets]
    if unknown:
        known = ", ".join(sorted(catalog.constraint_sets)) or "none"
        raise invalid(
            "constraint_set",
            f"constraint_set {unknown[0]!r} is not in catalog {catalog.version}; known: {known}",
        )
    return catalog.allowed_prefix(names)


def _allowed_items(item_ids: Sequence[str] | None, catalog: Catalog) -> Tensor | None:
    """Indices of an allow-list, sorted, without repeats and without unknown ids."""
    if item_ids is None:
        return None
    indices = catalog.index_of(item_ids)
    allowed: Tensor = indices[indices >= 0].unique(sorted=True)
    return allowed


def _sorted_unique(indices: Sequence[NDArray[np.int64]]) -> Tensor | None:
    """One sorted tensor without repeats, None where there is nothing."""
    if not indices:
        return None
    merged = np.sort(np.concatenate(indices))
    if not merged.size:
        return None
    first = np.empty(merged.size, dtype=np.bool_)
    first[0] = True
    np.not_equal(merged[1:], merged[:-1], out=first[1:])
    return torch.from_numpy(merged[first])
