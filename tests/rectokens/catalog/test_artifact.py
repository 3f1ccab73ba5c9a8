"""A catalog on disk comes back equal, or is refused with what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rectokens.artifacts.catalog import load_catalog_manifest
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import ParentRef, open_artifact, read_manifest, write_artifact
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.catalog.catalog import Catalog

FINGERPRINT = "ab" * 32


def assert_equal(one: Catalog, other: Catalog) -> None:
    assert one.trie.level_offsets == other.trie.level_offsets
    assert one.trie.max_children == other.trie.max_children
    assert one.trie.codebook_size == other.trie.codebook_size
    for name in ("row_ptrs", "codes", "leaf_item_ptrs"):
        mine, theirs = getattr(one.trie, name), getattr(other.trie, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert one.item_ids.to_list() == other.item_ids.to_list()
    assert (one.prior is None) == (other.prior is None)
    assert one.prior is None or torch.equal(one.prior, other.prior)
    assert (one.metadata is None) == (other.metadata is None)
    assert one.metadata is None or one.metadata.equals(other.metadata)
    assert set(one.constraint_sets) == set(other.constraint_sets)
    for name, items in one.constraint_sets.items():
        assert torch.equal(items, other.constraint_sets[name])
    assert one.collision_policy == other.collision_policy
    assert one.tokenizer_fingerprint == other.tokenizer_fingerprint


@settings(deadline=None, max_examples=40)
@given(data=st.data(), with_metadata=st.booleans(), with_sets=st.booleans())
def test_round_trip(tmp_path: Path, data, catalog_inputs, with_metadata, with_sets):
    ids, codes, codebook_size, prior = data.draw(catalog_inputs)
    catalog = build_catalog(
        ids,
        torch.tensor(codes),
        codebook_size=codebook_size,
        tokenizer_fingerprint=FINGERPRINT,
        prior=None if prior is None else torch.tensor(prior),
        metadata=pl.DataFrame({"title": ids, "rank": range(len(ids))}) if with_metadata else None,
        constraint_sets={"half": ids[::2], "none": []} if with_sets else None,
    )
    folder = save_catalog(tmp_path, catalog)
    loaded = load_catalog(folder)
    assert loaded.version == folder.name
    assert_equal(catalog, loaded)
    assert save_catalog(tmp_path, loaded) == folder
    assert loaded.index_of(ids).sort().values.tolist() == list(range(len(ids)))


@pytest.fixture
def catalog() -> Catalog:
    # Leaves (0,2): x; (0,3): b, a by prior; (4,1): y.
    return build_catalog(
        ["y", "a", "x", "b"],
        torch.tensor([[4, 1], [0, 3], [0, 2], [0, 3]]),
        codebook_size=5,
        tokenizer_fingerprint=FINGERPRINT,
        prior=torch.tensor([0.5, 1.0, 3.0, 2.0]),
        metadata=pl.DataFrame({"title": ["Y", "A", "X", "B"]}),
        constraint_sets={"s": ["y", "x"]},
    )


@pytest.fixture
def folder(tmp_path: Path, catalog: Catalog) -> Path:
    return save_catalog(tmp_path / "catalogs", catalog, tokenizer_version="v" * 16)


def test_what_lies_on_disk(folder: Path):
    manifest = open_artifact(folder, "catalog")
    assert set(manifest.files) == {
        "catalog.json",
        "items.parquet",
        "trie.safetensors",
        "constraint_sets.safetensors",
    }
    assert manifest.parents == {"tokenizer": ParentRef("v" * 16, FINGERPRINT)}
    assert manifest.numbers["num_items"] == 4
    assert manifest.numbers["num_semantic_ids"] == 3
    assert manifest.numbers["collision_rate"] == 0.5
    assert manifest.numbers["duplicates_rate"] == 0.25
    items = pl.read_parquet(folder / "items.parquet")
    assert items.to_dict(as_series=False) == {
        "item_id": ["x", "b", "a", "y"],
        "semantic_id": [[0, 2], [0, 3], [0, 3], [4, 1]],
        "prior": [3.0, 2.0, 1.0, 0.5],
        "title": ["X", "B", "A", "Y"],
    }
    config = load_catalog_manifest(folder).config
    assert (config.num_levels, config.codebook_size) == (2, 5)


def test_collisions_are_counted_among_the_tokenizers_codes(tmp_path: Path, catalog: Catalog):
    extra = build_catalog(
        catalog.item_ids,
        catalog.codes_of(range(4)),
        codebook_size=5,
        tokenizer_fingerprint=FINGERPRINT,
        collision_policy="extra_level",
    )
    folder = save_catalog(tmp_path, extra)
    numbers = open_artifact(folder, "catalog").numbers
    assert numbers["collision_rate"] == 0.5
    assert (numbers["num_levels"], numbers["num_leaves"]) == (3, 4)
    assert_equal(load_catalog(folder), extra)


def test_metadata_types_come_back(tmp_path: Path):
    from datetime import date

    metadata = pl.DataFrame(
        {
            "day": [date(2020, 1, 2), None],
            "tags": [["a", "b"], []],
            "kind": pl.Series(["k", "l"], dtype=pl.Categorical),
            "nothing": [None, None],
            "price": [1.5, float("nan")],
            "parts": [{"x": 1}, {"x": 2}],
        }
    )
    catalog = build_catalog(
        ["a", "b"],
        torch.tensor([[0], [1]]),
        codebook_size=2,
        tokenizer_fingerprint=FINGERPRINT,
        metadata=metadata,
    )
    loaded = load_catalog(save_catalog(tmp_path, catalog))
    assert loaded.metadata_of(0) == {
        "day": date(2020, 1, 2),
        "tags": ["a", "b"],
        "kind": "k",
        "nothing": None,
        "price": 1.5,
        "parts": {"x": 1},
    }


def test_a_loaded_catalog_does_not_follow_its_files(folder: Path):
    loaded = load_catalog(folder)
    before = loaded.trie.row_ptrs.clone()
    trie = folder / "trie.safetensors"
    with open(trie, "r+b") as file:
        file.write(b"\xff" * trie.stat().st_size)
    assert torch.equal(loaded.trie.row_ptrs, before)
    assert loaded.ids_of([0]) == ["x"]


def tampered(folder: Path, root: Path, *, trie=None, sets=None, items=None, config=None) -> Path:
    """The same catalog with some content changed and a manifest that fits the change."""

    def populate(target: Path) -> None:
        for path in folder.iterdir():
            if path.name != "manifest.json":
                (target / path.name).write_bytes(path.read_bytes())
        for name, change in (("trie", trie), ("constraint_sets", sets)):
            if change is not None:
                tensors = load_file(folder / f"{name}.safetensors")
                change(tensors)
                save_file(tensors, target / f"{name}.safetensors")
        if items is not None:
            items(pl.read_parquet(folder / "items.parquet")).write_parquet(target / "items.parquet")
        if config is not None:
            content = json.loads((folder / "catalog.json").read_text())
            config(content)
            (target / "catalog.json").write_text(json.dumps(content))

    return write_artifact(root, "catalog", populate, parents=read_manifest(folder).parents)


def put(name: str, place: int, value: int):
    def change(tensors) -> None:
        tensors[name][place] = value

    return change


def replace(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


# The trie: row_ptrs 0 2 4 5, codes 0 4 | 2 3 1, leaf_item_ptrs 0 1 3 4.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("row_ptrs", 0, 1), "row_ptrs runs from 1 to 5; expected 0 to 5"),
        (put("row_ptrs", 3, 4), "row_ptrs runs from 0 to 4"),
        (put("row_ptrs", 2, 2), r"row_ptrs\[2\] is 2 after 2; it must ascend"),
        (put("row_ptrs", 1, 3), r"row_ptrs\[1\], the first node of depth 1, is 3; expected 2"),
        (put("codes", 1, 0), r"codes\[1\] is 0 after its sibling 0; siblings must ascend"),
        (put("codes", 2, 4), r"codes\[3\] is 3 after its sibling 4"),
        (put("codes", 4, 5), r"codes\[4\] is 5; allowed are 0 to 4"),
        (put("leaf_item_ptrs", 1, 3), r"leaf_item_ptrs\[2\] is 3 after 3"),
        (put("leaf_item_ptrs", 3, 5), "leaf_item_ptrs runs from 0 to 5; expected 0 to 4"),
        (put("leaf_item_ptrs", 1, 2), r"item 1 has semantic ID \(0, 3\), but lies in the leaf"),
        (replace("more", torch.zeros(1)), "expected .*'codes', 'leaf_item_ptrs', 'row_ptrs'"),
        (replace("codes", torch.zeros(5)), "codes is torch.float32"),
        (
            replace("row_ptrs", torch.tensor([0, 2, 5], dtype=torch.int32)),
            r"row_ptrs is torch.int32 of shape \(3,\); expected torch.int32 of shape \(4,\)",
        ),
    ],
)
def test_a_trie_that_is_none(folder: Path, tmp_path: Path, change, message: str):
    broken = tampered(folder, tmp_path / "broken", trie=change)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_catalog(broken)
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.head(3), "has 3 rows; catalog.json says 4"),
        (lambda t: t.drop("title"), "has the columns"),
        (lambda t: t.with_columns(new=1), "has the columns"),
        (lambda t: t.with_columns(pl.lit("x").alias("item_id")), "1 item ids occur more than once"),
        (lambda t: t.with_columns(pl.lit("").alias("item_id")), "item_id of row 0 is missing or"),
        (lambda t: t.with_columns(pl.lit(None, pl.String).alias("item_id")), "row 0 is missing"),
        (lambda t: t.with_columns(pl.lit(1).alias("item_id")), "item_id has type Int32"),
        (lambda t: t.with_columns(prior=pl.lit(None, pl.Float32)), "prior is missing in 4 rows"),
        (
            lambda t: t.with_columns(prior=pl.Series([1, 1, 2, 3], dtype=pl.Float32)),
            "prior of item 2 is 2.0 after 1.0 in the same leaf",
        ),
        (
            lambda t: t.with_columns(prior=pl.Series([1, float("nan"), 2, 3], dtype=pl.Float32)),
            "prior of item 1 is nan",
        ),
        (lambda t: t.reverse(), r"item 0 has semantic ID \(4, 1\)"),
        (
            lambda t: t.with_columns(pl.lit(None, pl.Array(pl.UInt16, 2)).alias("semantic_id")),
            "semantic_id is missing",
        ),
    ],
)
def test_a_table_that_does_not_fit(folder: Path, tmp_path: Path, change, message: str):
    broken = tampered(folder, tmp_path / "broken", items=change)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_catalog(broken)
    assert "items.parquet" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("s", 0, 3), "constraint set 's' does not ascend"),
        (put("s", 1, 4), "constraint set 's' spans 0 to 4; allowed are 0 to 3"),
        (put("s", 0, -1), "spans -1 to 3"),
        (replace("t", torch.zeros(1)), r"catalog\.json names \['s'\]"),
        (replace("s", torch.tensor([0, 1, 3])), r"s is torch.int64 of shape \(3,\)"),
    ],
)
def test_constraint_sets_that_do_not_fit(folder: Path, tmp_path: Path, change, message: str):
    broken = tampered(folder, tmp_path / "broken", sets=change)
    with pytest.raises(ArtifactError, match=message):
        load_catalog(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_items=5), "leaf_item_ptrs runs from 0 to 4; expected 0 to 5"),
        (lambda c: c.update(num_levels=3), "level_offsets are .* expected 5 numbers"),
        (lambda c: c.update(level_offsets=[0, 1, 4, 6]), "no depth with fewer nodes"),
        (lambda c: c.update(level_offsets=[0, 1, 3, 2**31 - 1]), "leaves for 4 items"),
        (lambda c: c.update(codebook_size=4), r"codes\[1\] is 4; allowed are 0 to 3"),
        (lambda c: c.update(codebook_size=0), "codebook_size is 0"),
        (lambda c: c.update(collision_policy="drop"), "collision policy is 'drop'"),
        (lambda c: c.update(collision_policy="extra_level"), "leaf 1 holds 2 items"),
        (lambda c: c.update(constraint_sets={}), "expected .*'trie.safetensors'"),
        (lambda c: c.update(has_prior=False), "has the columns"),
        (lambda c: c.update(metadata_columns=[5]), "metadata_columns is 5"),
        (lambda c: c.update(more=1), "unknown fields 'more'"),
        (lambda c: c["format"].update(version=2), "format version is 2; understood are 1"),
    ],
)
def test_a_configuration_that_does_not_fit(folder: Path, tmp_path: Path, change, message: str):
    broken = tampered(folder, tmp_path / "broken", config=change)
    with pytest.raises(ArtifactError, match=message):
        load_catalog(broken)


@pytest.mark.parametrize(
    "name", ["trie.safetensors", "items.parquet", "constraint_sets.safetensors", "catalog.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_damaged_files_never_load(folder: Path, name: str, damage: str):
    path = folder / name
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "garbage":
        path.write_bytes(b"\xa5" * len(data))
        # Even with the checksums off, garbage is an error of ours and not a crash.
        with pytest.raises(ArtifactError, match=name):
            load_catalog(folder, verify_checksums=False)
    else:
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    with pytest.raises(ArtifactError, match=name):
        load_catalog(folder)


def test_the_manifest_and_the_configuration_name_one_tokenizer(folder: Path):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parents"]["tokenizer"]["fingerprint"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="the manifest names tokenizer 0000"):
        load_catalog(folder)


def test_other_artifacts_are_no_catalogs(tmp_path: Path):
    other = write_artifact(tmp_path, "model", lambda f: (f / "x").write_text("x"))
    with pytest.raises(ArtifactError, match="is a model artifact; expected a catalog"):
        load_catalog(other)
    empty = write_artifact(tmp_path, "catalog", lambda f: (f / "y").write_text("y"))
    with pytest.raises(ArtifactError, match=r"lacks catalog\.json"):
        load_catalog(empty)
