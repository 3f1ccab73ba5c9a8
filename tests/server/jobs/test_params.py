from __future__ import annotations

from typing import Any

import pytest

from server.jobs.params import PARAMS, checked_params, shown
from server.jobs.types import InvalidJobError, JobKind

VERSION = "0123456789abcdef"
SOURCE = {"root": "lake", "path": "items.parquet"}


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def test_every_kind_has_parameters():
    assert set(PARAMS) == set(JobKind)


@pytest.mark.parametrize(
    ("kind", "params", "message", "param"),
    [
        ("reindex", {}, "source is missing", "source"),
        ("reindex", {"source": SOURCE, "x": 1}, "x is not known", "x"),
        ("reindex", {"source": SOURCE, "tokenizer": "../../etc"}, "should match", "tokenizer"),
        ("reindex", {"source": SOURCE, "activate": "yes"}, "activate is 'yes'", "activate"),
        ("reindex", {"source": {"root": "a", "path": ""}}, "at least 1 char", "source.path"),
        ("update_items", {}, "nothing to do", None),
        (
            "update_items",
            {"upserts": [{"item_id": "a", "embedding": [0.5], "codes": [1]}]},
            "an embedding and codes",
            "upserts.0",
        ),
        (
            "update_items",
            {"upserts": [{"item_id": "a", "embedding": [float("nan")]}]},
            "finite",
            "upserts.0.embedding.0",
        ),
        (
            "update_items",
            {"upserts": [{"item_id": "a", "metadata": {"x": 1, "y": nested(33)}}]},
            "'y' is nested deeper than 32",
            "upserts.0.metadata",
        ),
        (
            "update_items",
            {"upserts": [{"item_id": "a", "metadata": {"x": [{"y": float("inf")}]}}]},
            "'x' has a number that is not finite",
            "upserts.0.metadata",
        ),
        ("put_constraint_set", {"name": "x"}, "give one of item_ids and predicate", None),
        ("train_tokenizer", {"source": SOURCE, "latent_dim": 4}, "does not apply", None),
        ("train_tokenizer", {"source": SOURCE, "num_levels": 0}, "greater than", "num_levels"),
        ("activate", {}, "give one of release and catalog", None),
        ("activate", {"release": VERSION, "model": VERSION}, "leave out model", None),
        ("rollback", {"note": ""}, "at least 1 character", "note"),
    ],
)
def test_refused(kind: str, params: dict[str, Any], message: str, param: str | None):
    with pytest.raises(InvalidJobError, match=message) as error:
        checked_params(JobKind(kind), params)
    assert error.value.param == param


def test_metadata_may_be_nested():
    upserts = [{"item_id": "a", "metadata": {"x": nested(32), "y": [], "z": None}}]
    checked = checked_params(JobKind.UPDATE_ITEMS, {"upserts": upserts})
    assert checked.model_dump(exclude_unset=True) == {"upserts": upserts}


def test_shown_is_short():
    upserts = [{"item_id": str(i), "embedding": [0.5] * 8} for i in range(100)]
    params = checked_params(JobKind.UPDATE_ITEMS, {"upserts": upserts, "deletes": ["a"]})
    assert shown(params) == {"upserts": "100 entries", "deletes": ["a"]}
    params = checked_params(JobKind.UPDATE_ITEMS, {"upserts": upserts[:2]})
    assert shown(params) == {"upserts": ["0", "1"]}
