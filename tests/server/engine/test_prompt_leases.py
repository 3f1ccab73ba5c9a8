"""A batch takes its pages together or not at all, and gives back every one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.prefix_cache import OutOfPagesError, PrefixCache
from server.engine.prompt_leases import PromptLeases, split_by_pages

CPU = torch.device("cpu")


def test_what_a_runner_needs_to_know() -> None:
    cache = PrefixCache(20, 16)
    history = list(range(50))
    first = PromptLeases(cache, [history], whole=True)
    first.commit([True])
    first.close()
    embeds = torch.zeros(18, 4)
    leases = PromptLeases(cache, [history[:40], [5] * 3, embeds], whole=True)
    assert leases.cached_tokens == [32, 0, 0]
    suffixes = leases.suffixes([history[:40], [5] * 3, embeds])
    assert suffixes[:2] == [history[32:40], [5] * 3]
    assert suffixes[2].shape == (18, 4)
    table = leases.page_table(CPU, min_pages=4)
    assert table.dtype == torch.int32
    assert table.tolist() == [
        [*lease.pages, *[0] * (4 - len(lease.pages))] for lease in leases.leases
    ]
    assert leases.lengths(CPU).tolist() == [40, 3, 18]
    leases.close()
    leases.close()
    assert cache.available_pages == 20


def test_only_sound_prompts_are_remembered() -> None:
    cache = PrefixCache(20, 16)
    leases = PromptLeases(cache, [[1] * 20, [2] * 20, torch.zeros(20, 4)], whole=True)
    leases.commit([True, False, True])
    leases.close()
    again = PromptLeases(cache, [[1] * 20, [2] * 20], whole=True)
    assert again.cached_tokens == [16, 0]


def test_what_a_failed_request_had_of_the_cache_is_not_found_again() -> None:
    """It may be what it failed by: then whoever begins alike would fail until it is evicted."""
    cache = PrefixCache(20, 16)
    history = list(range(60))
    first = PromptLeases(cache, [history, [9] * 40], whole=True)
    first.commit([True, True])
    first.close()
    second = PromptLeases(cache, [history[:40], history[:20], [9] * 40], whole=True)
    assert second.cached_tokens == [32, 16, 32]
    other = PromptLeases(cache, [history], whole=True)
    # The caller of the last one left, which says nothing of it.
    second.commit([False, True, None])
    second.close()
    third = PromptLeases(cache, [history, [9] * 40], whole=True)
    assert third.cached_tokens == [0, 32]
    assert not set(third.leases[0].pages) & set(other.leases[0].pages)
    third.commit([True, True])
    for leases in (other, third):
        leases.close()
    assert cache.available_pages == 20
    assert PromptLeases(cache, [history], whole=True).cached_tokens == [48]


def test_a_batch_that_does_not_fit_holds_nothing() -> None:
    cache = PrefixCache(3, 16)
    with pytest.raises(OutOfPagesError):
        PromptLeases(cache, [[1] * 20, [2] * 20], whole=True)
    assert cache.free_pages == 3
    with pytest.raises(ValueError, match="empty"):
        PromptLeases(cache, [[1] * 20, []], whole=True)
    assert cache.free_pages == 3
    partly = PromptLeases(cache, [[1] * 20, [2] * 20, [3] * 20], whole=False)
    assert [len(lease.pages) for lease in partly.leases] == [2, 1, 0]


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=12), st.integers(1, 8))
def test_a_batch_is_split_into_runs_that_fit(lengths: list[int], num_pages: int) -> None:
    runs = split_by_pages(lengths, 16, num_pages)
    assert [index for run in runs for index in run] == list(range(len(lengths)))
    for run in runs:
        cache = PrefixCache(num_pages, 16)
        prompts = [[index] * lengths[index] for index in run]
        if len(run) == 1 and lengths[run[0]] > num_pages * 16:
            with pytest.raises(OutOfPagesError) as error:
                PromptLeases(cache, prompts, whole=True)
            assert not error.value.ever
        else:
            PromptLeases(cache, prompts, whole=True).close()
    sizes = [sum(-(-lengths[index] // 16) for index in run) for run in runs]
    for before, run in zip(sizes, runs[1:], strict=False):
        assert before + -(-lengths[run[0]] // 16) > num_pages, "cut although the next one fits"
