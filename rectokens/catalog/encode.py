"""From a file of embeddings to codes, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rectokens.catalog.identical_rows import IdenticalRows
from rectokens.catalog.sources import EmbeddingSource
from rectokens.core.tokenizer import Tokenizer


def encode_source(
    tokenizer: Tokenizer,
    source: EmbeddingSource,
    *,
    num_levels: int,
    batch_size: int = 8192,
    on_rows: Callable[[int], None] | None = None,
    identical: IdenticalRows | None = None,
) -> Tensor:
    """Codes of all rows of a source; only a batch of embeddings is in memory at a time.

    Args:
        tokenizer: fitted.
        source: its rows must have the width the tokenizer takes.
        num_levels: L of the tokenizer.
        batch_size: rows at a time.
        on_rows: called after each batch with the number of rows done so far.
        identical: is shown every batch, to count rows that are equal.

    Returns:
        int32 (N, L), rows in the order of the source.

    Raises:
        ValueError: another width, NaN or infinite embeddings.
    """
    codes = torch.empty(source.num_rows, num_levels, dtype=torch.int32)
    start = 0
    for batch in source.batches(batch_size):
        codes[start : start + len(batch)] = tokenizer.encode(batch).codes.cpu()
        if identical is not None:
            identical.update(batch)
        start += len(batch)
        if on_rows is not None:
            on_rows(start)
    return codes
