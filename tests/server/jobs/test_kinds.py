"""Every kind of job as a function: what it makes of a store, and what it refuses."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.retention import RetentionPolicy
from rectokens.catalog.artifact import load_catalog
from rectokens.catalog.catalog import Catalog
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.gate import ProposedActivation
from server.jobs.kinds import FUNCTIONS
from server.jobs.params import checked_params
from server.jobs.types import JobCancelledError, JobErrorKind, JobFailure, JobKind

SOURCE = {
    "root": "lake",
    "path": "items.parquet",
    "prior_column": "popularity",
    "metadata_columns": ["*"],
}


def run(
    environment: JobEnvironment,
    job: str,
    reporter: JobReporter | None = None,
    /,
    **params: Any,
) -> dict[str, Any]:
    job_kind = JobKind(job)
    return FUNCTIONS[job_kind](
        checked_params(job_kind, params), environment, reporter or JobReporter()
    )


def active_catalog(environment: JobEnvironment) -> Catalog:
    release = environment.store.open_active()
    assert release is not None
    return load_catalog(release.catalog_path)


def test_every_kind_has_a_function():
    assert set(FUNCTIONS) == set(JobKind)


def test_reindex(workplace):
    workplace.parquet("items.parquet", 300)
    environment = workplace.environment()
    before = environment.store.active()
    seen: list[float] = []
    lines: list[str] = []
    reporter = JobReporter(lambda share, message: seen.append(share), lines.append)
    result = run(environment, "reindex", reporter, source=SOURCE)
    assert environment.store.active() == before
    assert (result["items"], result["activated"]) == (300, False)
    assert result["model"] == workplace.model
    assert seen == sorted(seen)
    assert 0 <= seen[0] < 0.1 < 0.9 < seen[-1] <= 1
    assert any("300 items" in line for line in lines)

    again = run(environment, "reindex", source=SOURCE, activate=True, note="n")
    assert again["catalog"] == result["catalog"]
    assert again["release"] == result["release"]
    assert again["sequence"] == before.sequence + 1
    assert environment.store.active().note == "n"
    catalog = active_catalog(environment)
    assert catalog.num_items == 300
    assert catalog.metadata.columns == ["stock"]
    assert catalog.prior is not None
    # A list keeps what is still there, a predicate is evaluated again.
    assert catalog.constraint_sets["some"].numel() == 0
    assert catalog.constraint_sets["stocked"].numel() == 200
    tokenizers = environment.store.versions("tokenizer")
    assert [one.version for one in tokenizers] == [result["tokenizer"]]

    dropped = run(environment, "reindex", source=SOURCE, constraint_sets="drop")
    path = environment.store.local.path("catalog", dropped["catalog"])
    assert not load_catalog(path).constraint_sets


def test_reindex_from_npy_and_from_a_folder_gives_the_same_codes(workplace):
    environment = workplace.environment()
    np.save(workplace.lake / "e.npy", workplace.rows)
    ids = "\n".join(f"W{i}" for i in range(len(workplace.rows)))
    (workplace.lake / "ids.txt").write_text(ids + "\n")
    source = {"root": "lake", "path": "e.npy", "ids": "ids.txt"}
    result = run(environment, "reindex", source=source, constraint_sets="drop")
    made = load_catalog(environment.store.local.path("catalog", result["catalog"]))
    old = active_catalog(environment)
    for name in ("W0", "W57", "W199"):
        codes = [c.codes_of(c.index_of([name])) for c in (made, old)]
        assert torch.equal(*codes)

    (workplace.lake / "parts").mkdir()
    workplace.parquet("parts/a.parquet", 10, prefix="A")
    workplace.parquet("parts/b.parquet", 20, prefix="B")
    source = {**SOURCE, "path": "parts"}
    result = run(environment, "reindex", source=source)
    assert result["items"] == 30


def test_reindex_into_an_empty_store(workplace, tmp_path):
    from rectokens.artifacts.open_store import open_release_store

    workplace.parquet("items.parquet", 30)
    store = open_release_store(tmp_path / "new")
    environment = workplace.environment(store=store)
    with pytest.raises(JobFailure, match="there is no current tokenizer; name one"):
        run(environment, "reindex", source=SOURCE)
    for kind, version in (("tokenizer", workplace.tokenizer), ("model", workplace.model)):
        target = store.local.path(kind, version)
        target.parent.mkdir(parents=True)
        workplace.store.local.path(kind, version).rename(target)
    result = run(environment, "reindex", source=SOURCE, tokenizer=workplace.tokenizer)
    assert "no model was named" in result["not_released"]
    activated = run(environment, "activate", catalog=result["catalog"], model=workplace.model)
    assert store.active().release == activated["release"]


def test_update_items(workplace):
    environment = workplace.environment()
    old = active_catalog(environment)
    result = run(
        environment,
        "update_items",
        upserts=[
            {
                "item_id": "new",
                "embedding": workplace.rows[3].tolist(),
                "prior": 2.0,
                "metadata": {"stock": 500},
            },
            {"item_id": "coded", "codes": [1, 2, 3], "prior": 0.5},
            {"item_id": "W1", "metadata": {"stock": 100}},
            {"item_id": "W2", "prior": -1.0},
        ],
        deletes=["W0", "W199"],
    )
    catalog = active_catalog(environment)
    assert catalog.version == result["catalog"]
    assert result["base"] == old.version
    assert catalog.num_items == result["items"] == 200
    assert (result["upserted"], result["deleted"]) == (4, 2)
    new = catalog.index_of(["new"])
    assert torch.equal(catalog.codes_of(new), old.codes_of(old.index_of(["W3"])))
    assert catalog.metadata_of(int(new)) == {"stock": 500}
    assert catalog.codes_of(catalog.index_of(["coded"])).tolist() == [[1, 2, 3]]
    assert catalog.prior[catalog.index_of(["W2"])].item() == -1.0
    assert catalog.index_of(["W0", "W199"]).tolist() == [-1, -1]
    stocked = catalog.ids_of(catalog.constraint_sets["stocked"])
    assert {"new", "W1"} <= set(stocked)
    assert "W199" not in stocked
    parents = environment.store.open_active()
    assert parents.model_version == workplace.model


def test_an_update_that_is_not_activated(workplace):
    environment = workplace.environment()
    before = environment.store.active()
    result = run(environment, "update_items", deletes=["W0"], activate=False)
    assert not result["activated"]
    assert environment.store.active() == before
    run(environment, "activate", release=result["release"], expected_active=before.release)
    assert active_catalog(environment).num_items == 199
    with pytest.raises(JobFailure, match="expected was") as error:
        run(environment, "rollback", expected_active=before.release)
    assert error.value.kind is JobErrorKind.CONFLICT
    assert run(environment, "rollback")["release"] == before.release


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"upserts": [{"item_id": "x", "embedding": [1.0]}]}, "'x' has 1 values; .* takes 6"),
        ({"upserts": [{"item_id": "x", "embedding": [1e300] * 6}]}, "not finite in float32"),
        ({"upserts": [{"item_id": "x", "codes": [0, 0], "prior": 0.0}]}, "2 levels"),
        (
            {
                "upserts": [
                    {"item_id": "x", "codes": [0, 0, 0], "prior": 0.0},
                    {"item_id": "y", "codes": [0, 0], "prior": 0.0},
                ]
            },
            "'y' has 2 codes, item 'x' has 3",
        ),
        ({"upserts": [{"item_id": "x", "codes": [2**40, 0, 0], "prior": 0.0}]}, "is no code"),
        ({"upserts": [{"item_id": "x", "codes": [0, 0, 8], "prior": 0.0}]}, "0 to 7"),
        ({"upserts": [{"item_id": "x", "prior": 1.0}]}, "needs them"),
        ({"upserts": [{"item_id": "W1", "metadata": {"color": "red"}}]}, "unknown metadata"),
        ({"upserts": [{"item_id": "W1", "metadata": {"stock": "many"}}]}, "'stock'"),
        ({"upserts": [{"item_id": "W1", "metadata": {"stock": {"a": object}}}]}, "'stock'"),
        ({"upserts": [{"item_id": "W1", "prior": 1e300}]}, "finite in float32"),
        ({"upserts": [{"item_id": "W1"}, {"item_id": "W1", "prior": 0.0}]}, "more than once"),
        ({"deletes": ["nobody"]}, "'nobody'"),
        ({"deletes": [f"W{i}" for i in range(200)]}, "leaves none"),
    ],
)
def test_updates_that_are_refused(workplace, params: Mapping[str, Any], message: str):
    environment = workplace.environment()
    before = environment.store.versions("catalog")
    with pytest.raises(JobFailure, match=message) as error:
        run(environment, "update_items", **params)
    assert error.value.kind is JobErrorKind.INVALID_PARAMETERS
    assert environment.store.versions("catalog") == before


def test_constraint_sets(workplace):
    environment = workplace.environment()
    first = run(environment, "put_constraint_set", name="few", item_ids=["W5", "W6", "W5"])
    assert first["set_items"] == 2
    second = run(environment, "put_constraint_set", name="high", predicate="stock > 190")
    assert second["set_items"] == 9
    assert second["base"] == first["catalog"]
    run(environment, "update_items", upserts=[{"item_id": "W0", "metadata": {"stock": 1000}}])
    catalog = active_catalog(environment)
    assert catalog.constraint_sets["high"].numel() == 10
    assert set(catalog.constraint_sets) == {"some", "stocked", "few", "high"}
    run(environment, "delete_constraint_set", name="few")
    assert "few" not in active_catalog(environment).constraint_sets
    for kind, params, message in (
        ("delete_constraint_set", {"name": "few"}, "'few'; the catalog has 'high'"),
        ("put_constraint_set", {"name": "x", "item_ids": ["nobody"]}, "'nobody'"),
        ("put_constraint_set", {"name": "__x", "item_ids": []}, "reserved"),
        ("put_constraint_set", {"name": "x", "predicate": "color = 'red'"}, "unknown columns"),
        ("put_constraint_set", {"name": "x", "predicate": "drop table"}, "x"),
    ):
        with pytest.raises(JobFailure, match=message) as error:
            run(environment, kind, **params)
        assert error.value.kind is JobErrorKind.INVALID_PARAMETERS


@pytest.mark.parametrize("kind", ["rq-kmeans", "rqvae"])
def test_train_tokenizer(workplace, kind: str):
    environment = workplace.environment()
    np.save(workplace.lake / "e.npy", workplace.rows)
    source = {"root": "lake", "path": "e.npy"}
    options = {"epochs": 2, "num_levels": 2, "codebook_size": 4, "kind": kind}
    if kind == "rqvae":
        options |= {"latent_dim": 4, "hidden_dim": 8, "learning_rate": 1e-3}
    result = run(environment, "train_tokenizer", source=source, **options)
    report = result["report"]
    assert len(report["reconstruction_error"]) == len(report["entropy_bits"]) == 2
    assert 0 <= report["collision_rate"] <= 1
    assert 0 < report["p_unique"] <= 1
    assert result["fits_active_model"] is False
    stored = {one.version: one for one in environment.store.versions("tokenizer")}
    assert stored[result["tokenizer"]].tokenizer == result["fingerprint"]

    # It may be looked at and encoded with, but what it encodes does not become active.
    workplace.parquet("items.parquet", 20)
    before = environment.store.active()
    tokenizer = {"source": SOURCE, "tokenizer": result["tokenizer"], "constraint_sets": "drop"}
    with pytest.raises(JobFailure, match="num_levels 3 of the model is not 2") as error:
        run(environment, "reindex", **tokenizer, activate=True)
    assert error.value.kind is JobErrorKind.CONFLICT
    made = run(environment, "reindex", **tokenizer)
    assert "do not belong together" in made["not_released"]
    with pytest.raises(ArtifactError, match="do not belong together"):
        run(environment, "activate", catalog=made["catalog"])
    assert environment.store.active() == before


def test_a_tokenizer_of_the_right_sizes_is_still_another_one(workplace):
    environment = workplace.environment()
    np.save(workplace.lake / "e.npy", workplace.rows)
    source = {"root": "lake", "path": "e.npy"}
    sizes = {"num_levels": 3, "codebook_size": 8, "epochs": 1}
    result = run(environment, "train_tokenizer", source=source, **sizes)
    assert result["fits_active_model"] is True
    workplace.parquet("items.parquet", 20)
    with pytest.raises(JobFailure, match="fingerprint"):
        run(environment, "reindex", source=SOURCE, tokenizer=result["tokenizer"], activate=True)


def test_the_gate(workplace):
    seen: list[ProposedActivation] = []

    def gate(activation: ProposedActivation) -> dict[str, Any]:
        seen.append(activation)
        activation.reporter.progress(0.5, "halfway")
        if activation.options == {"block": True}:
            raise JobFailure(JobErrorKind.GATE, "overlap is 0.1; at least 0.5 is needed")
        return {"overlap": 0.9}

    environment = workplace.environment(gate=gate)
    before = environment.store.active()
    with pytest.raises(JobFailure, match="overlap is") as error:
        run(environment, "update_items", deletes=["W0"], gate={"block": True})
    assert error.value.kind is JobErrorKind.GATE
    assert environment.store.active() == before
    result = run(environment, "update_items", deletes=["W0"])
    assert result["gate"] == {"overlap": 0.9}
    assert seen[-1].current.manifest.version == before.release
    assert seen[-1].proposed.manifest.version == result["release"]
    assert run(environment, "rollback")["gate"] == {"overlap": 0.9}
    assert seen[-1].proposed.manifest.version == before.release
    with pytest.raises(JobFailure, match="no activation gate is configured"):
        run(
            workplace.environment(gate=None),
            "activate",
            release=result["release"],
            gate={"block": True},
        )


def test_the_gate_of_a_store_that_nobody_serves(workplace):
    environment = workplace.environment()
    before = environment.store.active()
    for gate, kind, message in (
        ({"min_overlap": 2.0}, JobErrorKind.INVALID_PARAMETERS, "gate.min_overlap"),
        ({"min_overlap": 0.5}, JobErrorKind.GATE, "no serving process is there to replay"),
    ):
        with pytest.raises(JobFailure, match=message) as error:
            run(environment, "update_items", deletes=["W0"], gate=gate)
        assert error.value.kind is kind
        assert environment.store.active() == before
    result = run(environment, "update_items", deletes=["W0"])
    assert (result["gate"], result["servers"]) == (None, [])


def test_an_activation_meanwhile_is_not_undone(workplace):
    environment = workplace.environment()
    other = run(environment, "update_items", deletes=["W0"], activate=False)

    def gate(activation: ProposedActivation) -> None:
        # Somebody else is quicker.
        environment.store.activate(other["release"])

    with pytest.raises(JobFailure, match="is made but was not activated") as error:
        run(workplace.environment(gate=gate), "update_items", deletes=["W1"])
    assert error.value.kind is JobErrorKind.CONFLICT
    assert environment.store.active().release == other["release"]


def test_old_versions_are_let_go(workplace):
    environment = workplace.environment(retention=RetentionPolicy(1, 0.0))
    removed = []
    for number in range(4):
        removed += run(environment, "update_items", deletes=[f"W{number}"])["removed"]
    store = environment.store
    # The active one, the one before, and the latest, as far as seconds tell.
    assert 2 <= len(store.versions("release")) <= 3
    assert 2 <= len(store.versions("catalog")) <= 3
    assert len(removed) >= 4
    assert [one.version for one in store.versions("model")] == [workplace.model]
    assert [one.version for one in store.versions("tokenizer")] == [workplace.tokenizer]
    store.rollback()
    assert active_catalog(environment).num_items == 197


def test_an_old_version_that_cannot_be_read_is_in_the_way_of_no_leftovers(workplace, monkeypatch):
    environment = workplace.environment(retention=RetentionPolicy(0, 0.0))
    left = environment.store.local.folder("catalog") / ".partial-1-left"
    left.mkdir()
    long_ago = time.time() - 2 * 86_400
    os.utime(left, (long_ago, long_ago))

    def unreadable(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(environment.store, "apply_retention", unreadable)
    result = run(environment, "update_items", deletes=["W1"])
    assert "Input/output error" in result["not_removed"]
    assert not left.exists()


def test_old_versions_that_cannot_be_removed_do_not_undo_an_activation(workplace, monkeypatch):
    environment = workplace.environment(retention=RetentionPolicy(0, 0.0))
    store = environment.store
    for number in range(3):
        run(environment, "update_items", deletes=[f"W{number}"])
    before = {one.version for one in store.versions("catalog")}

    def full(kind: str, version: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._storage, "remove", full)
    lines: list[str] = []
    reporter = JobReporter(on_log=lines.append)
    result = run(environment, "update_items", reporter, deletes=["W3"])
    assert (result["activated"], result["removed"]) == (True, [])
    assert store.active().release == result["release"]
    assert "No space left on device" in result["not_removed"]
    assert any("old versions stay" in line and "No space left" in line for line in lines)
    assert before < {one.version for one in store.versions("catalog")}

    monkeypatch.undo()
    again = run(environment, "update_items", deletes=["W4"])
    assert "not_removed" not in again
    assert len(again["removed"]) >= 2
    assert len(store.versions("catalog")) <= 3


def test_what_killed_writers_left_is_removed_after_a_day(workplace):
    environment = workplace.environment()
    old, young = (workplace.root / f".partial-1-{name}.json" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("{")
    os.utime(old, (0, 0))
    run(environment, "update_items", deletes=["W0"])
    assert (old.exists(), young.exists()) == (False, True)


def test_an_active_release_that_cannot_be_opened_again_was_activated(workplace, monkeypatch):
    environment = workplace.environment()
    store = environment.store
    other = run(environment, "update_items", deletes=["W0"], activate=False)
    real = store.open_release

    def away(version: str) -> object:
        if store.active().release == other["release"]:
            raise ConnectionError("gone")
        return real(version)

    monkeypatch.setattr(store, "open_release", away)
    lines: list[str] = []
    reporter = JobReporter(on_log=lines.append)
    result = run(environment, "activate", reporter, release=other["release"])
    assert store.active().release == result["release"] == other["release"]
    assert any("ConnectionError: gone" in line for line in lines)


def test_a_job_that_is_asked_to_stop_leaves_nothing(workplace):
    workplace.parquet("items.parquet", 300)
    environment = workplace.environment(batch_size=10)
    before = sorted(path.relative_to(workplace.root) for path in workplace.root.rglob("*"))
    for stop_after in (0, 5, 20, 31, 33):
        calls = iter(range(10**6))

        def cancelled(stop_after: int = stop_after, calls=calls) -> bool:
            return next(calls) >= stop_after

        with pytest.raises(JobCancelledError):
            run(environment, "reindex", JobReporter(cancelled=cancelled), source=SOURCE)
    after = sorted(path.relative_to(workplace.root) for path in workplace.root.rglob("*"))
    assert [path for path in after if path.name != ".catalog.lock"] == before


def test_no_release_is_active(workplace, tmp_path):
    from rectokens.artifacts.open_store import open_release_store

    environment = workplace.environment(store=open_release_store(tmp_path / "empty"))
    with pytest.raises(JobFailure, match="no release is active") as error:
        run(environment, "update_items", deletes=["W0"])
    assert error.value.kind is JobErrorKind.CONFLICT
    with pytest.raises(JobFailure, match="no model to serve the catalog with; name one") as error:
        run(environment, "activate", catalog="0" * 16)
    assert error.value.kind is JobErrorKind.CONFLICT
    with pytest.raises(ArtifactError, match="nothing to roll back"):
        run(environment, "rollback")
    np.save(workplace.lake / "e.npy", workplace.rows)
    source = {"root": "lake", "path": "e.npy"}
    made = run(environment, "train_tokenizer", source=source, epochs=1, codebook_size=4)
    assert made["fits_active_model"] is None
