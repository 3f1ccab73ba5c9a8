"""An updated catalog is the one that a full build of the new items gives."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.catalog.build import build_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.catalog.edit_sets import put_constraint_sets
from rectokens.catalog.predicates import Predicate, PredicateError
from rectokens.catalog.update import ItemUpserts, update_catalog

FINGERPRINT = "cd" * 32
SCHEMA = {"stock": pl.Int64, "region": pl.String}
IN_STOCK = Predicate("stock > 1 and region = 'EU'")


def rows_of(catalog: Catalog) -> list[tuple]:
    """Everything a catalog says of its items, in order."""
    index = torch.arange(catalog.num_items)
    prior = [None] * catalog.num_items if catalog.prior is None else catalog.prior.tolist()
    codes = catalog.codes_of(index).tolist()
    metadata = [catalog.metadata_of(i) for i in range(catalog.num_items)]
    return list(zip(catalog.item_ids.to_list(), codes, prior, metadata, strict=True))


def sets_of(catalog: Catalog) -> dict[str, list[str]]:
    return {name: catalog.ids_of(items) for name, items in catalog.constraint_sets.items()}


def build(items: dict[str, dict], shape: dict, members: list[str]) -> Catalog:
    """The slow way: everything from scratch."""
    ids = list(items)
    catalog = build_catalog(
        ids,
        torch.tensor([items[i]["codes"] for i in ids]),
        codebook_size=shape["codebook_size"],
        tokenizer_fingerprint=FINGERPRINT,
        collision_policy=shape["policy"],
        prior=[items[i]["prior"] for i in ids] if shape["prior"] else None,
        metadata=(
            pl.DataFrame([items[i]["metadata"] for i in ids], schema=SCHEMA)
            if shape["metadata"]
            else None
        ),
        constraint_sets={"listed": [i for i in members if i in items]},
    )
    return put_constraint_sets(catalog, {"rule": IN_STOCK}) if shape["metadata"] else catalog


@st.composite
def scenarios(draw):
    policy = draw(st.sampled_from(["share", "extra_level"]))
    shape = {
        "codebook_size": draw(st.integers(1, 4)) if policy == "share" else 40,
        "policy": policy,
        "prior": draw(st.booleans()),
        "metadata": draw(st.booleans()),
    }
    num_levels = draw(st.integers(1, 3))
    code = st.integers(0, min(shape["codebook_size"], 3) - 1)
    item = st.fixed_dictionaries(
        {
            "codes": st.lists(code, min_size=num_levels, max_size=num_levels),
            "prior": st.integers(0, 3).map(float),
            "metadata": st.fixed_dictionaries(
                {"stock": st.integers(0, 3) | st.none(), "region": st.sampled_from(["EU", "US"])}
            ),
        }
    )
    names = st.sampled_from([f"i{n}" for n in range(16)])
    items = draw(st.dictionaries(names, item, min_size=1, max_size=16))
    upserts = draw(st.dictionaries(names, item, max_size=8))
    given_parts = {
        name: draw(st.sets(st.sampled_from(["codes", "prior", "stock", "region"])))
        if name in items
        else {"codes", "prior", *draw(st.sets(st.sampled_from(["stock", "region"])))}
        for name in upserts
    }
    deletes = draw(st.lists(names.filter(lambda name: name not in upserts), max_size=6))
    members = draw(st.lists(names, max_size=10))
    return shape, items, upserts, given_parts, deletes, members


def batches_of(shape, upserts, given_parts) -> list[ItemUpserts]:
    groups: dict[frozenset[str], list[str]] = {}
    for name, parts in given_parts.items():
        groups.setdefault(frozenset(parts), []).append(name)
    batches = []
    for parts, names in groups.items():
        columns = sorted(parts & {"stock", "region"})
        rows = [{c: upserts[n]["metadata"][c] for c in columns} for n in names]
        table = pl.DataFrame(rows, schema={c: SCHEMA[c] for c in columns}) if columns else None
        batches.append(
            ItemUpserts(
                names,
                codes=(
                    torch.tensor([upserts[n]["codes"] for n in names]) if "codes" in parts else None
                ),
                prior=(
                    [upserts[n]["prior"] for n in names]
                    if "prior" in parts and shape["prior"]
                    else None
                ),
                metadata=table if shape["metadata"] else None,
            )
        )
    return batches


@settings(deadline=None, max_examples=250)
@given(scenario=scenarios())
def test_equal_to_a_full_build(scenario):
    shape, items, upserts, given_parts, deletes, members = scenario
    old = build(items, shape, members)
    before = rows_of(old)
    after = {name: {**item, "metadata": dict(item["metadata"])} for name, item in items.items()}
    for name, parts in given_parts.items():
        empty = {"codes": None, "prior": None, "metadata": {"stock": None, "region": None}}
        item = after.setdefault(name, empty)
        for part in parts & {"codes", "prior"}:
            item[part] = upserts[name][part]
        for column in parts & {"stock", "region"}:
            item["metadata"][column] = upserts[name]["metadata"][column]
    for name in deletes:
        after.pop(name, None)
    call = (old, batches_of(shape, upserts, given_parts), deletes)
    if not after:
        with pytest.raises(ValueError, match="leaves none"):
            update_catalog(*call, unknown_deletes="ignore")
        return
    new = update_catalog(*call, unknown_deletes="ignore")
    expected = build(after, shape, [name for name in members if name in items])
    assert rows_of(new) == rows_of(expected)
    assert sets_of(new) == sets_of(expected)
    assert new.predicates == expected.predicates
    for array in ("row_ptrs", "codes", "leaf_item_ptrs"):
        mine, theirs = getattr(new.trie, array), getattr(expected.trie, array)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert new.trie.level_offsets == expected.trie.level_offsets
    assert new.trie.max_children == expected.trie.max_children
    assert new.index_of(list(after)).tolist() == expected.index_of(list(after)).tolist()
    assert new.version == "unsaved"
    assert rows_of(old) == before


@pytest.fixture
def catalog() -> Catalog:
    built = build_catalog(
        ["a", "b", "c"],
        torch.tensor([[0, 1], [2, 3], [2, 3]]),
        codebook_size=4,
        tokenizer_fingerprint=FINGERPRINT,
        prior=[1.0, 2.0, 3.0],
        metadata=pl.DataFrame({"stock": [1, 2, 3]}),
        constraint_sets={"listed": ["a", "b"]},
    )
    return put_constraint_sets(built, {"rule": Predicate("stock >= 2")})


CODES = torch.tensor([[1, 1]])


@pytest.mark.parametrize(
    ("upserts", "deletes", "message"),
    [
        (ItemUpserts(["d"], None, [1.0]), (), "1 items are not in the catalog .'d'. and come with"),
        (ItemUpserts(["d"], CODES), (), "come without a prior"),
        (ItemUpserts(["d"], CODES, [float("nan")]), (), "prior of row 0 is nan"),
        (ItemUpserts(["d"], CODES, [1.0, 2.0]), (), r"prior has shape \(2,\)"),
        (ItemUpserts(["d"], torch.tensor([[1]]), [1.0]), (), "1 levels; the catalog has 2"),
        (ItemUpserts(["d"], torch.tensor([[1, 4]]), [1.0]), (), "level 1 is 4; allowed are 0 to 3"),
        (ItemUpserts(["d"], torch.tensor([[1, -1]]), [1.0]), (), "level 1 is -1"),
        (ItemUpserts(["d"], torch.tensor([[1.0, 1.0]]), [1.0]), (), "expected integers"),
        (ItemUpserts(["d"], torch.zeros(2, 2).long(), [1.0]), (), "2 rows of codes, but 1 item"),
        (ItemUpserts(["d", "d"], CODES.repeat(2, 1), [1.0, 1.0]), (), "more than once.*'d'"),
        ([ItemUpserts(["a"], CODES), ItemUpserts(["a"])], (), "more than once.*'a'"),
        (ItemUpserts([""], CODES, [1.0]), (), "is empty"),
        (ItemUpserts(["a"], metadata=pl.DataFrame({"nope": [1]})), (), "'nope'; the catalog"),
        (ItemUpserts(["a"], metadata=pl.DataFrame({"stock": ["x"]})), (), "has type String"),
        (ItemUpserts(["a"], metadata=pl.DataFrame({"stock": [1, 2]})), (), "metadata has 2 rows"),
        ((), ["zzz", "a"], "1 item ids to delete are not in the catalog, among them 'zzz'"),
        (ItemUpserts(["a"], CODES), ["a"], "both upserted and deleted, among them 'a'"),
        ((), ["a", "b", "c"], "leaves none"),
    ],
)  # fmt: skip
def test_refused(catalog: Catalog, upserts, deletes, message):
    before = rows_of(catalog)
    with pytest.raises(ValueError, match=message):
        update_catalog(catalog, upserts, deletes)
    assert rows_of(catalog) == before


def test_values_a_catalog_does_not_have():
    bare = build_catalog(["a"], CODES, codebook_size=4, tokenizer_fingerprint=FINGERPRINT)
    with pytest.raises(ValueError, match="the catalog has none"):
        update_catalog(bare, ItemUpserts(["a"], prior=[1.0]))
    with pytest.raises(ValueError, match="unknown metadata columns 'x'; the catalog has none"):
        update_catalog(bare, ItemUpserts(["a"], metadata=pl.DataFrame({"x": [1]})))
    with pytest.raises(ValueError, match="unknown_deletes is 'maybe'"):
        update_catalog(bare, unknown_deletes="maybe")


def test_sold_out_keeps_the_trie_and_recomputes_the_rule(catalog: Catalog):
    assert sets_of(catalog)["rule"] == ["c", "b"]
    new = update_catalog(catalog, ItemUpserts(["c"], metadata=pl.DataFrame({"stock": [0]})))
    assert new.trie is catalog.trie
    assert new.index is catalog.index
    assert sets_of(new) == {"listed": ["a", "b"], "rule": ["b"]}
    # Prefix sums are worked out for the new catalog, not taken over from the old.
    catalog.allowed_prefix(["rule"])
    assert new.allowed_prefix(["rule"]).tolist() == [0, 0, 0, 1]


def test_an_extra_level_that_is_too_small():
    built = build_catalog(
        ["a", "b"],
        torch.tensor([[0], [0]]),
        codebook_size=2,
        tokenizer_fingerprint=FINGERPRINT,
        collision_policy="extra_level",
    )
    assert built.num_levels == 2
    with pytest.raises(ValueError, match="3 items share semantic ID"):
        update_catalog(built, ItemUpserts(["c"], torch.tensor([[0]])))
    with pytest.raises(ValueError, match=r"the catalog has 1 \(the extra level is not given\)"):
        update_catalog(built, ItemUpserts(["c"], torch.tensor([[0, 1]])))


def test_a_rule_that_fits_no_more_is_named(catalog: Catalog):
    from dataclasses import replace

    broken = replace(catalog, predicates={"rule": "gone = 1"})
    with pytest.raises(PredicateError, match=r"constraint set 'rule': .* unknown columns 'gone'"):
        update_catalog(broken, deletes=["a"])
