"""Which kernel computes an attention: by how much there is of it, where the device has several."""

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


@pytest.fixture
def launched_for_beams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would have been launched for beams."""
    names: list[str] = []
    monkeypatch.setattr(paired_launch, "launch_beams", lambda *_, **__: names.append("paired"))
    monkeypatch.setattr(
        pipelined_launch, "launch_context", lambda *_, **__: names.append("pipelined")
    )
    monkeypatch.setattr(
        launch, "launcher", lambda kernel, _: lambda *_, **__: names.append(kernel.__name__)
    )
    for module in (launch, paired_launch):
        monkeypatch.setattr(module, "multiprocessors", lambda *_: 132)
    return names


PAIRED = ["paired"]
PIPELINED = ["pipelined", "merge_kernel"]
PLAIN = ["context_kernel", "merge_kernel"]


@pytest.mark.parametrize(
    ("requests", "width", "asked", "expected"),
    [
        (8, 256, {}, PAIRED),
        (4, 256, {}, PAIRED),
        (16, 64, {}, PAIRED),
        (2, 256, {}, PIPELINED),
        (1, 256, {}, PLAIN),
        # Half of each tile would be empty; a quarter; an eighth.
        (64, 32, {}, PIPELINED),
        (32, 96, {}, PIPELINED),
        (16, 224, {}, PAIRED),
        (8, 256, {"parts": 1}, PIPELINED),
        (8, 256, {"pipelined": True}, PIPELINED),
        (8, 256, {"paired": False}, PIPELINED),
        (8, 256, {"window": 100}, PLAIN),
        (8, 256, {"softcap": 3.0}, PLAIN),
        (1, 256, {"paired": True}, PAIRED),
    ],
)
def test_the_kernel_of_beams(
    device: str,
    launched_for_beams: list[str],
    requests: int,
    width: int,
    asked: dict[str, object],
    expected: list[str],
) -> None:
    query = torch.empty(requests * width, 16, 64, dtype=torch.bfloat16)
    own = torch.empty(1, requests * width, 8, 64, dtype=torch.bfloat16)
    pages = torch.empty(1, 8, 64, 64, dtype=torch.bfloat16)
    ints = torch.zeros(requests, dtype=torch.int32)
    paths = torch.zeros(requests, width, 2, dtype=torch.int32)
    launch.launch_beams(
        query, pages, pages, ints, ints[:, None], own, own, paths, 0,
        **{"scale": 1.0, "window": None, "softcap": None, **asked},
    )  # fmt: skip
    forced = asked.get("paired") or asked.get("pipelined")
    assert launched_for_beams == (expected if device == "hopper" or forced else PLAIN)
