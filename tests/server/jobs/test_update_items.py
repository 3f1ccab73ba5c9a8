"""Metadata of upserts: values of JSON, in the types that the catalog's columns have."""

from __future__ import annotations

import datetime
from typing import Any

import polars as pl
import pytest
import torch

from rectokens.catalog.build import build_catalog
from rectokens.catalog.update import update_catalog
from server.jobs.context import JobEnvironment
from server.jobs.params import ItemUpsert
from server.jobs.update_items import upsert_batches

COLUMNS = {
    "count": [1, 2],
    "price": [1.0, 2.0],
    "sold": [True, False],
    "since": [datetime.date(2026, 1, 1), None],
    "title": ["x", "y"],
    "tags": [[1.5], []],
    "more": [{"a": 1}, {"a": 2}],
    "later": [None, None],
}
CATALOG = build_catalog(
    ["a", "b"],
    torch.tensor([[0, 1], [1, 0]]),
    codebook_size=2,
    tokenizer_fingerprint="ab" * 32,
    metadata=pl.DataFrame(COLUMNS),
)
NO_ENVIRONMENT: JobEnvironment = None  # type: ignore[assignment]  # asked for where there is an embedding


def updated(*items: tuple[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    upserts = [ItemUpsert(item_id=name, metadata=metadata) for name, metadata in items]
    batches = upsert_batches(upserts, CATALOG, pytest.fail, NO_ENVIRONMENT)
    catalog = update_catalog(CATALOG, batches)
    names = ["a", "b"]
    rows = map(catalog.metadata_of, catalog.index_of(names).tolist())
    return {name: row for name, row in zip(names, rows, strict=True) if row is not None}


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("count", 7, 7),
        ("price", 7, 7.0),
        ("sold", False, False),
        ("since", "2026-12-31", datetime.date(2026, 12, 31)),
        ("title", 7, "7"),
        ("tags", [1, 2.5], [1.0, 2.5]),
        ("more", {"a": None}, {"a": None}),
        ("later", 9.5, 9.5),
        ("later", {"any": ["thing"]}, {"any": ["thing"]}),
        ("count", None, None),
    ],
)
def test_a_value_is_kept(name: str, given: Any, expected: Any) -> None:
    found = updated(("a", {name: given}))
    assert found["a"][name] == expected
    assert found["b"] == {column: values[1] for column, values in COLUMNS.items()}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("count", 1.5),
        ("count", {"a": 1}),
        ("sold", 300),
        ("since", 1),
        ("since", "2026-13-01"),
        ("title", {"a": 1}),
        ("tags", {}),
        ("more", 1),
        ("more", {"b": 1}),
    ],
)
def test_a_value_is_refused_rather_than_changed(name: str, given: Any) -> None:
    with pytest.raises(ValueError, match=f"metadata column '{name}' has type"):
        updated(("a", {name: given}))


def test_a_column_without_values_takes_one_type() -> None:
    found = updated(("a", {"later": 1}), ("b", {"later": 2.5, "count": 3}))
    assert [row["later"] for row in found.values()] == [1.0, 2.5]
    with pytest.raises(ValueError, match="types that do not go together"):
        updated(("a", {"later": 1}), ("b", {"later": {"x": 1}, "count": 3}))
