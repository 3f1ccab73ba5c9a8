"""``rectokens inspect``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rectokens.cli.inspect import sparkline
from rectokens.tokenizers.quality import code_use


@pytest.fixture
def catalog_dir(run, data, tmp_path: Path) -> Path:
    result = run(
        "build-catalog",
        *("--tokenizer", data.tokenizer_dir, "--embeddings", data.embeddings),
        *("--ids", data.items, "--out", tmp_path / "catalogs", "--metadata-columns", "*"),
    )
    return Path(result.stdout.strip())


def test_a_catalog_for_people_and_for_programs(run, data, catalog_dir: Path):
    text = run("inspect", catalog_dir)
    assert text.exit_code == 0, text.output
    assert f"catalog {catalog_dir.name}" in text.stdout
    assert "code use" in text.stdout
    summary = json.loads(run("inspect", catalog_dir, "--json", "--verify").stdout)
    assert (summary["kind"], summary["version"]) == ("catalog", catalog_dir.name)
    assert summary["verified"] is True
    assert summary["details"]["config"]["metadata_columns"] == ["popularity", "title", "price"]
    codes = data.tokenizer.encode(data.rows).codes
    for level, use in enumerate(summary["details"]["levels"]):
        expected = torch.bincount(codes[:, level], minlength=8)
        assert use["histogram"] == expected.tolist()
        assert use["codes_used"] == int((expected > 0).sum())


def test_a_tokenizer(run, data):
    text = run("inspect", data.tokenizer_dir, "--verify")
    assert text.exit_code == 0, text.output
    assert "RQKMeansTokenizer" in text.stdout
    summary = json.loads(run("inspect", data.tokenizer_dir, "--json").stdout)
    assert summary["details"]["report"] == {"collision_rate": 0.25}
    assert summary["verified"] is False


def test_damage(fails, run, catalog_dir: Path, tmp_path: Path):
    path = catalog_dir / "items.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert run("inspect", catalog_dir).exit_code == 0
    assert "items.parquet has SHA-256" in fails("inspect", catalog_dir, "--verify")
    path.write_bytes(data[:-1])
    assert "items.parquet has" in fails("inspect", catalog_dir)
    assert "does not exist" in fails("inspect", tmp_path / "none")


def test_code_use():
    use = code_use(torch.tensor([4, 0, 4, 8]))
    assert (use["codes"], use["codes_used"]) == (4, 3)
    assert use["entropy_bits"] == pytest.approx(1.5)
    assert use["perplexity"] == pytest.approx(math.sqrt(8))
    assert use["histogram"] == [4, 0, 4, 8]
    wide = code_use(torch.ones(1000, dtype=torch.long))
    assert len(wide["histogram"]) == 32
    assert sum(wide["histogram"]) == 1000
    assert code_use(torch.tensor([5]))["entropy_bits"] == 0.0


def test_sparkline():
    assert sparkline([0, 1, 8, 4]) == " ▁█▄"
    assert sparkline([0, 1, 10_000]) == " ▁█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([]) == ""
