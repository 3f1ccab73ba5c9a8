"""The benchmark of the beam step, tried out on the CPU at small sizes."""

import csv
from types import SimpleNamespace

import pytest
import torch

from examples.scripts.benchmark import benchmark_beam_step as benchmark

SMALL = ["--device", "cpu", "--items", "400", "--codes", "30", "--shapes", "1x4", "2x20",
         "--catalogs", "skewed"]  # fmt: skip


def test_a_row_a_level_and_one_of_the_ends(tmp_path):
    benchmark.main([*SMALL, "--out", str(tmp_path)])
    with (tmp_path / "beam_step.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["level"] for line in lines] == ["0", "1", "2", "ends"] * 4
    assert {(line["B"], line["W"]) for line in lines} == {("1", "4"), ("2", "20")}
    steps = [line for line in lines if line["level"] != "ends"]
    assert all(float(line["ms_pytorch"]) > 0 and int(line["pairs"]) > 0 for line in steps)


def test_wrong_beams_are_not_timed(tmp_path, monkeypatch):
    right = benchmark.plain_pytorch.step

    def wrong(table, buffers, *rest):
        right(table, buffers, *rest)
        buffers.scores[1:] -= 1.0

    monkeypatch.setattr(benchmark, "plain_pytorch", SimpleNamespace(step=wrong))
    with pytest.raises(AssertionError, match="not close"):
        benchmark.main([*SMALL, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device"):
        benchmark.main([])
