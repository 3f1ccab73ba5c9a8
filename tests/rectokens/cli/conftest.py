"""A fitted tokenizer, embeddings and a table of items on disk; commands run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner, Result

from rectokens.artifacts.tokenizer import save_tokenizer
from rectokens.cli.app import app
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer


@pytest.fixture
def run() -> Callable[..., Result]:
    """``run("encode", "--out", path, ...)``: its result, with stdout and stderr apart."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def fails(run) -> Callable[..., str]:
    """``fails(...)``: the one message on stderr of a command that must fail with exit code 1."""

    def check(*arguments) -> str:
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return check


@pytest.fixture
def data(tmp_path: Path) -> SimpleNamespace:
    """60 items of which the last ten have the embeddings of the first ten."""
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    rows[50:] = rows[:10]
    np.save(tmp_path / "embeddings.npy", rows.numpy())
    tokenizer = RQKMeansTokenizer(3, 8, 6, seed=1).fit_step(rows)
    table = pl.DataFrame(
        {
            "item_id": [f"B{i:03d}" for i in range(60)],
            "popularity": [float(i % 7) for i in range(60)],
            "title": [f"Title {i}" for i in range(60)],
            "price": [i / 2 for i in range(60)],
        }
    )
    table.write_parquet(tmp_path / "items.parquet")
    (tmp_path / "sale.txt").write_text("B001\nB050\nB059\n")
    return SimpleNamespace(
        rows=rows,
        tokenizer=tokenizer,
        table=table,
        embeddings=tmp_path / "embeddings.npy",
        items=tmp_path / "items.parquet",
        sale=tmp_path / "sale.txt",
        tokenizer_dir=save_tokenizer(
            tmp_path / "tokenizers", tokenizer, report={"collision_rate": 0.25}, fitted_on={}
        ),
    )
