"""Random tries for the decoding tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SHAPES = ("uniform", "skewed", "chains", "one item", "all children")


def _random_items(shape: str, vocab_size: int, num_levels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, high: int) -> Tensor:
        return torch.randint(high, (rows, num_levels), generator=generator)

    if shape == "uniform":
        items = draw(3 * vocab_size, vocab_size)
    elif shape == "skewed":
        # Most items below one first token, a few elsewhere.
        items = draw(3 * vocab_size, vocab_size)
        items[: 2 * vocab_size, 0] = vocab_size - 1
    elif shape == "chains":
        items = torch.arange(vocab_size).unsqueeze(1).repeat(1, num_levels)
    elif shape == "one item":
        items = draw(1, vocab_size)
    elif shape == "all children":
        items = torch.cartesian_prod(*[torch.arange(vocab_size)] * num_levels)
        items = items.reshape(-1, num_levels)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return items[torch.randperm(items.shape[0], generator=generator)]


@pytest.fixture(scope="session")
def random_items() -> Callable[[str, int, int, int], Tensor]:
    """``random_items(shape, vocab_size, num_levels, seed)``: (N, L), any order, with repeats."""
    return _random_items
