"""Attention over pages on CUDA, by any of the kernels: the definition's results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rectokens.kernels import context_attention_launch as launch
from rectokens.kernels import paired_launch, pipelined_launch
from rectokens.ops.context_attention import (
    PackedPrompts,
    ScoreRule,
    beam_attention,
    beam_attention_reference,
    cut_into_tiles,
    prompt_attention,
    prompt_attention_reference,
    prompt_tile_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
RULES = [ScoreRule(0.1), ScoreRule(0.1, softcap=3.0), ScoreRule(0.1, window=100)]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def pages(lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Shuffled pages of 64 positions, NaN wherever no prompt is."""
    counts = [-(-length // 64) for length in lengths]
    total = sum(counts) + 2
    order = torch.randperm(total)[: sum(counts)].int()
    table = torch.full((len(lengths), max(counts)), 0, dtype=torch.int32)
    pool = torch.full((2, total, kv_heads, 64, dim), float("nan"))
    taken = 0
    for request, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        own = order[taken : taken + count]
        table[request, :count] = own
        taken += count
        rows = torch.full((2, kv_heads, count * 64, dim), float("nan"))
        rows[:, :, :length] = torch.randn(2, kv_heads, length, dim)
        pool[:, own.long()] = rows.view(2, kv_heads, count, 64, dim).transpose(1, 2)
    keys, values = pool.to(DEVICE, dtype)
    return keys, values, table.to(DEVICE)


@pytest.fixture(params=[True, False], ids=["pipelined", "plain"])
def pipelined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether blocks may overlap."""
    if not request.param:
        monkeypatch.setattr(pipelined_launch, "takes", lambda *_: False)
    return bool(request.param)


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch whose groups of warps share keys."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("goes another way")
    rows: list[int] = []
    real = paired_launch.launch_prompt

    def launch_prompt(query: Tensor, *rest: Tensor, scale: float) -> None:
        rows.append(len(query))
        real(query, *rest, scale=scale)

    monkeypatch.setattr(paired_launch, "launch_prompt", launch_prompt)
    return rows


@pytest.fixture
def always_paired(paired: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The same, and all launches that can are of that kind."""
    monkeypatch.setattr(paired_launch, "is_worthwhile", lambda *_: True)
    return paired


@dataclass(frozen=True)
class Case:
    """Packed prompts and what their attention reads."""

    query: Tensor
    keys: Tensor
    values: Tensor
    packed: PackedPrompts

    def found(self, rule: ScoreRule = RULES[0]) -> Tensor:
        return prompt_attention(self.query, self.keys, self.values, self.packed, rule)

    def wanted(self, rule: ScoreRule = RULES[0]) -> Tensor:
        sides = (self.query.float(), self.keys.float(), self.values.float())
        return prompt_attention_reference(*sides, self.packed, rule)


def case_of(
    counts: list[int], cached: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> Case:
    lengths = [a + b for a, b in zip(counts, cached, strict=True)]
    keys, values, table = pages(lengths, kv_heads, dim, dtype)
    query = torch.randn(sum(counts), (heads + 8) * dim, device=DEVICE).to(dtype)
    query = query[:, : heads * dim].unflatten(1, (heads, dim))
    rows = prompt_tile_rows(dim, dtype, DEVICE)
    requests, starts = cut_into_tiles(counts, lengths, rows)
    packed = PackedPrompts(
        torch.tensor([0, *counts], device=DEVICE).cumsum(0).int(),
        torch.tensor(lengths, device=DEVICE).int(),
        table,
        torch.tensor([*requests, -1], device=DEVICE).int(),
        torch.tensor([*starts, 0], device=DEVICE).int(),
        rows,
        max(lengths),
    )
    return Case(query, keys, values, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("counts", "cached"),
    [
        ([300, 1, 64], [0, 63, 640]),
        ([1100], [0]),
        ([1900, 700], [0, 1]),
        ([5], [2000]),
        ([128, 129, 127, 192, 63, 65], [0, 128, 1, 64, 500, 37]),
        # All ways in which two groups' last turns can differ, and ends of prompts within them.
        ([n % 140 + 1 for n in range(0, 140 * 9, 41)], [n * 17 % 300 for n in range(31)]),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 4, 64), (8, 4, 128), (40, 8, 128)])
def test_groups_that_share_keys(
    counts: list[int],
    cached: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    always_paired: list[int],
) -> None:
    case = case_of(counts, cached, heads, kv_heads, dim, dtype)
    found = case.found()
    assert torch.allclose(found.float(), case.wanted(), rtol=0, atol=TOLERANCE[dtype])
    assert always_paired == [sum(counts)]


def test_groups_that_share_keys_never_meet_what_was_overwritten(paired: list[int]) -> None:
    case = case_of([5000, 3000, 900, 2500], [0, 1111, 0, 2499], 16, 8, 128, torch.bfloat16)
    first = case.found()
    assert torch.allclose(first.float(), case.wanted(), rtol=0, atol=2e-2)
    for _ in range(50):
        assert torch.equal(case.found(), first)
    assert len(paired) == 51


@pytest.mark.parametrize(("longest", "expected"), [(2500, [5500]), (1000, [])])
def test_groups_share_keys_of_long_prompts(
    longest: int, expected: list[int], paired: list[int]
) -> None:
    case = case_of([longest, *[1000] * 3], [0] * 4, 8, 4, 128, torch.bfloat16)
    assert torch.allclose(case.found().float(), case.wanted(), rtol=0, atol=2e-2)
    assert paired == expected


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("counts", "cached"),
    [([300, 1, 64], [0, 63, 640]), ([1100], [0]), ([1900, 700], [0, 1]), ([5], [2000])],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_prompts(
    counts: list[int],
    cached: list[int],
    rule: ScoreRule,
    dtype: torch.dtype,
    dim: int,
    pipelined: bool,
) -> None:
    if pipelined and (dtype == torch.float32 or rule != RULES[0]):
        pytest.skip("goes the plain way")
    case = case_of(counts, cached, 8, 4, dim, dtype)
    found, wanted = case.found(rule), case.wanted(rule)
    assert torch.allclose(found.float(), wanted, rtol=0, atol=TOLERANCE[dtype])
    bulk = launch.takes_bulk(dim, dtype, 64, launch.prompt_tile(dim, dtype), DEVICE)
    assert bulk is (dtype.itemsize == 2 and torch.cuda.get_device_capability() >= (9, 0))


@dataclass(frozen=True)
class Beams:
    """Beams of some requests and what their attention reads."""

    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    table: Tensor
    own: tuple[Tensor, Tensor]
    paths: Tensor
    step: int

    def found(self, rule: ScoreRule = RULES[0]) -> Tensor:
        sides = (self.query, self.keys, self.values)
        return beam_attention(
            *sides, self.lengths, self.table, *self.own, self.paths, self.step, rule
        )

    def wanted(self, rule: ScoreRule = RULES[0]) -> Tensor:
        sides = (self.query.float(), self.keys.float(), self.values.float())
        own = [side.float() for side in self.own]
        return beam_attention_reference(
            *sides, self.lengths, self.table, *own, self.paths, self.step, rule
        )


def beams_of(
    lengths: list[int],
    width: int,
    dtype: torch.dtype,
    step: int = 1,
    shape: tuple[int, int, int] = (8, 4, 128),
) -> Beams:
    heads, kv_heads, dim = shape
    keys, values, table = pages([max(n, 1) for n in lengths], kv_heads, dim, dtype)
    rows = len(lengths) * width
    query = torch.randn(rows, (heads + 8) * dim, device=DEVICE).to(dtype)
    query = query[:, : heads * dim].unflatten(1, (heads, dim))
    own = [torch.randn(4, rows, kv_heads, dim, device=DEVICE).to(dtype) for _ in "kv"]
    for side in own:
        side[step + 1 :] = float("nan")
    paths = torch.randint(0, width, (len(lengths), width, 5), device=DEVICE).int()
    paths[:, :, step] = torch.arange(width, device=DEVICE)
    ends = torch.tensor(lengths, device=DEVICE).int()
    return Beams(query, keys, values, ends, table, (own[0], own[1]), paths, step)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("lengths", "width"),
    [([1000, 0, 70], 64), ([2049], 256), ([5], 3), ([1000, 64, 0, 777], 256), ([130] * 9, 256)],
)
def test_beams(
    lengths: list[int], width: int, rule: ScoreRule, dtype: torch.dtype, pipelined: bool
) -> None:
    if pipelined and (dtype == torch.float32 or rule != RULES[0]):
        pytest.skip("goes the plain way")
    case = beams_of(lengths, width, dtype)
    found, wanted = case.found(rule), case.wanted(rule)
    assert torch.allclose(found.float(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.fixture
def paired_beams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch whose groups of warps share the keys of contexts."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("goes another way")
    rows: list[int] = []
    real = paired_launch.launch_beams

    def launch_beams(query: Tensor, *rest: Any, scale: float) -> None:
        rows.append(len(query))
        real(query, *rest, scale=scale)

    monkeypatch.setattr(paired_launch, "launch_beams", launch_beams)
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "width", "step"),
    [
        ([1000, 0, 70], 64, 0),
        ([2049], 256, 1),
        ([5], 3, 2),
        ([1000, 64, 0, 777, 128, 129, 127, 1], 256, 1),
        ([130, 0, 700] * 9, 256, 3),
        # Tiles whose second half has no beam, or one.
        ([300, 0, 1111, 64], 32, 1),
        ([300, 0, 1111, 65], 33, 1),
        ([300, 0, 1111, 192], 95, 0),
        ([n * 131 % 1700 for n in range(40)], 96, 1),
    ],
)
@pytest.mark.parametrize("shape", [(8, 4, 64), (8, 4, 128), (40, 8, 128)])
def test_beams_of_groups_that_share_keys(
    lengths: list[int],
    width: int,
    step: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    paired_beams: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paired_launch, "fills", lambda *_: True)
    case = beams_of(lengths, width, dtype, step, shape)
    found = case.found()
    assert torch.allclose(found.float(), case.wanted(), rtol=0, atol=TOLERANCE[dtype])
    assert paired_beams == [len(lengths) * width]


def test_beams_of_groups_that_share_keys_never_meet_what_was_overwritten(
    paired_beams: list[int],
) -> None:
    case = beams_of([5000, 3000, 900, 0, 2500, 64, 4999, 129], 256, torch.bfloat16, 1, (16, 8, 128))
    first = case.found()
    assert torch.allclose(first.float(), case.wanted(), rtol=0, atol=2e-2)
    for _ in range(50):
        assert torch.equal(case.found(), first)
    assert len(paired_beams) == 51


@pytest.mark.parametrize(("requests", "is_paired"), [(8, True), (1, False)])
def test_groups_share_keys_of_many_beams(
    requests: int, is_paired: bool, paired_beams: list[int]
) -> None:
    case = beams_of([1000] * requests, 256, torch.bfloat16, 1, (16, 8, 128))
    assert torch.allclose(case.found().float(), case.wanted(), rtol=0, atol=2e-2)
    assert paired_beams == [2048] * is_paired
