"""The serving trie against prefixes enumerated the slow way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rectokens.schemas.catalog_trie import CatalogTrie, lexicographic_order

SIZES = [1, 2, 5, 200, 65536]


@st.composite
def code_tables(draw: st.DrawFn) -> tuple[Tensor, int]:
    size = draw(st.sampled_from(SIZES))
    levels = draw(st.integers(1, 6))
    # Few distinct codes, so that prefixes and whole rows collide; the largest one among them.
    code = st.sampled_from(sorted({0, size // 2, size - 1, draw(st.integers(0, size - 1))}))
    rows = draw(st.lists(st.lists(code, min_size=levels, max_size=levels), min_size=1, max_size=30))
    return torch.tensor(rows), size


@settings(deadline=None, max_examples=150)
@given(table=code_tables())
def test_structure_equals_enumerated_prefixes(table: tuple[Tensor, int]) -> None:
    codes, size = table
    trie, order = CatalogTrie.from_codes(codes, size)
    rows = [tuple(row) for row in codes.tolist()]
    ranked = sorted(range(len(rows)), key=lambda i: rows[i])  # stable, as promised
    assert order.tolist() == ranked

    levels = codes.shape[1]
    items = [rows[i] for i in ranked]
    prefixes = sorted(
        {item[:d] for item in items for d in range(levels + 1)}, key=lambda p: (len(p), p)
    )
    node = {prefix: i for i, prefix in enumerate(prefixes)}
    assert trie.num_levels == levels
    assert trie.num_items == len(items)
    assert trie.num_leaves == len(set(items))
    assert trie.level_offsets[-1] == len(prefixes)
    for prefix in prefixes:
        at = torch.tensor([node[prefix]])
        below = [i for i, item in enumerate(items) if item[: len(prefix)] == prefix]
        lo, hi = trie.item_range(at, len(prefix))
        assert (lo.item(), hi.item()) == (below[0], below[-1] + 1)
        if len(prefix) == levels:
            continue
        start, end = trie.row_ptrs[at.item()], trie.row_ptrs[at.item() + 1]
        edges = torch.arange(int(start), int(end))
        children = sorted(p for p in prefixes if len(p) == len(prefix) + 1 and p[:-1] == prefix)
        assert trie.edge_codes(edges).tolist() == [child[-1] for child in children]
        assert (edges + 1).tolist() == [node[child] for child in children]
        assert len(children) <= trie.max_children[len(prefix)]

    leaves = torch.arange(trie.num_leaves)
    assert [tuple(row) for row in trie.leaf_codes(leaves).tolist()] == sorted(set(items))
    assert trie.find_leaves(trie.leaf_codes(leaves)).tolist() == leaves.tolist()


@settings(deadline=None, max_examples=100)
@given(table=code_tables(), data=st.data())
def test_find_leaves_knows_what_is_not_there(
    table: tuple[Tensor, int], data: st.DataObject
) -> None:
    codes, size = table
    trie, _ = CatalogTrie.from_codes(codes, size)
    known = sorted({tuple(row) for row in codes.tolist()})
    probe = data.draw(
        st.lists(
            st.lists(
                st.integers(0, size - 1), min_size=codes.shape[1], max_size=codes.shape[1]
            ).map(tuple),
            min_size=1,
            max_size=20,
        )
    )
    expected = [known.index(row) if row in known else -1 for row in probe]
    assert trie.find_leaves(torch.tensor(probe)).tolist() == expected


def test_keys_cannot_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 65536, (500, 9), generator=generator)
    codes[250:] = codes[:250]
    codes[250:, -1] = torch.randint(0, 65536, (250,), generator=generator)
    order = lexicographic_order(codes, 65536)
    rows = codes.tolist()
    assert order.tolist() == sorted(range(500), key=lambda i: rows[i])


def test_bytes_per_item_of_a_large_sparse_catalog() -> None:
    codes = torch.randint(0, 8192, (50_000, 4), generator=torch.Generator().manual_seed(1))
    trie, _ = CatalogTrie.from_codes(codes, 8192)
    assert trie.nbytes / 50_000 <= 24


@pytest.mark.parametrize(
    ("codes", "size", "message"),
    [
        (torch.zeros(0, 3, dtype=torch.long), 4, "no rows"),
        (torch.zeros(3, dtype=torch.long), 4, r"shape \(3,\)"),
        (torch.tensor([[0, 4]]), 4, "span 0 to 4; allowed are 0 to 3"),
        (torch.tensor([[-1, 0]]), 4, "span -1 to 0"),
        (torch.tensor([[0]]), 65537, "codebook_size is 65537; allowed are 1 to 65536"),
    ],
)
def test_bad_codes_are_named(codes: Tensor, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CatalogTrie.from_codes(codes, size)


def test_find_leaves_wants_whole_semantic_ids() -> None:
    trie, _ = CatalogTrie.from_codes(torch.tensor([[0, 1]]), 2)
    with pytest.raises(ValueError, match=r"expected \(n, 2\)"):
        trie.find_leaves(torch.tensor([[0]]))
