"""Copies of prefix sums: one a source, bounded, gone with the source."""

from __future__ import annotations

import gc

import torch

from rectokens.decoding.device_prefixes import DevicePrefixes

# A device that holds no data tells copies from sources as a GPU would.
META = torch.device("meta")


def prefix(items: int = 9) -> torch.Tensor:
    return torch.zeros(items + 1, dtype=torch.int32)


def test_a_prefix_on_the_device_is_used_as_it_is() -> None:
    mine = prefix()
    assert DevicePrefixes(torch.device("cpu"))(mine) is mine


def test_one_copy_however_often_it_is_asked_for() -> None:
    copies, mine, other = DevicePrefixes(META), prefix(), prefix()
    first = copies(mine)
    assert first.device == META
    assert copies(other) is not first
    assert copies(mine) is first
    assert copies.num_bytes == 80


def test_the_least_recently_used_goes_first() -> None:
    copies = DevicePrefixes(META, max_bytes=80)
    a, b, c = prefix(), prefix(), prefix()
    kept, dropped = copies(a), copies(b)
    copies(a)
    copies(c)
    assert len(copies) == 2
    assert copies(a) is kept
    assert copies(b) is not dropped


def test_one_that_is_over_the_bound_by_itself_is_kept_alone() -> None:
    copies = DevicePrefixes(META, max_bytes=10)
    small, large = prefix(), prefix(100)
    copies(small)
    found = copies(large)
    assert copies(large) is found
    assert len(copies) == 1


def test_a_copy_goes_with_its_source() -> None:
    copies = DevicePrefixes(META)
    mine, gone = prefix(), prefix()
    copies(gone)
    copies(mine)
    assert len(copies) == 2
    del gone
    gc.collect()
    copies(mine)
    assert len(copies) == 1
