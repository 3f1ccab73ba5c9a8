"""Collision figures are those of the definition, counted the slow way."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rectokens.catalog.collisions import collision_report


@given(
    st.integers(1, 4).flatmap(
        lambda levels: st.lists(
            st.lists(st.integers(0, 2), min_size=levels, max_size=levels), min_size=1, max_size=60
        )
    )
)
def test_report_is_the_definition(codes):
    counts = Counter(map(tuple, codes))
    report = collision_report(torch.tensor(codes))
    assert report == {
        "num_items": len(codes),
        "num_semantic_ids": len(counts),
        "collision_rate": sum(counts[tuple(c)] > 1 for c in codes) / len(codes),
        "duplicates_rate": (len(codes) - len(counts)) / len(codes),
        "largest_group": max(counts.values()),
    }


def test_large_codes_and_narrow_types():
    codes = torch.tensor([[65_535] * 8, [65_535] * 8, [65_534] + [65_535] * 7], dtype=torch.int32)
    assert collision_report(codes)["num_semantic_ids"] == 2


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (1, 2, 3)])
def test_shapes_without_meaning(shape):
    with pytest.raises(ValueError, match="expected"):
        collision_report(torch.zeros(shape, dtype=torch.long))


def test_negative_codes():
    with pytest.raises(ValueError, match="go down to -1"):
        collision_report(torch.tensor([[0, -1]]))
