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
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rectokens.catalog.catalog import Catalog
from rectokens.prompts.parts import BuiltPrompt, TextPart
from rectokens.schemas.search import Normalization, SearchRequest, SearchResult
from server.batching.batcher import Batcher
from server.batching.interfaces import Answer
from server.errors import ErrorKind, ServiceError, invalid
from server.prompts import embeds_of, history_prompt, tokens_prompt, unknown_items
from server.release import Release

T = TypeVar("T")

# A query with at most this much in it is prepared on the event loop: that takes a millisecond at
# most, and the engine has one thread less to share the interpreter with.
_QUICK_IDS = 256
_QUICK_CHARS = 2_000
# Metadata is looked up row by row.
_QUICK_ROWS = 64
# Seeds the server draws stay exact in a client's float64.
_DRAWN_SEED_BITS = 53
_NO_TOKENS = BuiltPrompt((), items_used=0, items_truncated=0)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A whole prompt as token ids, start token at its end."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EmbedsPrompt:
    """A whole prompt as input embeddings, still as a stranger sent them.

    Attributes:
        data: see ``rectokens.prompt_embeds``.
        max_tokens: most tokens it may hold.
        max_bytes: most bytes it may have, after base64.
    """

    data: str
    max_tokens: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class RecommendQuery:
    """What a caller wants, defaults filled in and limits checked.

    Attributes:
        parts: the history, oldest first, items by the caller's ids; empty for the model's start
            prompt.
        parts_param: name of the request field it came from, for error messages.
        top_k: items wanted, at most ``beam_width``.
        beam_width: W.
        temperature: 0 is beam search.
        seed: of the sample; None lets the server draw one.
        exclude_history: keep the known items of ``parts`` out of the answer.
        exclude_items: item ids to keep out.
        allow_items: only these item ids are returned; None for no such list.
        constraint_sets: names; only items in all of them are returned. Empty for no constraint.
        normalization: see ``SearchRequest``.
        with_metadata: tell each item's metadata.
        with_level_scores: tell each item's score by level.
        deadline_s: monotonic time after which the answer is not wanted.
        prompt: the whole prompt, ready; instead of ``parts``, which are then empty.
        refuse_unknown_items: an item of ``parts`` that the catalog does not know is an error.
        cut_long_prompt: leave the oldest items out where the prompt is longer than the model
            takes; False makes that an error.
    """

    parts: tuple[str | TextPart, ...]
    parts_param: str
    top_k: int
    beam_width: int
    temperature: float
    seed: int | None
    exclude_history: bool
    exclude_items: tuple[str, ...]
    constraint_sets: tuple[str, ...]
    normalization: Normalization
    with_metadata: bool
    with_level_scores: bool
    deadline_s: float
    prompt: TokenPrompt | EmbedsPrompt | None = None
    refuse_unknown_items: bool = False
    allow_items: tuple[str, ...] | None = None
    cut_long_prompt: bool = True

    @property
    def item_ids(self) -> Sequence[str]:
        """The items of the history, oldest first."""
        if TextPart not in set(map(type, self.parts)):
            return cast("tuple[str, ...]", self.parts)
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def is_quick(self) -> bool:
        """Whether turning it into a prompt takes a millisecond at most."""
        return (
            not isinstance(self.prompt, EmbedsPrompt)
            # The first use of an intersection counts through the whole catalog.
            and len(self.constraint_sets) == 0
            and len(self.parts) + len(self.exclude_items) + len(self.allow_items or ())
            <= _QUICK_IDS
            and sum(len(p.text) for p in self.parts if isinstance(p, TextPart)) <= _QUICK_CHARS
        )


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
    history = catalog.index_of(query.item_ids)
    is_known = history >= 0
    known = history[is_known]
    unknown = unknown_items(query, is_known, catalog)
    embeds = None
    if isinstance(query.prompt, EmbedsPrompt):
        prompt, embeds = _NO_TOKENS, embeds_of(query.prompt, query.parts_param, release)
    elif query.prompt is not None:
        prompt = tokens_prompt(query.prompt, query.parts_param, release)
    else:
        prompt = history_prompt(query, is_known, catalog.codes_of(known), release)
    excluded = [known] if query.exclude_history else []
    if query.exclude_items:
        indices = catalog.index_of(query.exclude_items)
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


def _sorted_unique(indices: Sequence[Tensor]) -> Tensor | None:
    """One sorted tensor without repeats, None where there is nothing."""
    if not indices:
        return None
    merged = torch.cat(list(indices)).unique(sorted=True)
    return merged if merged.numel() else None
