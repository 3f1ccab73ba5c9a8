"""What FP8 changes is counted as it should be, and refused again afterwards."""

from __future__ import annotations

import pytest
import torch

from examples.scripts.benchmark.benchmark_fp8 import compare, fp8_anywhere
from rectokens.schemas.search import SearchHit, SearchResult
from server.engine import loading


def result(*hits: tuple[int, float]) -> SearchResult:
    return SearchResult(tuple(SearchHit(item, (item,), score, (score,)) for item, score in hits))


def test_counts() -> None:
    one = [result((1, -1.0), (2, -2.0)), result((5, -1.0), (6, -3.0))]
    other = [result((1, -1.5), (3, -2.0)), result((6, -2.5), (5, -2.0))]
    share, first, gap = compare(one, other)
    assert share == 0.75
    assert first == 0.5
    assert gap == 0.5
    assert compare(one, one) == (1.0, 1.0, 0.0)
    assert compare([result()], [result()]) == (0.0, 0.0, 0.0)


def test_a_cpu_is_refused_again_afterwards() -> None:
    cpu = torch.device("cpu")
    with fp8_anywhere():
        assert loading.fp8_refusal(cpu, torch.bfloat16) is None
    assert loading.fp8_refusal(cpu, torch.bfloat16) is not None
    with pytest.raises(RuntimeError, match="raised"), fp8_anywhere():
        raise RuntimeError("raised")
    assert loading.fp8_refusal(cpu, torch.bfloat16) is not None
