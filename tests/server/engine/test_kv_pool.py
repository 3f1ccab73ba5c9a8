"""What is written into pages is read from them, layer by layer, and no page touches another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kv_pool import KVPool, LayerShape, page_bytes, pages_for

CPU = torch.device("cpu")
SHAPES = {0: LayerShape(2, 4, 4), 3: LayerShape(1, 8, 6)}


def make_pool(num_pages: int = 7, page_size: int = 16) -> KVPool:
    return KVPool(SHAPES, num_pages=num_pages, page_size=page_size, device=CPU, dtype=torch.float32)


@settings(deadline=None)
@given(st.permutations(range(7)), st.integers(0, 7), st.integers(0, 7), st.sampled_from([16, 48]))
def test_pages_hold_what_was_written(
    order: list[int], first: int, second: int, page_size: int
) -> None:
    pool = make_pool(page_size=page_size)
    low, high = sorted((first, second))
    generator = torch.Generator().manual_seed(0)
    written = {}
    for layer, shape in SHAPES.items():
        for pages in (order[:low], order[low:high]):
            length = len(pages) * page_size
            keys = torch.randn(shape.kv_heads, length, shape.key_dim, generator=generator)
            values = torch.randn(shape.kv_heads, length, shape.value_dim, generator=generator)
            pool.write(layer, torch.tensor(pages, dtype=torch.long), keys, values)
            written[layer, tuple(pages)] = keys, values
    for (layer, pages), (keys, values) in written.items():
        found = pool.read(layer, torch.tensor(pages, dtype=torch.long))
        torch.testing.assert_close(found[0], keys, rtol=0, atol=0)
        torch.testing.assert_close(found[1], values, rtol=0, atol=0)


def test_position_t_is_at_its_page_and_offset() -> None:
    pool = make_pool()
    keys = torch.arange(2 * 32 * 4.0).view(2, 32, 4)
    pool.write(0, torch.tensor([5, 2]), keys, keys)
    for t in range(32):
        page = [5, 2][t // 16]
        torch.testing.assert_close(pool.keys[0][page, :, t % 16], keys[:, t])


def test_the_budget_is_used_and_kept() -> None:
    page = page_bytes(SHAPES, 16, torch.float16)
    assert page == 16 * 2 * (2 * 8 + 14)
    pool = KVPool.within(
        SHAPES, budget_bytes=5 * page + 1, page_size=16, device=CPU, dtype=torch.float16
    )
    assert pool.num_pages == 5
    assert pool.num_bytes == 5 * page
    assert pool.num_bytes == sum(
        tensor.nbytes for side in (pool.keys, pool.values) for tensor in side.values()
    )


def test_a_budget_below_one_page_is_refused() -> None:
    with pytest.raises(ValueError, match=r"100 bytes .* hold no page: .* takes 1920 bytes"):
        KVPool.within(SHAPES, budget_bytes=100, page_size=16, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("page_size", [0, -16, 8, 24])
def test_a_page_size_that_is_no_multiple_of_16_is_refused(page_size: int) -> None:
    with pytest.raises(ValueError, match=rf"page_size is {page_size}; .* multiple of 16"):
        make_pool(page_size=page_size)


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages is 0; it must be at least 1"):
        make_pool(num_pages=0)
    with pytest.raises(ValueError, match="no attention layers"):
        KVPool({}, num_pages=1, page_size=16, device=CPU, dtype=torch.float32)


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pages of 16 tokens take \d+ bytes .* cpu does not have"):
        make_pool(num_pages=1 << 45)


def test_pages_for_rounds_up() -> None:
    assert [pages_for(tokens, 16) for tokens in (1, 15, 16, 17, 32, 33)] == [1, 1, 1, 2, 2, 3]
