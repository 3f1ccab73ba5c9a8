"""What the engine answers; the only engine module that the rest of the service reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest, SearchResult


@dataclass(frozen=True, slots=True)
class EngineFault:
    """One request failed inside a batch whose other requests are fine.

    Attributes:
        message: what went wrong, for the log; never shown to a caller.
    """

    message: str


class EngineBrokenError(RuntimeError):
    """The device cannot be used any more: no request will ever be answered.

    Whoever runs the engine lets it end, so that the process is found dead and is replaced.
    """


# Memory that was too small, on the host or a device: it says nothing of what it was wanted for, and
# may be there the next time.
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """Answers in the order of the requests, and where the time went.

    Attributes:
        results: one per request.
        prefill_s: seconds spent on the prompts of the whole batch.
        decode_s: seconds spent on all its beam steps and on reading the result back.
        cached_tokens: tokens of each prompt that an earlier one had computed already; empty for
            none.
    """

    results: tuple[SearchResult | EngineFault, ...]
    prefill_s: float
    decode_s: float
    cached_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """What has become of the prompts that could have been cached.

    Attributes:
        queried_tokens: tokens of prompts looked up since the start.
        hit_tokens: those among them that were cached.
        evictions: pages given to other prompts since the start.
        pages: of the pool.
        pages_used: those that hold something.
        page_tokens: tokens in a page.
    """

    queried_tokens: int
    hit_tokens: int
    evictions: int
    pages: int
    pages_used: int
    page_tokens: int


# Whether nobody waits any more for the answer to the request at this place of the batch.
HasLeft = Callable[[int], bool]


def nobody_left(row: int) -> bool:
    """Every caller waits."""
    return False


class RunningBatch(Protocol):
    """A batch that an engine has begun."""

    def wait_for_prompts(self) -> None:
        """Wait until its prompts are computed and the rest is under way; raises nothing."""
        ...

    def finish(self) -> BatchOutcome:
        """Its answers; waits for them, and raises what :meth:`SearchEngine.run` does."""
        ...


class SearchEngine(Protocol):
    """A loaded model that searches a catalog.

    ``run``, ``begin`` and ``search`` are used by one thread at a time, which is the one that
    finishes what it began; ``prepare`` may be called by another one meanwhile.
    """

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt it takes; the generated positions are already set aside."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, rows of the input embeddings."""
        ...

    @property
    def hidden_size(self) -> int:
        """H of the input embeddings that a prompt may be given as."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's weights, as they were loaded."""
        ...

    @property
    def prefix_cache(self) -> PrefixCacheStats | None:
        """What is kept of earlier prompts; None where nothing is. Any thread may read it."""
        ...

    @property
    def modules(self) -> Set[object]:
        """What the model is made of, to see whether it has left memory; weakly held."""
        ...

    def get_ready(self, trie: CatalogTrie) -> None:
        """Make what a catalog needs that is going to be searched, so that no batch has to wait.

        On any thread, one at a time, while another one runs batches of another catalog. Searching
        a catalog without is allowed and right, but its first batch may take seconds. For the one
        that is searched already, whatever memory was too small for until now.

        Raises:
            ValueError: the catalog does not fit the model.
        """
        ...

    def let_go(self, trie: CatalogTrie) -> None:
        """Drop what was made for a catalog that is not going to be searched after all.

        On any thread, none of which makes a catalog ready at that time.
        """
        ...

    def prepare(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> Any:
        """All that can be done for a batch before its turn: checked, padded, copied.

        The requests share ``trie``; they may differ in everything else.

        Raises:
            EngineBrokenError: the device does not work any more.
        """
        ...

    def run(self, prepared: Any, has_left: HasLeft = nobody_left) -> BatchOutcome:
        """Answer a batch that this engine prepared.

        Requests whose caller leaves are dropped at the next level where that is possible; their
        result is any.
        """
        ...

    def begin(self, prepared: Any, has_left: HasLeft = nobody_left) -> RunningBatch | None:
        """Start a batch without waiting for it, so that another may be begun behind it.

        Arguments as of :meth:`run`. None, with nothing done, where an engine cannot, or where
        beginning would take about as long as running.
        """
        ...

    def search(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> BatchOutcome:
        """Prepare and run."""
        ...
