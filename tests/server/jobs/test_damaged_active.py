"""An active release that is damaged does not keep a sound one from taking its place."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from rectokens.artifacts.errors import ArtifactError
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.kinds import FUNCTIONS
from server.jobs.params import checked_params
from server.jobs.types import JobKind


class Damaged:
    """A store of which the active release has lost its catalog.

    Attributes:
        environment: of jobs on it.
        sound: the release before.
        lines: that jobs logged.
    """

    def __init__(self, environment: JobEnvironment) -> None:
        self.environment = environment
        self.lines: list[str] = []
        store = environment.store
        self.sound = store.active().release
        made = self.run(JobKind.UPDATE_ITEMS, deletes=["W0"])
        shutil.rmtree(store.local.path("catalog", made["catalog"]))

    def run(self, kind: JobKind, **params: Any) -> dict[str, Any]:
        reporter = JobReporter(on_log=self.lines.append)
        return FUNCTIONS[kind](checked_params(kind, params), self.environment, reporter)


@pytest.fixture
def damaged(workplace) -> Damaged:
    return Damaged(workplace.environment())


def test_it_can_be_rolled_back(damaged):
    assert damaged.run(JobKind.ROLLBACK)["release"] == damaged.sound
    assert any("the active release cannot be opened" in line for line in damaged.lines)


def test_another_can_be_activated(damaged):
    assert damaged.run(JobKind.ACTIVATE, release=damaged.sound)["release"] == damaged.sound
    assert damaged.environment.store.active().release == damaged.sound


def test_a_whole_catalog_that_needs_nothing_of_it_can_be_made(damaged, workplace):
    workplace.parquet("items.parquet", 30)
    asked = {"source": {"root": "lake", "path": "items.parquet"}, "activate": True}
    named = {
        "tokenizer": workplace.tokenizer,
        "model": workplace.model,
        "collisions": "share",
        "constraint_sets": "drop",
    }
    for name in named:
        with pytest.raises(ArtifactError, match=r"is not at|does not exist"):
            damaged.run(JobKind.REINDEX, **asked, **{k: v for k, v in named.items() if k != name})
    made = damaged.run(JobKind.REINDEX, **asked, **named)
    assert damaged.environment.store.verify(made["release"]).catalog_version == made["catalog"]
    assert damaged.environment.store.active().release == made["release"]


def test_a_tokenizer_that_was_fitted_is_told(damaged, workplace):
    np.save(workplace.lake / "e.npy", workplace.rows)
    source = {"root": "lake", "path": "e.npy"}
    made = damaged.run(JobKind.TRAIN_TOKENIZER, source=source, epochs=1, codebook_size=4)
    versions = {one.version for one in damaged.environment.store.versions("tokenizer")}
    assert made["tokenizer"] in versions
    assert made["fits_active_model"] is None
