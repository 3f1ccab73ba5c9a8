"""A release names a model and a catalog of its store and finds both again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import write_artifact
from rectokens.artifacts.release import load_release, save_release
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog


def add_catalog(store: Path, fingerprint: str, num_levels: int = 3) -> Path:
    codes = torch.randint(0, 8, (30, num_levels), generator=torch.Generator().manual_seed(0))
    catalog = build_catalog(
        [f"B{i}" for i in range(30)], codes, codebook_size=8, tokenizer_fingerprint=fingerprint
    )
    return save_catalog(store / "catalogs", catalog)


@pytest.fixture
def store(model_folder: Path) -> Path:
    return model_folder.parent.parent


@pytest.fixture
def catalog_folder(store: Path, spec) -> Path:
    return add_catalog(store, spec.tokenizer_fingerprint)


def test_both_parts_are_found(store: Path, model_folder: Path, catalog_folder: Path, spec):
    folder = save_release(store, model_folder.name, catalog_folder.name, numbers={"recall": 0.1})
    assert folder.parent == store / "releases"
    release = load_release(folder)
    assert release.model_path.resolve() == model_folder.resolve()
    assert release.catalog_path.resolve() == catalog_folder.resolve()
    assert (release.model_version, release.catalog_version) == (
        model_folder.name,
        catalog_folder.name,
    )
    assert release.tokenizer_fingerprint == spec.tokenizer_fingerprint
    assert release.manifest.numbers == {"recall": 0.1}
    assert save_release(store, model_folder.name, catalog_folder.name) == folder


def test_a_moved_store_still_works(store, model_folder, catalog_folder, tmp_path: Path):
    folder = save_release(store, model_folder.name, catalog_folder.name)
    moved = tmp_path / "moved"
    shutil.copytree(store, moved)
    release = load_release(moved / "releases" / folder.name)
    assert release.model_path.is_relative_to(moved)
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    with pytest.raises(ArtifactError, match="relative to the root of the store"):
        load_release(alone)
    assert load_release(alone, root=store).model_path == store / "models" / model_folder.name


def test_parts_that_do_not_belong_together(store, model_folder, spec):
    foreign = add_catalog(store, "0" * 64)
    with pytest.raises(ArtifactError, match="do not belong together"):
        save_release(store, model_folder.name, foreign.name)
    longer = add_catalog(store, spec.tokenizer_fingerprint, num_levels=4)
    with pytest.raises(ArtifactError, match="num_levels 3 of the model is not 4"):
        save_release(store, model_folder.name, longer.name, allow_other_tokenizer=True)
    folder = save_release(store, model_folder.name, foreign.name, allow_other_tokenizer=True)
    assert load_release(folder).catalog_version == foreign.name


def test_missing_or_damaged_parts(store, model_folder, catalog_folder):
    with pytest.raises(ArtifactError, match="does not exist"):
        save_release(store, model_folder.name, "0" * 16)
    with pytest.raises(ArtifactError, match="expected 16 lower-case"):
        save_release(store, model_folder.name, "../../etc")
    folder = save_release(store, model_folder.name, catalog_folder.name)
    shutil.rmtree(catalog_folder)
    with pytest.raises(ArtifactError, match=f"catalog {catalog_folder.name} is not at"):
        load_release(folder)


def test_a_part_exchanged_behind_the_release(store, model_folder, catalog_folder):
    folder = save_release(store, model_folder.name, catalog_folder.name)
    other = add_catalog(store, "0" * 64)
    shutil.rmtree(catalog_folder)
    other.rename(catalog_folder)
    with pytest.raises(ArtifactError, match=f"holds catalog version {other.name}"):
        load_release(folder)


@pytest.mark.parametrize("location", ["../../elsewhere", "/etc", "catalogs/../../x", ""])
def test_locations_stay_below_the_root(store, model_folder, catalog_folder, location: str):
    folder = save_release(store, model_folder.name, catalog_folder.name)
    content = json.loads((folder / "release.json").read_text())
    content["catalog"]["location"] = location
    altered = write_artifact(
        store / "releases",
        "release",
        lambda f: (f / "release.json").write_text(json.dumps(content)),
    )
    with pytest.raises(ArtifactError, match=r"not allowed|non-empty string"):
        load_release(altered)
