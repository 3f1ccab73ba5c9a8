"""``rectokens fit``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rectokens.artifacts.tokenizer import load_tokenizer
from rectokens.catalog.collisions import collision_report
from rectokens.tokenizers.fitting import RQKMeansSettings, fit_rq_kmeans


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """300 rows around 20 centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 8, generator=generator)
    rows = centres.repeat(15, 1) + 0.1 * torch.randn(300, 8, generator=generator)
    np.save(tmp_path / "e.npy", rows.numpy())
    return tmp_path / "e.npy"


SMALL = ("--num-levels", 2, "--codebook-size", 16, "--seed", 3)


def test_the_tokenizer_is_the_one_that_fitting_gives(run, embeddings: Path, tmp_path: Path):
    result = run(
        *("fit", "--embeddings", embeddings, "--out", tmp_path / "t", *SMALL),
        *("--epochs", 4, "--style", "kmeans", "--batch-size", 64),
    )
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    artifact = load_tokenizer(folder)
    rows = torch.from_numpy(np.load(embeddings))
    settings = RQKMeansSettings(num_levels=2, codebook_size=16, seed=3, epochs=4, style="kmeans")
    expected = fit_rq_kmeans(list(rows.split(64)), settings)
    codes = artifact.tokenizer.encode(rows).codes
    assert torch.equal(codes, expected.encode(rows).codes)
    assert artifact.report["collision_rate"] == collision_report(codes)["collision_rate"]
    assert artifact.manifest.numbers["num_semantic_ids"] == artifact.report["num_semantic_ids"]
    assert artifact.fitted_on["file"] == "e.npy"
    assert artifact.fitted_on["rows"] == 300
    assert artifact.fitted_on["settings"]["epochs"] == 4
    shown = run("inspect", folder)
    assert shown.exit_code == 0
    assert "reconstruction_error" in shown.stdout


def test_the_same_seed_gives_the_same_version(run, embeddings: Path, tmp_path: Path):
    names = {
        Path(run("fit", "--embeddings", embeddings, "--out", tmp_path / out, *SMALL).stdout).name
        for out in ("one", "two")
    }
    assert len(names) == 1


def test_parquet_gives_the_same_tokenizer(run, embeddings: Path, tmp_path: Path):
    rows = list(np.load(embeddings))
    table = pa.table({"x": pa.array(rows, pa.list_(pa.float32(), 8))})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=50)
    fingerprints = set()
    for file in (embeddings, tmp_path / "e.parquet"):
        folder = Path(run("fit", "--embeddings", file, "--out", tmp_path, *SMALL).stdout.strip())
        fingerprints.add(load_tokenizer(folder).fingerprint)
    assert len(fingerprints) == 1


def test_an_rqvae(run, embeddings: Path, tmp_path: Path):
    result = run(
        *("fit", "--embeddings", embeddings, "--out", tmp_path / "t", "--kind", "rqvae", *SMALL),
        *("--epochs", 2, "--latent-dim", 4, "--hidden-dim", 16, "--train-batch-size", 50),
    )
    assert result.exit_code == 0, result.output
    artifact = load_tokenizer(Path(result.stdout.strip()))
    assert artifact.tokenizer.codebooks[0].shape == (16, 4)
    assert artifact.fitted_on["settings"]["batch_size"] == 50


def test_failures_are_one_message_and_write_nothing(fails, embeddings: Path, tmp_path: Path):
    out = tmp_path / "t"

    def failure(*arguments, file: Path = embeddings) -> str:
        message = fails("fit", "--embeddings", file, "--out", out, *arguments)
        assert not out.exists() or list(out.iterdir()) == []
        return message

    assert "num_levels is 0; allowed are 1 to 64" in failure("--num-levels", 0)
    assert "codebook_size is 70000; allowed are 1 to 65536" in failure("--codebook-size", 70_000)
    assert "epochs is 0" in failure("--epochs", 0)
    assert "batch_size is 0" in failure("--batch-size", 0)
    assert "--latent-dim does not apply to --kind rq-kmeans" in failure("--latent-dim", 3)
    assert "--style does not apply" in failure("--kind", "rqvae", "--style", "kmeans")
    assert "learning_rate is" in failure("--kind", "rqvae", "--learning-rate", "nan")
    assert "device is 'tpu9'" in failure("--device", "tpu9")
    assert "GPUs" in failure("--device", "cuda:99")
    assert "does not exist" in failure(file=tmp_path / "none.npy")
    rows = np.load(embeddings)
    rows[7, 1] = np.inf
    np.save(tmp_path / "inf.npy", rows)
    assert "row 7 holds inf" in failure(file=tmp_path / "inf.npy")
