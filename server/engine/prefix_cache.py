"""Which pages hold which prompt prefixes: found by hash, shared, evicted least recently used.

A full page is known by a digest of its parent's digest and its own token ids, so a digest stands
for everything from the first token to the end of the page. Prompts that begin alike share pages
as far as whole pages agree. Pure bookkeeping over page numbers; the keys and values themselves
lie in a :class:`server.engine.kv_pool.KVPool`.

Life of a page::

    free -> leased, private -> (commit) leased, findable -> (release) idle, findable -> (evict) free
                           \\-> (release without commit) free

Digests are BLAKE2b of 256 bits: two prefixes with one digest are not found by chance, nor by a
stranger who tries.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from server.engine.kv_pool import check_page_size, pages_for
from server.engine.types import PrefixCacheStats

_DIGEST_BYTES = 32
_TOKEN_BYTES = array("q").itemsize

TokenIds = Sequence[int] | NDArray[np.int64]


class OutOfPagesError(RuntimeError):
    """A prompt needs more pages than can be had now.

    Attributes:
        needed: pages the prompt needs that are not cached.
        available: pages free or evictable.
        ever: whether the pool could hold the prompt if nothing else were in it.
    """

    def __init__(self, needed: int, available: int, *, ever: bool) -> None:
        super().__init__(
            f"the prompt needs {needed} pages of keys and values; {available} are available"
        )
        self.needed = needed
        self.available = available
        self.ever = ever


@dataclass(eq=False, slots=True)
class Lease:
    """Pages that a prompt may read and write until it gives them back.

    Attributes:
        pages: in order of position; ceil(num_tokens / page_size) of them, fewer for a lease
            that was taken with ``whole=False`` when pages were short. The first
            ``cached_tokens / page_size`` hold keys and values already and are shared: read
            only. The others are this prompt's own, to be filled.
        num_tokens: T of the prompt.
        cached_tokens: positions that need no computing; a multiple of page_size, less than
            ``num_tokens``.
    """

    pages: tuple[int, ...]
    num_tokens: int
    cached_tokens: int
    # Digests of the full pages; those of pages that were not leased included.
    _digests: tuple[bytes, ...] = ()
    _shared: list[int] = field(default_factory=list)  # pages this lease counts as a reference of
    _private: list[int] = field(default_factory=list)  # pages that go back to the free ones
    _committed: bool = False
    _released: bool = False


@dataclass(slots=True)
class CacheCounts:
    """Totals since the cache was made.

    Attributes:
        queried_tokens: tokens of all prompts that were looked up.
        hit_tokens: those among them that were cached.
        evictions: pages that made room for others.
    """

    queried_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0


class PrefixCache:
    """Hands out pages and remembers what is in them. Not thread-safe: one thread owns it.

    Args:
        num_pages: pages of the pool.
        page_size: positions in a page.
        enabled: False leases pages all the same, but finds and remembers nothing.
        model_version: of the model whose keys and values these are; part of every digest.

    Raises:
        ValueError: a page size that is no multiple of 16, or no pages.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, enabled: bool = True, model_version: str = ""
    ) -> None:
        check_page_size(page_size)
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self.enabled = enabled
        self.counts = CacheCounts()
        self._root = hashlib.blake2b(model_version.encode(), digest_size=_DIGEST_BYTES).digest()
        self._free = list(range(num_pages - 1, -1, -1))
        self._page_of: dict[bytes, int] = {}  # findable pages
        self._digest_of: dict[int, bytes] = {}  # the same, the other way round
        self._references: dict[int, int] = {}  # leases that share a findable page
        # Findable pages that no lease shares, least recently used first; a prefix is always
        # used at least as recently as its continuations, so those go first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def cached_pages(self) -> int:
        """Findable pages, shared ones included."""
        return len(self._page_of)

    @property
    def available_pages(self) -> int:
        """Pages that a lease could get: free ones, and idle ones by eviction."""
        return len(self._free) + len(self._idle)

    def stats(self) -> PrefixCacheStats:
        """Counts of now."""
        return PrefixCacheStats(
            queried_tokens=self.counts.queried_tokens,
            hit_tokens=self.counts.hit_tokens,
            evictions=self.counts.evictions,
            pages=self.num_pages,
            pages_used=self.num_pages - self.free_pages,
            page_tokens=self.page_size,
        )

    def acquire(self, token_ids: TokenIds, *, whole: bool = True) -> Lease:
        """Pages for a prompt, the longest cached prefix of it included.

        The last position is never taken from the cache: its output is what the prompt is run for.

        Args:
            token_ids: the prompt, (T,); an array of int64 is read several times as fast.
            whole: whether there must be pages for all of it. False takes as many as there are.

        Raises:
            OutOfPagesError: not enough pages even after eviction; nothing has changed then.
            ValueError: an empty prompt.
        """
        digests = self._digests(token_ids) if self.enabled else ()
        found: list[int] = []
        for digest in digests[: (len(token_ids) - 1) // self.page_size]:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        lease = self._lease(len(token_ids), found, digests, whole)
        if self.enabled:
            self.counts.queried_tokens += lease.num_tokens
            self.counts.hit_tokens += lease.cached_tokens
        return lease

    def acquire_private(self, num_tokens: int, *, whole: bool = True) -> Lease:
        """Pages for a prompt that is neither looked up nor remembered (input embeddings).

        Raises:
            As :meth:`acquire`.
        """
        return self._lease(num_tokens, [], (), whole)

    def commit(self, lease: Lease) -> None:
        """Let others find the full pages of a prompt, which now hold its keys and values.

        Only after the prompt was computed without fault. Committing again changes nothing.

        Raises:
            ValueError: the lease was given back.
        """
        if lease._released:
            raise ValueError("the lease was released; its pages may hold another prompt by now")
        if lease._committed:
            return
        lease._committed = True
        first = lease.cached_tokens // self.page_size
        found = set()
        for digest, page in list(zip(lease._digests, lease.pages, strict=False))[first:]:
            # Another prompt may have been first. Its page counts as used by this one as well, or
            # it could be evicted before its continuations.
            known = self._page_of.setdefault(digest, page)
            if known == page:
                self._digest_of[page] = digest
                found.add(page)
            self._share(known, lease)
        lease._private = [page for page in lease._private if page not in found]

    def release(self, lease: Lease) -> None:
        """Give the pages back: findable ones stay cached, the others become free.

        Raises:
            ValueError: the lease was given back before.
        """
        if lease._released:
            raise ValueError("the lease was released before")
        lease._released = True
        # Deepest first: of pages last used together, continuations are evicted before prefixes.
        for page in reversed(lease._shared):
            self._references[page] -= 1
            if self._references[page] == 0:
                del self._references[page]
                self._idle[page] = None
        self._free += reversed(lease._private)

    def clear(self) -> None:
        """Forget everything that no lease uses."""
        for page in list(self._idle):
            self._forget(page)

    def _digests(self, token_ids: TokenIds) -> tuple[bytes, ...]:
        if isinstance(token_ids, np.ndarray):
            raw = token_ids.data.cast("B")
        else:
            raw = memoryview(array("q", token_ids)).cast("B")
        step = self.page_size * _TOKEN_BYTES
        digest = self._root
        digests = []
        for start in range(0, len(raw) - step + 1, step):
            state = hashlib.blake2b(digest, digest_size=_DIGEST_BYTES)
            state.update(raw[start : start + step])
            digest = state.digest()
            digests.append(digest)
        return tuple(digests)

    def _lease(
        self, num_tokens: int, found: list[int], digests: tuple[bytes, ...], whole: bool
    ) -> Lease:
        if num_tokens < 1:
            raise ValueError("the prompt is empty; it needs at least one token")
        total = pages_for(num_tokens, self.page_size)
        needed = total - len(found)
        available = self.available_pages - sum(page in self._idle for page in found)
        if needed > available:
            if whole:
                raise OutOfPagesError(needed, available, ever=total <= self.num_pages)
            needed = available
        lease = Lease((), num_tokens, len(found) * self.page_size, digests)
        for page in found:
            self._share(page, lease)
        lease._private = [self._take() for _ in range(needed)]
        lease.pages = (*found, *lease._private)
        return lease

    def _share(self, page: int, lease: Lease) -> None:
        self._references[page] = self._references.get(page, 0) + 1
        self._idle.pop(page, None)
        lease._shared.append(page)

    def _take(self) -> int:
        if not self._free:
            self._forget(next(iter(self._idle)))
            self.counts.evictions += 1
        return self._free.pop()

    def _forget(self, page: int) -> None:
        del self._idle[page]
        del self._page_of[self._digest_of.pop(page)]
        self._free.append(page)
