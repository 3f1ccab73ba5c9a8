import sys

import pytest
import torch

from examples.scripts.benchmark import benchmark_fit
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer


def test_prints_a_line_for_every_way_of_fitting(monkeypatch, capsys):
    arguments = "--rows 300 --dim 8 --levels 2 --codes 8 --batch-size 128 --passes 1"
    monkeypatch.setattr(sys, "argv", ["benchmark_fit", *arguments.split()])
    benchmark_fit.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("300 x 8 float32, 2 x 8 codes")
    starts = ("minibatch", "fit_rq_kmeans, kmeans", "fit_rq_kmeans, balanced", "fit_rq_kmeans, sep")
    assert all(line.startswith(start) for line, start in zip(lines[1:], starts, strict=True))


def test_wrong_codes_print_no_time():
    tokenizer = RQKMeansTokenizer(1, 4, 2).fit_step(torch.randn(20, 2))
    right = tokenizer.encode
    tokenizer.encode = lambda rows: type(right(rows))((right(rows).codes + 1) % 4)
    with pytest.raises(RuntimeError, match="not the nearest"):
        benchmark_fit.check_exact(tokenizer, torch.randn(20, 2))
