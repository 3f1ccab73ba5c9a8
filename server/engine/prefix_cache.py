"""Which pages hold which prompt prefixes: found by hash, shared, evicted least recently used.

A full page is known by a digest of its parent's digest and its own token ids, so a digest stands
for everything from the first token to the end of the page. Prompts that begin alike share pages
as far as whole pages agree. Pure bookkeeping over page numbers; the keys and values themselves
lie in a :class:`server.engine.kv_pool.KVPool`.

Life of a page::

    free -> leased, private -> (commit) leased, findable -> (release) idle, findable -> (evict) free
                           \\-> (release without commit) free

A findable page that a request failed with is not findable any more, and free once nobody reads it.

Digests are BLAKE2b of 256 bits: two prefixes with one digest are not found by chance, nor by a
stranger who tries.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from server.engine.kv_pool import check_page_size, pages_for
from server.engine.types import PrefixCacheStats

_DIGEST_BYTES = 32
_TOKEN_BYTES = array("q").itemsize

TokenIds = Sequence[int] | NDArray[np.int64]


def _bytes_of(token_ids: TokenIds) -> bytes:
    if isinstance(token_ids, np.ndarray):
        return token_ids.tobytes()
    return array("q", token_ids).tobytes()


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
    # Digests of the first full pages, as far as they were looked up; the rest is made of these
    # bytes, when it is wanted.
    _digests: list[bytes] = field(default_factory=list)
    _token_bytes: bytes = b""
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
        if not self.enabled:
            return self._lease(len(token_ids), [], whole)
        token_bytes = _bytes_of(token_ids)
        most = max(len(token_ids) - 1, 0) // self.page_size
        found: list[int] = []
        digests: list[bytes] = []
        for digest in islice(self._digests(token_bytes), most):
            digests.append(digest)
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        lease = self._lease(len(token_ids), found, whole)
        lease._digests, lease._token_bytes = digests, token_bytes
        self.counts.queried_tokens += lease.num_tokens
        self.counts.hit_tokens += lease.cached_tokens
        return lease

    def acquire_private(self, num_tokens: int, *, whole: bool = True) -> Lease:
        """Pages for a prompt that is neither looked up nor remembered (input embeddings).

        Raises:
            As :meth:`acquire`.
        """
        return self._lease(num_tokens, [], whole)

    def get_ready(self, lease: Lease) -> None:
        """Do what :meth:`commit` will need and what nobody waits for while a prompt is computed.

        Of a long prompt that nobody has sent before, that is most of its digests.
        """
        lease._digests += self._digests(lease._token_bytes, lease._digests)
        lease._token_bytes = b""

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
        if lease._token_bytes:
            self.get_ready(lease)
        first = lease.cached_tokens // self.page_size
        digests, pages = lease._digests[first:], lease.pages[first:]
        if self._page_of.keys().isdisjoint(digests):
            self._commit_new(lease, dict(zip(digests, pages, strict=False)))
            return
        found = set()
        for digest, page in zip(digests, pages, strict=False):
            # Another prompt may have been first. Its page counts as used by this one as well, or
            # it could be evicted before its continuations.
            known = self._page_of.setdefault(digest, page)
            if known == page:
                self._digest_of[page] = digest
                found.add(page)
            self._share(known, lease)
        lease._private = [page for page in lease._private if page not in found]

    def _commit_new(self, lease: Lease, new: dict[bytes, int]) -> None:
        """What ``commit`` does where nobody was first, in a few calls: pages may be thousands."""
        pages = list(new.values())
        self._page_of.update(new)
        self._digest_of.update(zip(pages, new, strict=True))
        self._references.update(dict.fromkeys(pages, 1))
        lease._shared += pages
        # A lease's private pages are its last ones, in order.
        lease._private = lease._private[len(pages) :]

    def distrust(self, lease: Lease) -> None:
        """Let nobody find what a prompt took from the cache: with it, its request went wrong.

        What is used is never evicted, so a page that was spoilt would fail whoever begins with it
        for as long as they come. Pages that are sound are committed by the next one.

        Raises:
            ValueError: the lease was given back.
        """
        if lease._released:
            raise ValueError("the lease was released; its pages may hold another prompt by now")
        for page in lease.pages[: lease.cached_tokens // self.page_size]:
            digest = self._digest_of.pop(page, None)
            if digest is not None:
                del self._page_of[digest]

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
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        self._free += reversed(lease._private)

    def clear(self) -> None:
        """Forget everything that no lease uses."""
        for page in list(self._idle):
            self._forget(page)

    def _digests(self, token_bytes: bytes, known: Sequence[bytes] = ()) -> Iterator[bytes]:
        """Digests of the full pages of a prompt, in order.

        Args:
            token_bytes: its token ids.
            known: digests of its first pages, which are left out.
        """
        step = self.page_size * _TOKEN_BYTES
        digest = known[-1] if known else self._root
        for start in range(len(known) * step, len(token_bytes) - step + 1, step):
            state = hashlib.blake2b(digest, digest_size=_DIGEST_BYTES)
            state.update(token_bytes[start : start + step])
            digest = state.digest()
            yield digest

    def _lease(self, num_tokens: int, found: list[int], whole: bool) -> Lease:
        if num_tokens < 1:
            raise ValueError("the prompt is empty; it needs at least one token")
        total = pages_for(num_tokens, self.page_size)
        needed = total - len(found)
        available = self.available_pages - sum(page in self._idle for page in found)
        if needed > available:
            if whole:
                raise OutOfPagesError(needed, available, ever=total <= self.num_pages)
            needed = available
        lease = Lease((), num_tokens, len(found) * self.page_size)
        for page in found:
            self._share(page, lease)
        lease._private = self._take(needed)
        lease.pages = (*found, *lease._private)
        return lease

    def _share(self, page: int, lease: Lease) -> None:
        self._references[page] = self._references.get(page, 0) + 1
        self._idle.pop(page, None)
        lease._shared.append(page)

    def _take(self, count: int) -> list[int]:
        """So many pages that hold nothing; others are forgotten for them."""
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
            self.counts.evictions += 1
        left = len(self._free) - count
        taken = self._free[left:]
        del self._free[left:]
        taken.reverse()
        return taken

    def _forget(self, page: int) -> None:
        del self._idle[page]
        del self._page_of[self._digest_of.pop(page)]
        self._free.append(page)
