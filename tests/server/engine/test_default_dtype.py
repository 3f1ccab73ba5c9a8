"""Another thread may change torch's default type at any time: loading a 16-bit model does so."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rectokens.schemas.search import SearchRequest
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.engine import Engine
from server.engine.loading import build_engine, load_engine
from server.engine.recompute_runner import RecomputeRunner
from server.engine.runners import PerBeamRunner, SharedContextRunner
from tests.server.engine.device.device_cases import (
    KINDS,
    OPTIONS,
    POOL,
    TOKENS,
    VOCAB,
    olmo2,
    random_catalog,
)
from tests.server.engine.same_answers import assert_same

TRIE, _ = random_catalog(2, 30)
EVEN = torch.arange(31, dtype=torch.int32).div(2, rounding_mode="trunc").int()
BATCH = [
    SearchRequest((1, 2, 3) * 7, 12, 9, normalization="vocab"),
    SearchRequest((3, 1), 4, 4, normalization="level", excluded_items=torch.tensor([1, 5, 9])),
    SearchRequest((2,) * 30, 7, 7, temperature=0.7, seed=5, allowed_prefix=EVEN),
    SearchRequest((1,), 15, 3, allowed_items=torch.tensor([2, 3, 17])),
]


ROOT = Path(__file__).parents[3]
# What runs in a service that may load a model meanwhile.
RUNNING = [
    ROOT / "server",
    ROOT / "rectokens/prompt_embeds.py",
    *(
        ROOT / "rectokens" / name
        for name in ("_turboquant", "catalog", "decoding", "kernels", "ops", "prompts", "schemas")
    ),
]
# Where nobody names a type, these take the default.
FACTORIES = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "zeros"}


@contextmanager
def default_of(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(engine: Engine | DeviceEngine) -> None:
    expected = engine.search(BATCH, TRIE).results
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with default_of(dtype):
            found = engine.search(BATCH, TRIE).results
        for one, wanted in zip(found, expected, strict=True):
            assert_same(one, wanted, 1e-6)


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["any device", "for devices"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_it(
    kind: str, options: DeviceOptions | None, tiny_lm: Callable[..., Any]
) -> None:
    model = olmo2() if kind == "olmo2" else tiny_lm(kind, VOCAB, seed=3)
    check(build_engine(model, TOKENS, POOL, options))


@pytest.mark.parametrize("runner", [SharedContextRunner, PerBeamRunner, RecomputeRunner])
def test_nor_do_those_of_any_runner(runner: Any, tiny_lm: Callable[..., Any]) -> None:
    model = tiny_lm("qwen3", VOCAB, seed=3)
    check(Engine(model, TOKENS, runner(model, TOKENS)))


def test_nor_do_those_of_an_engine_that_is_made_meanwhile(tiny_lm: Callable[..., Any]) -> None:
    """What it keeps, as the buffers of its searches, has the type that is meant for ever."""
    model = tiny_lm("llama", VOCAB, seed=3)
    for options in (None, OPTIONS):
        expected = build_engine(model, TOKENS, POOL, options).search(BATCH, TRIE).results
        with default_of(torch.bfloat16):
            engine = build_engine(model, TOKENS, POOL, options)
            engine.get_ready(TRIE)
            engine.search(BATCH[:1], TRIE)
        for one, wanted in zip(engine.search(BATCH, TRIE).results, expected, strict=True):
            assert_same(one, wanted, 1e-6)


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["any device", "for devices"])
def test_nor_on_a_model_that_is_loaded_meanwhile(
    options: DeviceOptions | None,
    tiny_lm: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import LlamaForCausalLM

    tiny_lm("llama", VOCAB, seed=4).to(torch.bfloat16).save_pretrained(tmp_path)
    engine = build_engine(tiny_lm("llama", VOCAB, seed=3), TOKENS, POOL, options)
    expected = engine.search(BATCH, TRIE).results
    make = LlamaForCausalLM.__init__

    def searched_meanwhile(model: Any, *args: Any, **kwargs: Any) -> None:
        make(model, *args, **kwargs)
        with ThreadPoolExecutor(1) as other:
            found = other.submit(engine.search, BATCH, TRIE).result().results
        for one, wanted in zip(found, expected, strict=True):
            assert_same(one, wanted, 1e-6)
        monkeypatch.undo()

    monkeypatch.setattr(LlamaForCausalLM, "__init__", searched_meanwhile)
    load_engine(tmp_path, TOKENS, device="cpu", dtype="bfloat16")
    assert LlamaForCausalLM.__init__ is make


def unnamed(source: str) -> list[int]:
    """Lines that make a tensor of the default type."""
    return [
        call.lineno
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr) in {("torch", name) for name in FACTORIES}
        and not any(keyword.arg in ("dtype", None) for keyword in call.keywords)
    ]


def test_nothing_that_runs_beside_a_loader_makes_tensors_of_the_default_type() -> None:
    """Not all of it is run here: kernels' buffers, for one."""
    assert unnamed("x = torch.zeros(3)\ny = torch.ones(3, dtype=z)\n") == [1]
    files = [file for path in RUNNING for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert len(files) > 200
    assert {str(file): lines for file in files if (lines := unnamed(file.read_text()))} == {}
