"""Training that is stopped, refused, or out of disk."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.scratch.build import FIGURES, train_release
from examples.scratch.settings import CodesSettings, OptimizerSettings
from examples.scratch.stream import WindowStream
from examples.scratch.trainer import ScratchTrainer
from examples.trainer.checkpoints import CheckpointError, last_checkpoint
from rectokens.artifacts.release import load_release
from tests.full_disk import file_size_limit

ROOT = Path(__file__).parents[3]


def same_result(folder, release, reference, expected):
    """Weights, figures and logged rows are those of the run that nobody stopped."""
    found, wanted = load_release(release), load_release(expected)
    assert found.catalog_path.name == wanted.catalog_path.name
    weights = [load_file(one.model_path / "model.safetensors") for one in (found, wanted)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    figures = [json.loads((one / FIGURES).read_text()) for one in (folder, reference)]
    assert figures[0]["validation"] == figures[1]["validation"]
    assert figures[0]["test"] == figures[1]["test"]
    assert logged(folder) == logged(reference)


def logged(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.reader(file) if not row[1].startswith("train_")]


@pytest.mark.parametrize("step", [2, 5, 9])
def test_stopped_and_continued(trained, data, recipe, options, tmp_path, step):
    with pytest.MonkeyPatch.context() as patch:
        original = WindowStream.from_step

        def limited(self, first):
            for number, batch in enumerate(original(self, first), start=first):
                if number == step:
                    raise KeyboardInterrupt
                yield batch

        patch.setattr(WindowStream, "from_step", limited)
        with pytest.raises(KeyboardInterrupt):
            train_release(data, tmp_path, recipe, options)
    same_result(tmp_path, train_release(data, tmp_path, recipe, options), *trained)


def test_a_run_that_is_over_is_not_trained_again(trained, data, recipe, options, tmp_path):
    folder, release = trained
    stamp = (folder / "metrics.csv").stat().st_mtime_ns
    assert train_release(data, folder, recipe, options) == release
    assert (folder / "metrics.csv").stat().st_mtime_ns == stamp


_KILLED = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}, {here!r}]
from conftest import OPTIONS, SMALL_RECIPE, small_data
from examples.scratch.build import train_release
from tests.full_disk import file_size_limit
from pathlib import Path
train_release(small_data(), Path({folder!r}), SMALL_RECIPE, OPTIONS)
"""


def test_a_run_that_goes_on_keeps_its_semantic_ids(trained, data, recipe, options, tmp_path):
    """Even where fitting again would give others, as it does with other threads."""
    from examples.scratch import items

    def stopping(self, first):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowStream, "from_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_release(data, tmp_path, recipe, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items, "fit_rq_kmeans", None)
        same_result(tmp_path, train_release(data, tmp_path, recipe, options), *trained)


@pytest.mark.slow
def test_killed_and_continued(trained, data, recipe, options, tmp_path):
    code = _KILLED.format(root=str(ROOT), here=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob("checkpoint-*/model.safetensors")):
                break  # in the middle of writing a checkpoint, most likely
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    same_result(tmp_path, train_release(data, tmp_path, recipe, options), *trained)


def test_half_checkpoints_do_not_count(tmp_path):
    half = tmp_path / "checkpoint-9"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path, {}) is None
    assert not half.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": OptimizerSettings(epochs=7, batch_size=16)}, r"optimizer\.epochs 6, now 7"),
        ({"codes": CodesSettings(num_levels=2, codebook_size=16)}, r"codebook_size 8, now 16"),
    ],
)
def test_another_run_s_folder_is_refused(trained, data, recipe, options, change, message):
    folder, _ = trained
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        train_release(data, folder, replace(recipe, **change), options)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("limit", [1_000, 18_000, 40_000])
def test_a_full_disk_leaves_the_checkpoint_before(trained, data, recipe, options, tmp_path, limit):
    original = ScratchTrainer._save_checkpoint

    def save(self, model, trial):
        with file_size_limit(limit) if self.state.global_step == 6 else nullcontext():
            original(self, model, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScratchTrainer, "_save_checkpoint", save)
        with pytest.raises(OSError, match=r"checkpoint-6 could not be written.*is whole"):
            train_release(data, tmp_path, recipe, options)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    same_result(tmp_path, train_release(data, tmp_path, recipe, options), *trained)
