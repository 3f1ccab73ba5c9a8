"""Looking things up in a catalog."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest
import torch

from rectokens.catalog.build import build_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.catalog.constraint_sets import PrefixCache, UnknownConstraintSetError

SETS = {"even": [0, 2, 4, 6, 8], "low": [0, 1, 2, 3, 4], "none": []}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    # One level, code = item: the item index is the number in the id.
    return build_catalog(
        [f"B{i}" for i in range(10)],
        torch.arange(10)[:, None],
        codebook_size=10,
        tokenizer_fingerprint="0" * 64,
        constraint_sets={name: [f"B{i}" for i in items] for name, items in SETS.items()},
    )


def test_ids_and_indices(catalog: Catalog):
    assert catalog.index_of(["B3", "unknown", "B0", ""]).tolist() == [3, -1, 0, -1]
    assert catalog.index_of([]).tolist() == []
    assert catalog.ids_of([9, 0]) == ["B9", "B0"]
    assert catalog.ids_of(torch.tensor([], dtype=torch.long)) == []
    assert catalog.codes_of([4]).tolist() == [[4]]
    assert (catalog.num_items, catalog.num_levels, catalog.codebook_size) == (10, 1, 10)
    assert catalog.metadata_of(3) is None


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_indices_out_of_range(catalog: Catalog, bad: int):
    for method in (catalog.ids_of, catalog.codes_of):
        with pytest.raises(IndexError, match=f"item index is {bad}; allowed are 0 to 9"):
            method([0, bad])
    with pytest.raises(IndexError, match="allowed are 0 to 9"):
        catalog.metadata_of(bad)
    with pytest.raises(IndexError, match="leaf is"):
        catalog.items_of_leaf(bad)


def test_prefix_sums_of_every_combination(catalog: Catalog):
    assert catalog.allowed_prefix([]) is None
    for count in range(1, len(SETS) + 1):
        for names in itertools.permutations(SETS, count):
            allowed = set.intersection(*(set(SETS[name]) for name in names))
            expected = [sum(i < end for i in allowed) for end in range(11)]
            prefix = catalog.allowed_prefix([*names, names[0]])
            assert prefix is not None
            assert prefix.dtype == torch.int32
            assert prefix.tolist() == expected


def test_the_same_sets_share_one_prefix(catalog: Catalog):
    first = catalog.allowed_prefix(["even", "low"])
    assert catalog.allowed_prefix(["low", "even"]) is first
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: catalog.allowed_prefix(["even"]), range(64)))
    assert all(prefix is found[0] for prefix in found)


def test_the_cache_is_bounded():
    cache = PrefixCache(max_bytes=3 * 4 * 11)
    sets = [torch.tensor([1])]
    first = cache.get(("a",), sets, 10)
    cache.get(("b",), sets, 10)
    cache.get(("c",), sets, 10)
    assert cache.get(("a",), sets, 10) is first  # now the latest
    second = cache.get(("b",), sets, 10)
    cache.get(("d",), sets, 10)  # drops c
    assert cache.get(("a",), sets, 10) is first
    assert cache.get(("b",), sets, 10) is second
    tiny = PrefixCache(max_bytes=1)
    assert tiny.get(("a",), sets, 10) is tiny.get(("a",), sets, 10)


def test_unknown_sets_name_the_known(catalog: Catalog):
    with pytest.raises(KeyError) as caught:
        catalog.allowed_prefix(["even", "odd"])
    assert isinstance(caught.value, UnknownConstraintSetError)
    assert str(caught.value) == ("constraint set is 'odd'; the catalog has 'even', 'low', 'none'")


def test_repeated_ids_never_make_a_catalog(catalog: Catalog):
    with pytest.raises(ValueError, match="occur more than once, among them 'B1'"):
        Catalog(
            version="x",
            tokenizer_fingerprint="0" * 64,
            collision_policy="share",
            trie=catalog.trie,
            item_ids=pl.Series(["B1", *[f"B{i}" for i in range(1, 10)]]),
            prior=None,
            metadata=None,
            constraint_sets={},
        )


def test_sets_that_another_was_asked_for_are_prepared(catalog: Catalog):
    successor = build_catalog(
        [f"C{i}" for i in range(10)],
        torch.arange(10)[:, None],
        codebook_size=10,
        tokenizer_fingerprint="0" * 64,
        constraint_sets={"even": ["C0"], "new": ["C1"]},
    )
    for names in (["low", "even"], ["even"]):
        catalog.allowed_prefix(names)
    successor.prepare_sets_of(catalog)
    assert successor._prefixes.names() == [("even",)]
    assert successor.allowed_prefix(["even"])[-1] == 1  # its own items
