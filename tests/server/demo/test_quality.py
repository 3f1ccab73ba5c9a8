"""On real data, through HTTP, the demo's model clearly beats popularity."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from server.demo.command import run_demo


@pytest.mark.slow
def test_a_short_training_clearly_beats_popularity_on_real_data(tmp_path):
    root = os.environ.get("RECTOKENS_DATA_DIR")
    if not root:
        pytest.skip("RECTOKENS_DATA_DIR is not set: no folder with amazon-beauty to learn from")
    console = Console(file=io.StringIO(), width=100)
    result = run_demo(
        Path(root),
        tmp_path / "store",
        epochs=1,
        train_seconds=60,
        evaluate=True,
        evaluate_users=1000,
        console=console,
    )
    assert result.evaluation is not None
    model, popularity = result.evaluation.model, result.evaluation.popularity
    assert model.users == popularity.users == 1000
    # A full run reaches four times popularity and more. This one reaches about three, also where a
    # machine is so slow that its time ends before the data does.
    assert model.recall > 1.7 * popularity.recall, console.file.getvalue()
    assert model.ndcg > 1.7 * popularity.ndcg, console.file.getvalue()
