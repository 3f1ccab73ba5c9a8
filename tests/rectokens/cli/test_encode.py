"""``rectokens encode``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rectokens.catalog.tables import read_codes


@pytest.mark.parametrize("name", ["codes.npy", "codes.parquet"])
def test_writes_the_codes_the_tokenizer_gives(run, data, tmp_path: Path, name: str):
    out = tmp_path / "out" / name
    result = run(
        "encode",
        *("--tokenizer", data.tokenizer_dir, "--embeddings", data.embeddings),
        *("--out", out, "--batch-size", 7),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert torch.equal(read_codes(out), data.tokenizer.encode(data.rows).codes)
    assert "identical embeddings alone: 0.3333" in result.stderr


def test_failures_are_one_message_and_write_nothing(fails, data, tmp_path: Path):
    out = tmp_path / "codes.npy"

    def encode(**changes) -> str:
        options = {
            "tokenizer": data.tokenizer_dir,
            "embeddings": data.embeddings,
            "out": out,
            **changes,
        }
        message = fails("encode", *(x for k, v in options.items() for x in (f"--{k}", v)))
        assert not out.exists()
        assert not list(tmp_path.glob(".partial*"))
        return message

    assert "written as .npy or .parquet" in encode(out=tmp_path / "codes.txt")
    assert "does not exist" in encode(tokenizer=tmp_path / "none")
    assert "does not exist" in encode(embeddings=tmp_path / "none.npy")
    wide = tmp_path / "wide.npy"
    np.save(wide, np.zeros((3, 7), dtype=np.float32))
    assert "embeddings of width 7; the tokenizer takes 6" in encode(embeddings=wide)
    rows = data.rows.numpy().copy()
    rows[31, 2] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    assert "row 31 holds nan" in encode(embeddings=tmp_path / "nan.npy")


def test_usage_errors_exit_with_two(run):
    assert run("encode").exit_code == 2
    assert run("encode", "--what").exit_code == 2
