"""The cache against dictionaries of whole prefixes, through random interleavings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.prefix_cache import Lease, OutOfPagesError, PrefixCache

PAGE = 16


class Reference:
    """Pages by the whole prefix they end, as tuples; recency by a counter."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, ...], int] = {}
        self.used: dict[tuple[int, ...], int] = {}

    def cached_tokens(self, prompt: tuple[int, ...]) -> int:
        length = 0
        while length + PAGE < len(prompt) and prompt[: length + PAGE] in self.found:
            length += PAGE
        return length


class CacheMachine(RuleBasedStateMachine):
    """Prompts over two tokens share prefixes often; eleven pages are soon too few."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: PrefixCache
        self.reference = Reference()
        self.open: list[tuple[Lease, tuple[int, ...]]] = []
        self.committed: set[int] = set()
        self.distrusted = False
        # What the pages hold: the prefix that ends with them, as a real pool would hold its keys.
        self.contents: dict[int, tuple[int, ...]] = {}

    @initialize(num_pages=st.integers(1, 11))
    def make(self, num_pages: int) -> None:
        self.cache = PrefixCache(num_pages, PAGE)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def get_ready(self, data: st.DataObject) -> None:
        lease, _ = data.draw(st.sampled_from(self.open))
        self.cache.get_ready(lease)

    @rule(
        blocks=st.lists(st.integers(0, 1), max_size=5),
        tail=st.integers(1, PAGE),
        whole=st.booleans(),
    )
    def acquire(self, blocks: list[int], tail: int, whole: bool) -> None:
        prompt = tuple(token for block in blocks for token in [block] * PAGE) + (7,) * tail
        self._forget_evicted()
        expected = self.reference.cached_tokens(prompt)
        before = self._snapshot()
        needed = -(-len(prompt) // PAGE) - expected // PAGE
        kept = {self.reference.found[prompt[:end]] for end in range(PAGE, expected + 1, PAGE)}
        available = self.cache.num_pages - len(self._leased_pages() | kept)
        if whole and needed > available:
            with pytest.raises(OutOfPagesError) as error:
                self.cache.acquire(prompt)
            assert (error.value.needed, error.value.available) == (needed, available)
            assert error.value.ever == (-(-len(prompt) // PAGE) <= self.cache.num_pages)
            assert self._snapshot() == before
            return
        lease = self.cache.acquire(prompt, whole=whole)
        assert lease.cached_tokens == expected
        assert lease.cached_tokens < len(prompt)
        assert len(lease.pages) == expected // PAGE + min(needed, available)
        for place, page in enumerate(lease.pages):
            prefix = prompt[: (place + 1) * PAGE]
            if place < expected // PAGE:
                assert self.contents[page] == prefix
            else:
                assert page not in self._leased_pages(), "a new page is in use by another lease"
                self.contents[page] = prefix
        self.open.append((lease, prompt))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease, prompt = data.draw(st.sampled_from(self.open))
        self.cache.commit(lease)
        self.committed.add(id(lease))
        for place, page in enumerate(lease.pages):
            prefix = prompt[: (place + 1) * PAGE]
            if len(prefix) == (place + 1) * PAGE:
                self.reference.found.setdefault(prefix, page)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        lease, prompt = data.draw(st.sampled_from(self.open))
        self.cache.distrust(lease)
        self.distrusted = True
        for end in range(PAGE, lease.cached_tokens + 1, PAGE):
            if self.reference.found.get(prompt[:end]) == lease.pages[end // PAGE - 1]:
                del self.reference.found[prompt[:end]]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.open) - 1))
        lease, _ = self.open.pop(place)
        self.cache.release(lease)
        with pytest.raises(ValueError, match="released before"):
            self.cache.release(lease)
        for late in (self.cache.commit, self.cache.distrust):
            with pytest.raises(ValueError, match="was released"):
                late(lease)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self._forget_evicted()

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        free, idle = set(cache._free), set(cache._idle)
        leased = self._leased_pages()
        assert len(free) == len(cache._free)
        assert not free & idle
        assert not free & leased
        assert free | idle | leased == set(range(cache.num_pages))
        assert set(cache._references) == {page for one, _ in self.open for page in one._shared}
        assert set(cache._digest_of.keys()) - idle <= set(cache._references)
        assert idle <= cache._digest_of.keys()
        assert cache.available_pages == len(free) + len(idle)
        assert cache.cached_pages == len(cache._digest_of) <= cache.num_pages

    @invariant()
    def a_prefix_outlives_its_continuations(self) -> None:
        if not hasattr(self, "cache") or self.distrusted:
            return
        self._forget_evicted()
        for prefix in self.reference.found:
            assert len(prefix) == PAGE or prefix[:-PAGE] in self.reference.found

    def _leased_pages(self) -> set[int]:
        pages = {page for lease, _ in self.open for page in lease.pages}
        return pages | {page for lease, _ in self.open for page in lease._shared}

    def _forget_evicted(self) -> None:
        """The reference does not know what to evict; it learns which pages are findable still."""
        for prefix, page in list(self.reference.found.items()):
            if page not in self.cache._digest_of or self.contents[page] != prefix:
                del self.reference.found[prefix]

    def _snapshot(self) -> tuple[object, ...]:
        cache = self.cache
        return (
            list(cache._free),
            list(cache._idle),
            dict(cache._page_of),
            dict(cache._references),
            cache.counts.evictions,
        )


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def run(cache: PrefixCache, prompt: Sequence[int]) -> int:
    """One request from lease to release; how much of it was cached."""
    lease = cache.acquire(prompt)
    cache.commit(lease)
    cache.release(lease)
    return lease.cached_tokens


def test_a_growing_history_pays_for_what_is_new() -> None:
    cache = PrefixCache(100, PAGE)
    history = list(range(400))
    assert run(cache, history[:100]) == 0
    assert run(cache, history[:104]) == 96
    assert run(cache, history[:130]) == 96
    assert run(cache, history[:400]) == 128
    assert (cache.counts.queried_tokens, cache.counts.hit_tokens) == (734, 320)


def test_the_last_position_is_always_computed() -> None:
    cache = PrefixCache(10, PAGE)
    prompt = list(range(32))
    run(cache, prompt)
    assert run(cache, prompt) == 16
    assert run(cache, [*prompt, 0]) == 32


def test_least_recently_used_goes_first() -> None:
    cache = PrefixCache(4, PAGE)
    a, b, c = ([user] * 20 for user in range(3))  # two pages each, one of them full
    run(cache, a)
    run(cache, b)
    assert run(cache, a) == 16
    run(cache, c)
    assert cache.free_pages == 1
    held = cache.acquire([9] * 33)  # three pages: one free, then the oldest two
    assert cache.counts.evictions == 2
    cache.release(held)
    assert run(cache, c) == 16
    assert run(cache, b) == 0


def test_pages_in_use_are_not_evicted() -> None:
    cache = PrefixCache(3, PAGE)
    run(cache, [1] * 20)
    holder = cache.acquire([1] * 20)
    with pytest.raises(OutOfPagesError, match=r"needs 2 pages .* 1 are available") as error:
        cache.acquire([2] * 20)
    assert error.value.ever
    cache.release(holder)
    assert run(cache, [2] * 20) == 0


def test_a_prompt_larger_than_the_pool_is_told_apart() -> None:
    cache = PrefixCache(2, PAGE)
    with pytest.raises(OutOfPagesError) as error:
        cache.acquire([1] * 33)
    assert not error.value.ever
    lease = cache.acquire([1] * 33, whole=False)
    assert len(lease.pages) == 2
    cache.commit(lease)
    cache.release(lease)
    again = cache.acquire([1] * 33, whole=False)
    assert again.cached_tokens == 32


def test_without_commit_nothing_is_found() -> None:
    cache = PrefixCache(4, PAGE)
    lease = cache.acquire([1] * 40)
    cache.release(lease)
    assert cache.free_pages == 4
    assert run(cache, [1] * 40) == 0


def test_a_prefix_computed_twice_side_by_side_is_kept_once() -> None:
    cache = PrefixCache(8, PAGE)
    first, second = cache.acquire([1] * 33), cache.acquire([1] * 40)
    for lease in (first, second):
        cache.commit(lease)
    for lease in (first, second):
        cache.release(lease)
    assert cache.cached_pages == 2
    assert cache.free_pages == 6


def test_off_means_pages_without_memory() -> None:
    cache = PrefixCache(4, PAGE, enabled=False)
    assert run(cache, [1] * 40) == 0
    assert run(cache, [1] * 40) == 0
    assert cache.free_pages == 4
    assert cache.counts.queried_tokens == 0


def test_private_pages_are_never_found() -> None:
    cache = PrefixCache(4, PAGE)
    lease = cache.acquire_private(40)
    assert (len(lease.pages), lease.cached_tokens) == (3, 0)
    cache.commit(lease)
    cache.release(lease)
    assert cache.cached_pages == 0
    assert cache.free_pages == 4


def digests_of(cache: PrefixCache, prompt: list[int]) -> list[bytes]:
    lease = cache.acquire(prompt)
    cache.get_ready(lease)
    cache.release(lease)
    return list(lease._digests)


def test_a_new_prompt_is_hashed_as_far_as_it_is_looked_up_and_on_when_there_is_time() -> None:
    cache = PrefixCache(16, PAGE)
    prompt = list(range(100))
    lease = cache.acquire(prompt)
    assert len(lease._digests) == 1  # nobody has sent its first page: no other can be there
    cache.get_ready(lease)
    assert len(lease._digests) == 6
    cache.get_ready(lease)
    assert lease._digests == digests_of(PrefixCache(16, PAGE), prompt)
    cache.commit(lease)
    assert cache.acquire(prompt).cached_tokens == 96


def test_a_prompt_may_change_once_its_pages_are_taken() -> None:
    cache = PrefixCache(16, PAGE)
    prompt = np.arange(40)
    lease = cache.acquire(prompt)
    prompt[:] = 0
    cache.commit(lease)
    assert cache.acquire(np.arange(40)).cached_tokens == 32


def test_models_have_prefixes_of_their_own() -> None:
    one, other = (PrefixCache(4, PAGE, model_version=version) for version in ("a", "b"))
    assert set(digests_of(one, [1] * 40)).isdisjoint(digests_of(other, [1] * 40))


def test_digests_depend_on_all_that_went_before() -> None:
    cache = PrefixCache(4, PAGE)
    assert digests_of(cache, [0] * 32)[1] != digests_of(cache, [1] * 16 + [0] * 16)[1]
    assert digests_of(cache, [0] * 32) == digests_of(cache, [0] * 40)[:2]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="page_size is 20"):
        PrefixCache(4, 20)
    with pytest.raises(ValueError, match="num_pages is 0"):
        PrefixCache(0, 16)
    with pytest.raises(ValueError, match="the prompt is empty"):
        PrefixCache(1, 16).acquire([])


def test_an_array_of_token_ids_is_the_same_prompt() -> None:
    cache = PrefixCache(8, 16)
    ids = list(range(40))
    lease = cache.acquire(ids)
    cache.commit(lease)
    cache.release(lease)
    again = cache.acquire(np.arange(40, dtype=np.int64))
    assert again.cached_tokens == 32
    cache.release(again)
    assert cache.acquire(np.arange(1, 41, dtype=np.int64)).cached_tokens == 0
