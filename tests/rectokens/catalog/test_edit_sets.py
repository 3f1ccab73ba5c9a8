"""Constraint sets by list and by rule: put, dropped, stored with their definition."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from rectokens.artifacts.catalog import load_catalog_manifest
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import read_manifest, write_artifact
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.catalog.constraint_sets import UnknownConstraintSetError
from rectokens.catalog.edit_sets import drop_constraint_sets, put_constraint_sets
from rectokens.catalog.predicates import Predicate, PredicateError
from rectokens.catalog.update import ItemUpserts, update_catalog


@pytest.fixture
def catalog() -> Catalog:
    return build_catalog(
        ["a", "b", "c"],
        torch.tensor([[0], [1], [2]]),
        codebook_size=3,
        tokenizer_fingerprint="ef" * 32,
        prior=[1.0, 2.0, 3.0],
        metadata=pl.DataFrame({"price": [10, 20, 30]}),
        constraint_sets={"old": ["a"]},
    )


def test_put_replace_and_drop(catalog: Catalog):
    new = put_constraint_sets(
        catalog,
        {"cheap": Predicate("price < 25"), "good": Predicate("prior >= 2 and item_id <> 'c'"),
         "listed": ["c", "a", "c"], "empty": []},
    )  # fmt: skip
    sets = {name: new.ids_of(items) for name, items in new.constraint_sets.items()}
    assert sets == {"cheap": ["a", "b"], "empty": [], "good": ["b"], "listed": ["a", "c"],
                    "old": ["a"]}  # fmt: skip
    assert list(sets) == sorted(sets)
    assert new.trie is catalog.trie
    assert set(catalog.constraint_sets) == {"old"}

    as_list = put_constraint_sets(new, {"cheap": ["c"]})
    assert set(as_list.predicates) == {"good"}
    assert as_list.allowed_prefix(["cheap", "listed"]).tolist() == [0, 0, 0, 1]
    dropped = drop_constraint_sets(new, ["cheap", "old"])
    assert set(dropped.constraint_sets) == {"empty", "good", "listed"}
    assert set(dropped.predicates) == {"good"}
    with pytest.raises(UnknownConstraintSetError, match="'nope'; the catalog has 'cheap'"):
        drop_constraint_sets(new, ["nope"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"": ["a"]}, "constraint set name"),
        ({"__x": Predicate("price > 1")}, "reserved"),
        ({"s": ["zzz"]}, "1 item ids that the catalog does not have, among them 'zzz'"),
        ({"s": "price > 1"}, "is a string; expected item ids, or a Predicate"),
        ({"s": Predicate("cost > 1")}, "constraint set 's': .*unknown columns 'cost'"),
        ({"s": Predicate("price > 'x'")}, "constraint set 's': .*cannot be evaluated"),
    ],
)
def test_refused(catalog: Catalog, sets, message):
    with pytest.raises(ValueError, match=message):
        put_constraint_sets(catalog, sets)
    assert issubclass(PredicateError, ValueError)


def test_the_definition_is_stored_and_used_again(catalog: Catalog, tmp_path: Path):
    plain = save_catalog(tmp_path, catalog)
    assert "predicates" not in json.loads((plain / "catalog.json").read_text())
    folder = save_catalog(
        tmp_path, put_constraint_sets(catalog, {"cheap": Predicate("price < 25")})
    )
    loaded = load_catalog(folder)
    assert loaded.predicates == {"cheap": "price < 25"}
    assert load_catalog_manifest(folder).config.predicates == {"cheap": "price < 25"}
    assert save_catalog(tmp_path, loaded) == folder
    new = update_catalog(loaded, ItemUpserts(["c"], metadata=pl.DataFrame({"price": [1]})))
    assert new.ids_of(new.constraint_sets["cheap"]) == ["a", "b", "c"]
    assert load_catalog(save_catalog(tmp_path, new)).predicates == {"cheap": "price < 25"}


def test_a_definition_without_its_set_is_refused(catalog: Catalog, tmp_path: Path):
    folder = save_catalog(tmp_path / "x", put_constraint_sets(catalog, {"r": Predicate("price>1")}))

    def tampered(target: Path) -> None:
        for file in folder.iterdir():
            if file.name != "manifest.json":
                (target / file.name).write_bytes(file.read_bytes())
        content = json.loads((folder / "catalog.json").read_text())
        content["predicates"] = {"other": "price > 1"}
        (target / "catalog.json").write_text(json.dumps(content))

    parents = read_manifest(folder).parents
    altered = write_artifact(tmp_path / "y", "catalog", tampered, parents=parents)
    with pytest.raises(ArtifactError, match="'other' is not among the constraint sets"):
        load_catalog(altered)
