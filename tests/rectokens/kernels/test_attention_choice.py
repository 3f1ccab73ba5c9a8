"""Which kernel computes the attention of prompts: by their length, where the device has several."""

from __future__ import annotations

import pytest
import torch

from rectokens.kernels import context_attention_launch as launch
from rectokens.kernels import paired_launch, pipelined_launch

LONG = paired_launch.MIN_POSITIONS
MANY = paired_launch.MIN_ROWS
CPU = torch.device("cpu")


@pytest.fixture(params=["hopper", "other"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(pipelined_launch, "takes", lambda *_: request.param == "hopper")
    return str(request.param)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would have been launched."""
    names: list[str] = []
    monkeypatch.setattr(paired_launch, "launch_prompt", lambda *_, **__: names.append("paired"))
    monkeypatch.setattr(
        pipelined_launch, "launch_prompt", lambda *_, **__: names.append("pipelined")
    )
    monkeypatch.setattr(launch, "launcher", lambda *_: lambda *_, **__: names.append("plain"))
    return names


def run(rows: int, **asked: object) -> None:
    query = torch.empty(rows, 2, 64, dtype=torch.bfloat16)
    pages = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16)
    ints = torch.zeros(1, dtype=torch.int32)
    launch.launch_prompt(
        query, pages, pages, ints, ints, ints, ints, ints[None], query,
        **{"scale": 1.0, "window": None, "softcap": None, **asked},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        (MANY, {"longest": LONG}, "paired"),
        (8192, {"longest": 5000}, "paired"),
        (MANY - 1, {"longest": LONG}, "pipelined"),
        (MANY, {"longest": LONG - 1}, "pipelined"),
        (8192, {}, "pipelined"),
        (8192, {"longest": 5000, "paired": False}, "pipelined"),
        (8192, {"longest": 5000, "pipelined": True}, "pipelined"),
        (8192, {"longest": 5000, "pipelined": False}, "plain"),
        (8192, {"longest": 5000, "window": 100}, "plain"),
        (8192, {"longest": 5000, "softcap": 3.0}, "plain"),
        (8192, {"longest": 5000, "cut_rows": 256}, "pipelined"),
        (64, {"paired": True}, "paired"),
    ],
)
def test_the_kernel_of_a_launch(
    device: str, launched: list[str], rows: int, asked: dict[str, object], expected: str
) -> None:
    run(rows, **asked)
    forced = asked.get("paired") or asked.get("pipelined")
    assert launched == [expected if device == "hopper" or forced else "plain"]


@pytest.mark.parametrize(("rows", "expected"), [(MANY, LONG), (8192, LONG), (2048, None)])
def test_from_where_on_a_prompt_is_long(device: str, rows: int, expected: int | None) -> None:
    found = launch.long_from(128, torch.bfloat16, 64, CPU, rows)
    assert found == (expected if device == "hopper" else None)


def test_tiles_of_other_types_are_not_paired(device: str) -> None:
    assert launch.long_from(128, torch.float32, 64, CPU, 8192) is None


@pytest.mark.parametrize(("heads", "expected"), [(16, 16), (8, 8), (32, 16), (40, 10), (1, 1)])
def test_heads_are_computed_in_equal_shares(heads: int, expected: int) -> None:
    assert paired_launch.together(heads) == expected
