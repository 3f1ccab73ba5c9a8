"""Encoding in batches gives what encoding at once gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rectokens.catalog.encode import encode_source
from rectokens.catalog.identical_rows import IdenticalRows
from rectokens.catalog.sources import open_embeddings
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_codes_progress_and_identical_rows(tmp_path: Path, batch_size: int):
    rows = torch.randn(50, 5)
    rows[40:] = rows[:10]
    np.save(tmp_path / "e.npy", rows.numpy())
    tokenizer = RQKMeansTokenizer(2, 8, 5).fit_step(rows)
    done: list[int] = []
    identical = IdenticalRows()
    codes = encode_source(
        tokenizer,
        open_embeddings(tmp_path / "e.npy"),
        num_levels=2,
        batch_size=batch_size,
        on_rows=done.append,
        identical=identical,
    )
    assert torch.equal(codes.long(), tokenizer.encode(rows).codes)
    assert done == [*range(batch_size, 50, batch_size), 50]
    assert identical.report() == {"collision_rate_floor": 0.4, "duplicates_rate_floor": 0.2}
