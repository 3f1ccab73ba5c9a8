"""Jobs of several hosts on one object store, each with a cache of its own."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from rectokens.artifacts.open_store import open_release_store
from rectokens.catalog.artifact import load_catalog
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.kinds import FUNCTIONS
from server.jobs.params import checked_params
from server.jobs.types import JobErrorKind, JobFailure, JobKind

SOURCE = {"root": "lake", "path": "items.parquet", "metadata_columns": ["stock"]}


@pytest.fixture
def host(workplace, tmp_path: Path):
    """``host(name)``: what jobs of a host work with; the store is the workplace's, in a bucket."""
    bucket = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/store"
    for path in sorted(workplace.root.rglob("*")):
        name = path.relative_to(workplace.root).as_posix()
        if path.is_file() and name.count("/") == 2:  # artifacts, without the pointer
            bucket.pipe_file(f"/{tmp_path.name}/store/{name}", path.read_bytes())

    def make(name: str) -> JobEnvironment:
        return workplace.environment(store=open_release_store(url, cache=tmp_path / name))

    make("operator").store.activate(workplace.store.active().release)
    yield make
    bucket.rm(f"/{tmp_path.name}", recursive=True)


def run(environment: JobEnvironment, kind: JobKind, **params):
    return FUNCTIONS[kind](checked_params(kind, params), environment, JobReporter())


def served(environment: JobEnvironment):
    release = environment.store.verify(environment.store.active().release)
    return load_catalog(release.catalog_path)


def test_what_one_host_makes_the_others_have(workplace, host):
    workplace.parquet("items.parquet", 60)
    one, two = host("one"), host("two")
    first = run(one, JobKind.REINDEX, source=SOURCE, constraint_sets="drop", activate=True)
    assert served(two).version == first["catalog"]
    upsert = {"item_id": "new", "embedding": workplace.rows[0].tolist(), "metadata": {"stock": 7}}
    second = run(two, JobKind.UPDATE_ITEMS, upserts=[upsert], deletes=["N0"])
    assert second["base"] == first["catalog"]
    run(one, JobKind.PUT_CONSTRAINT_SET, name="few", predicate="stock = 7")
    catalog = served(host("three"))
    assert catalog.num_items == 60
    members = catalog.ids_of(catalog.constraint_sets["few"])
    assert sorted(members) == ["N7", "new"]
    assert run(two, JobKind.ROLLBACK)["catalog"] == second["catalog"]
    trained = run(
        one,
        JobKind.TRAIN_TOKENIZER,
        source={"root": "lake", "path": "items.parquet"},
        num_levels=2,
        codebook_size=4,
    )
    assert trained["tokenizer"] in {one.version for one in two.store.versions("tokenizer")}


def test_hosts_share_no_lock_so_the_second_of_two_is_told(workplace, host):
    """What the first did is not lost without a word."""
    one, two = host("one"), host("two")
    lines: list[str] = []

    class Meanwhile(JobReporter):
        def progress(self, share: float, message: str) -> None:
            if message == "changing the catalog" and not lines:
                lines.append(run(two, JobKind.UPDATE_ITEMS, deletes=["W1"])["catalog"])

    params = checked_params(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]})
    with pytest.raises(JobFailure, match="was not activated") as error:
        FUNCTIONS[JobKind.UPDATE_ITEMS](params, one, Meanwhile())
    assert error.value.kind is JobErrorKind.CONFLICT
    assert served(one).version == lines[0]
