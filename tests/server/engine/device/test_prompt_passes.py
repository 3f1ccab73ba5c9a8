"""How the rows of prompts are shared out among passes of fixed sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.device.prompt_passes import DEFAULT_ROWS, is_long, share_out
from server.engine.device.prompt_rows import Capacity, PromptBlock, PromptSlice
from server.engine.kv_pool import KVPool, LayerShape


def prompt(rows: int, start: int = 0) -> PromptSlice:
    tokens = np.arange(start, start + rows, dtype=np.int32)
    return PromptSlice(tokens, start, np.zeros(1, dtype=np.int32), is_end=True)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=12),
    st.lists(st.integers(1, 70), min_size=1, max_size=5, unique=True).map(sorted),
    st.integers(1, 4),
)
def test_every_row_is_computed_once_and_in_order(
    prompts: list[tuple[int, int]], sizes: list[int], max_prompts: int
) -> None:
    passes = share_out([prompt(rows, start) for rows, start in prompts], sizes, max_prompts)
    for rows, part in passes:
        assert rows in sizes
        assert 0 < sum(piece.count for piece in part) <= rows
        assert len(part) <= max_prompts
    pieces = [piece for _, part in passes for piece in part]
    for rows, start in prompts:
        at = start
        while at < start + rows:
            piece = pieces.pop(0)
            assert piece.start == at
            assert piece.tokens.tolist() == list(range(at, piece.end))
            assert piece.is_end == (piece.end == start + rows)
            at = piece.end
    assert pieces == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [64]),
        (64, [64]),
        (1_000, [1_024]),
        (4_097, [4_608]),
        (5_000, [5_120]),
        (7_000, [7_168]),
        (8_000, [8_192]),
        (33_000, [8_192, 8_192, 8_192, 8_192, 256]),
    ],
)
def test_little_is_filled_up(rows: int, expected: list[int]) -> None:
    passes = share_out([prompt(rows)], DEFAULT_ROWS, 32)
    assert [size for size, _ in passes] == expected


@pytest.mark.parametrize(
    ("prompts", "long_from", "expected"),
    [
        ([(100, 0), (40, 2008)], 2048, True),  # cached positions are read too
        ([(2047, 0), (2047, 0)], 2048, False),
        ([(9_000, 0)], None, False),
        ([], 2048, False),
    ],
)
def test_one_long_prompt_makes_a_long_pass(
    prompts: list[tuple[int, int]], long_from: int | None, expected: bool
) -> None:
    assert is_long([prompt(rows, start) for rows, start in prompts], long_from) is expected


def test_the_length_is_told_where_all_rows_are_wanted() -> None:
    shapes = {0: LayerShape(kv_heads=1, key_dim=8, value_dim=8)}
    pool = KVPool(
        shapes, num_pages=1, page_size=16, device=torch.device("cpu"), dtype=torch.float32
    )
    made = PromptBlock(Capacity(64, 2, 1, 16, longest=3000), pool).forward_pass
    assert made.prompts.longest == 3000
    assert made.last.longest == 0
