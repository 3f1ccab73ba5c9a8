"""A tokenizer artifact gives back a tokenizer with the same codes and the same fingerprint."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import write_artifact
from rectokens.artifacts.tokenizer import (
    load_tokenizer,
    require_sizes,
    save_tokenizer,
    tokenizer_fingerprint,
)
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from rectokens.tokenizers.rqvae import RQVAETokenizer


def rqvae() -> RQVAETokenizer:
    torch.manual_seed(3)
    model = RQVAETokenizer(6, latent_dim=4, hidden_dim=8, num_levels=2, codebook_size=5)
    model(torch.randn(20, 6))
    model._fitted = True
    return model.eval()


@pytest.mark.parametrize("kind", ["rq-kmeans", "rqvae"])
def test_round_trip(tmp_path: Path, tokenizer: RQKMeansTokenizer, kind: str):
    original = tokenizer if kind == "rq-kmeans" else rqvae()
    report = {"collision_rate": 0.125, "levels": [{"codes_used": 8}], "fast": True}
    folder = save_tokenizer(tmp_path, original, report=report, fitted_on={"rows": 100})
    artifact = load_tokenizer(folder)
    x = torch.randn(50, 6)
    assert torch.equal(artifact.tokenizer.encode(x).codes, original.encode(x).codes)
    codes = original.encode(x)
    assert torch.equal(artifact.tokenizer.decode(codes), original.decode(codes))
    assert artifact.fingerprint == tokenizer_fingerprint(original)
    assert artifact.report == report
    assert artifact.fitted_on == {"rows": 100}
    assert artifact.manifest.version == folder.name
    assert artifact.manifest.numbers["collision_rate"] == 0.125
    assert "fast" not in artifact.manifest.numbers
    again = save_tokenizer(
        tmp_path, artifact.tokenizer, report=artifact.report, fitted_on=artifact.fitted_on
    )
    assert again == folder


def test_fingerprint_is_the_documented_hash(tokenizer: RQKMeansTokenizer):
    data = b"rectokens-tokenizer/1\n" + struct.pack("<q", 3)
    for codebook in tokenizer.codebooks:
        data += struct.pack("<qq", 8, 6)
        data += struct.pack("<48f", *codebook.flatten().tolist())
    assert tokenizer_fingerprint(tokenizer) == hashlib.sha256(data).hexdigest()


def test_fingerprint_tells_codebooks_apart(tokenizer: RQKMeansTokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.codebooks[1][2, 3] += 1e-6
    assert tokenizer_fingerprint(tokenizer) != before


def test_only_fitted_finite_known_tokenizers_are_saved(tmp_path: Path, tokenizer):
    with pytest.raises(ArtifactError, match="is not fitted"):
        save_tokenizer(tmp_path, RQKMeansTokenizer(2, 4, 3), report={}, fitted_on={})
    with pytest.raises(ArtifactError, match="is a Linear"):
        save_tokenizer(tmp_path, torch.nn.Linear(2, 2), report={}, fitted_on={})
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        save_tokenizer(tmp_path, tokenizer, report={"x": object()}, fitted_on={})
    tokenizer.codebooks[0][0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        save_tokenizer(tmp_path, tokenizer, report={}, fitted_on={})
    assert list(tmp_path.iterdir()) == []


def rewrite(folder: Path, root: Path, change) -> Path:
    def populate(target: Path) -> None:
        for path in folder.iterdir():
            if path.name != "manifest.json":
                (target / path.name).write_bytes(path.read_bytes())
        content = json.loads((target / "item_tokenizer.json").read_text())
        change(content)
        (target / "item_tokenizer.json").write_text(json.dumps(content))

    return write_artifact(root, "tokenizer", populate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="pq"), "tokenizer kind is 'pq'; known are rq-kmeans, rqvae"),
        (lambda c: c.update(fingerprint="0" * 64), "has codebooks of fingerprint"),
        (lambda c: c["config"].update(dim=7), "does not hold the tokenizer's weights"),
        (lambda c: c["config"].update(num_levels=4), "does not hold the tokenizer's weights"),
        (lambda c: c["config"].update(num_levels=10**9), "num_levels is 1000000000"),
        (lambda c: c["config"].update(more=1), "unknown fields 'more'"),
        (lambda c: c["config"].pop("seed"), "lacks the field 'seed'"),
        (lambda c: c["format"].update(version=9), "format version is 9"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, tokenizer, change, message: str):
    folder = save_tokenizer(tmp_path, tokenizer, report={}, fitted_on={})
    with pytest.raises(ArtifactError, match=message):
        load_tokenizer(rewrite(folder, tmp_path / "changed", change))


def test_rqvae_settings_are_checked(tmp_path: Path):
    folder = save_tokenizer(tmp_path, rqvae(), report={}, fitted_on={})

    def overflow(content):
        content["config"]["ema_decay"] = "x"

    with pytest.raises(ArtifactError, match="ema_decay is 'x'; expected a finite number"):
        load_tokenizer(rewrite(folder, tmp_path / "changed", overflow))


def test_figures_that_are_not_finite_are_stored_as_null(tmp_path: Path, tokenizer):
    report = {"error": float("inf"), "levels": [float("nan"), 0.5], "nested": {"x": -float("inf")}}
    artifact = load_tokenizer(save_tokenizer(tmp_path, tokenizer, report=report, fitted_on={}))
    assert artifact.report == {"error": None, "levels": [None, 0.5], "nested": {"x": None}}
    assert "error" not in artifact.manifest.numbers


def test_sizes_that_no_artifact_has():
    require_sizes(num_levels=64, codebook_size=65_536)
    with pytest.raises(ValueError, match="num_levels is 65; allowed are 1 to 64"):
        require_sizes(num_levels=65)
    with pytest.raises(ValueError, match="codebook_size is 65537"):
        require_sizes(codebook_size=65_537)
