"""What the batcher runs on, reports to and answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from server.engine.types import SearchEngine

if TYPE_CHECKING:
    from rectokens.schemas.catalog_trie import CatalogTrie
    from rectokens.schemas.search import SearchResult


class Searchable(Protocol):
    """What a batch is run on: one release, told from others by identity."""

    @property
    def engine(self) -> SearchEngine:
        """The model."""
        ...

    @property
    def trie(self) -> CatalogTrie:
        """The catalog's trie, on the engine's device."""
        ...


class BatchObserver(Protocol):
    """Hears of every batch; called on the engine thread, so it must be thread-safe."""

    def batch_started(self, requests: int, beam_rows: int, queue_s: Sequence[float]) -> None:
        """A batch begins; ``queue_s`` is how long each of its requests waited, in seconds."""
        ...

    def batch_finished(self, prefill_s: float, decode_s: float) -> None:
        """A forward pass came back."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's result, where its time went, in seconds, and how much was known already."""

    result: SearchResult
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0
