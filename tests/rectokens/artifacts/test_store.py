"""Where artifacts of each kind lie below a root."""

from __future__ import annotations

from pathlib import Path

import pytest

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.store import ArtifactStore


def test_layout(tmp_path: Path):
    store = ArtifactStore(tmp_path)
    version = "0123456789abcdef"
    for kind in ("tokenizer", "model", "catalog", "release"):
        assert store.path(kind, version) == tmp_path / f"{kind}s" / version
    assert store.versions("catalog") == []
    for name in ("ffff456789abcdef", version, ".partial-1-a", "notes"):
        (tmp_path / "catalogs" / name).mkdir(parents=True)
    (tmp_path / "catalogs" / "aaaa456789abcdef").write_text("a file")
    assert store.versions("catalog") == [version, "ffff456789abcdef"]


@pytest.mark.parametrize("version", ["..", "../../etc", "", "0123456789ABCDEF", "0123456789abcde"])
def test_nothing_but_a_version_becomes_part_of_a_path(tmp_path: Path, version: str):
    with pytest.raises(ArtifactError, match="expected 16 lower-case hexadecimal digits"):
        ArtifactStore(tmp_path).path("model", version)


def test_unknown_kind(tmp_path: Path):
    with pytest.raises(ArtifactError, match="kind is 'cake'"):
        ArtifactStore(tmp_path).folder("cake")
