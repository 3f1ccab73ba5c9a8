"""Users with their histories, or items alone, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -1


class SeqBatch(NamedTuple):
    """Users with their histories, or items alone; a row of it has no leading dimension.

    Attributes:
        user_ids: long (B,); -1 where there is no user.
        ids: long (B, T), item rows oldest first, -1 at padding; (B,) of items alone.
        ids_fut: long (B,), the item that came next; -1 where there is none.
        x: float32 (B, T, D), vectors of ``ids``, 0 at padding; (B, D) of items alone.
        x_fut: float32 (B, D), the vector of ``ids_fut``; 0 where there is none.
        seq_mask: bool, shape of ``ids``: where there is an item.
    """

    user_ids: Tensor
    ids: Tensor
    ids_fut: Tensor
    x: Tensor
    x_fut: Tensor
    seq_mask: Tensor


def padded(rows: Sequence[int], length: int) -> Tensor:
    """The newest ``length`` rows, padded at the end."""
    newest = list(rows[-length:])
    return torch.tensor(newest + [PADDING] * (length - len(newest)), dtype=torch.long)
