"""Equal rows are counted as equal, and only those."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rectokens.catalog.identical_rows import IdenticalRows


@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_as_counting_tuples(dim: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randint(-2, 3, (200, dim), generator=generator).to(dtype).float()
    identical = IdenticalRows()
    for batch in rows.split(33):
        identical.update(batch)
    counts = Counter(map(tuple, rows.tolist()))
    shared = sum(n for n in counts.values() if n > 1)
    assert identical.report() == {
        "collision_rate_floor": shared / 200,
        "duplicates_rate_floor": (200 - len(counts)) / 200,
    }


def test_many_distinct_rows_of_half_precision():
    rows = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)).half().float()
    identical = IdenticalRows()
    identical.update(rows)
    assert identical.report()["collision_rate_floor"] == 0.0


def test_signs_of_zero_do_not_matter():
    identical = IdenticalRows()
    identical.update(torch.tensor([[0.0, 1.0], [-0.0, 1.0]]))
    assert identical.report()["collision_rate_floor"] == 1.0


def test_nothing_seen():
    assert IdenticalRows().report()["collision_rate_floor"] == 0.0
