"""A catalog numbers items by (leaf, prior descending, tie-break) and loses none."""

from __future__ import annotations

import itertools
import random

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.catalog.build import build_catalog

FINGERPRINT = "0" * 64


def build(ids, codes, codebook_size, prior=None, **options):
    return build_catalog(
        ids,
        torch.tensor(codes),
        codebook_size=codebook_size,
        tokenizer_fingerprint=FINGERPRINT,
        prior=None if prior is None else torch.tensor(prior),
        **options,
    )


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_order_and_reachability(data, catalog_inputs, obvious_order):
    ids, codes, codebook_size, prior = data.draw(catalog_inputs)
    catalog = build(ids, codes, codebook_size, prior)
    order = obvious_order(ids, codes, prior)
    assert catalog.item_ids.to_list() == [ids[row] for row in order]
    everything = torch.arange(len(ids))
    assert catalog.codes_of(everything).tolist() == [codes[row] for row in order]
    if prior is not None:
        assert catalog.prior.tolist() == [prior[row] for row in order]

    reached = []
    for leaf in range(catalog.trie.num_leaves):
        items = catalog.items_of_leaf(leaf)
        assert len(items) >= 1
        assert len({tuple(code) for code in catalog.codes_of(list(items)).tolist()}) == 1
        reached += list(items)
    assert reached == everything.tolist()
    leaves = catalog.trie.find_leaves(catalog.codes_of(everything))
    assert all(i in catalog.items_of_leaf(int(leaf)) for i, leaf in enumerate(leaves))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 99))
def test_the_order_of_the_input_does_not_matter(data, seed, catalog_inputs):
    ids, codes, codebook_size, prior = data.draw(catalog_inputs)
    rows = list(range(len(ids)))
    random.Random(seed).shuffle(rows)
    one = build(ids, codes, codebook_size, prior)
    other = build(
        [ids[r] for r in rows],
        [codes[r] for r in rows],
        codebook_size,
        None if prior is None else [prior[r] for r in rows],
    )
    assert one.item_ids.to_list() == other.item_ids.to_list()
    assert torch.equal(one.trie.codes, other.trie.codes)


def test_the_tie_break_does_not_follow_the_ids():
    ids = [f"B{i:03d}" for i in range(200)]
    ranked = build(ids, [[0]] * 200, 4).item_ids.to_list()
    assert sorted(ranked) == ids
    ascending = sum(a < b for a, b in itertools.pairwise(ranked))
    assert 70 < ascending < 130  # of 199 neighbours, about half


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_an_extra_level_tells_all_items_apart(data, catalog_inputs, obvious_order):
    ids, codes, codebook_size, prior = data.draw(catalog_inputs)
    order = obvious_order(ids, codes, prior)
    groups = {}
    for row in order:
        groups.setdefault(tuple(codes[row]), []).append(row)
    if max(map(len, groups.values())) > codebook_size:
        with pytest.raises(ValueError, match="Use the collision policy 'share'"):
            build(ids, codes, codebook_size, prior, collision_policy="extra_level")
        return
    catalog = build(ids, codes, codebook_size, prior, collision_policy="extra_level")
    assert catalog.num_levels == len(codes[0]) + 1
    assert catalog.trie.num_leaves == len(ids)
    expected = [[*codes[row], rank] for rows in groups.values() for rank, row in enumerate(rows)]
    assert catalog.codes_of(torch.arange(len(ids))).tolist() == expected
    assert catalog.item_ids.to_list() == [ids[row] for row in order]


def test_too_many_colliding_items_are_named():
    ids = [f"item-{i}" for i in range(300)] + ["alone"]
    codes = [[1, 0]] * 300 + [[0, 0]]
    with pytest.raises(ValueError) as caught:
        build(ids, codes, 2, collision_policy="extra_level")
    message = str(caught.value)
    assert "300 items share semantic ID (1, 0)" in message
    assert "codebook_size 2" in message
    assert message.count("item-") == 5


def test_metadata_and_sets_follow_their_items():
    ids = ["a", "b", "c", "d"]
    catalog = build(
        ids,
        [[3], [1], [2], [0]],
        4,
        metadata=pl.DataFrame({"title": ["A", "B", "C", None], "tags": [["x"], [], ["y"], None]}),
        constraint_sets={"vowels": ["a"], "all": ["d", "a", "c", "b", "a"], "none": []},
    )
    assert catalog.item_ids.to_list() == ["d", "b", "c", "a"]
    assert catalog.metadata_of(3) == {"title": "A", "tags": ["x"]}
    assert catalog.metadata_of(0) == {"title": None, "tags": None}
    sets = {name: items.tolist() for name, items in catalog.constraint_sets.items()}
    assert sets == {"vowels": [3], "all": [0, 1, 2, 3], "none": []}


def test_numpy_codes_and_columns_are_taken():
    catalog = build_catalog(
        pl.Series(["a", "b"]),
        np.array([[65_535], [0]], dtype=np.uint16),
        codebook_size=65_536,
        tokenizer_fingerprint=FINGERPRINT,
        prior=pl.Series([1, 2]),
    )
    assert catalog.codes_of([0, 1]).tolist() == [[0], [65_535]]
    assert catalog.prior.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": []}, "there are no item ids"),
        ({"ids": ["a", ""]}, "item id of row 1 is empty"),
        ({"ids": pl.Series(["a", None])}, "item id of row 1 is missing"),
        ({"ids": ["a", 5]}, "item id of row 1 is 5; expected a string"),
        ({"ids": ["a", None]}, "item id of row 1 is None; expected a string"),
        ({"ids": ["a", "\ud800"]}, "not valid Unicode"),
        ({"ids": pl.Series([1, 2])}, "item ids have type Int64"),
        ({"ids": ["a", "a"]}, "1 item ids occur more than once, among them 'a'"),
        ({"ids": ["a"]}, "2 rows of codes, but 1 item ids"),
        ({"codes": [[0], [4]]}, "code of row 1, level 0 is 4; allowed are 0 to 3"),
        ({"codes": [[-1], [0]]}, "code of row 0, level 0 is -1"),
        ({"codes": [[0.0], [1.0]]}, "codes have type torch.float32; expected integers"),
        ({"codes": [0, 1]}, r"shape \(2,\); expected \(N, L\)"),
        ({"codebook_size": 0}, "codebook_size is 0; allowed are 1 to 65536"),
        ({"codebook_size": 65_537}, "codebook_size is 65537"),
        ({"prior": [0.0, float("nan")]}, "prior of row 1 is nan; it must be finite"),
        ({"prior": [float("inf"), 1.0]}, "prior of row 0 is inf"),
        ({"prior": [1.0]}, r"prior has shape \(1,\); expected \(2,\)"),
        ({"collision_policy": "drop"}, "collision policy is 'drop'; allowed are 'share', 'extra"),
        ({"constraint_sets": {"s": ["a", "x", "y"]}}, "set 's' has 2 item ids .* 'x', 'y'"),
        ({"constraint_sets": {"": ["a"]}}, "constraint set name is ''"),
        ({"constraint_sets": {"__metadata__": ["a"]}}, "reserved"),
        ({"constraint_sets": {"a\nb": ["a"]}}, "printable"),
        ({"metadata": pl.DataFrame({"x": [1]})}, "metadata has 1 rows, but there are 2"),
        ({"metadata": pl.DataFrame({"prior": [1, 2]})}, "metadata column is called 'prior'"),
        ({"metadata": pl.DataFrame({"x": [b"1", b"2"]})}, "type Binary, which JSON does not"),
        ({"metadata": pl.DataFrame({"x": [[b"1"], [b"2"]]})}, "JSON does not have"),
        ({"metadata": pl.DataFrame({"x": [2**100, 1]}, {"x": pl.Int128})}, "type Int128, which"),
    ],
)
def test_bad_input_is_refused_by_name(changes, message: str):
    values = {"ids": ["a", "b"], "codes": [[0], [1]], "codebook_size": 4, **changes}
    with pytest.raises(ValueError, match=message):
        build(**values)


def test_an_empty_fingerprint_is_refused():
    with pytest.raises(ValueError, match="belongs to a tokenizer"):
        build_catalog(["a"], torch.tensor([[0]]), codebook_size=1, tokenizer_fingerprint="")
