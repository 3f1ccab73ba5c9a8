"""The device engine in FP8: the same search, rounded; refused where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine import loading
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.device.fp8 import let_go_of_rounded
from server.engine.device.fused_decoder import Fp8Projection
from server.engine.loading import build_engine, load_engine
from tests.server.engine.device.device_cases import OPTIONS, POOL, TOKENS, VOCAB, random_catalog

IN_FP8 = DeviceOptions(OPTIONS.buckets, fp8=True)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "fp8_refusal", lambda device, dtype: None)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_nearly_the_same_items(tiny_lm: Callable[..., Any], kind: str) -> None:
    trie, _ = random_catalog(5, 60)
    model = tiny_lm(kind, VOCAB, seed=3).bfloat16()
    if kind == "gemma2":
        model.set_attn_implementation("eager")
    engines = [build_engine(model, TOKENS, POOL, options) for options in (OPTIONS, IN_FP8)]
    for engine, wanted in zip(engines, (False, True), strict=True):
        assert isinstance(engine, DeviceEngine)
        layer = engine._model.decoder.layers[0]  # type: ignore[attr-defined]
        assert isinstance(layer.qkv, Fp8Projection) is wanted
    batch = [SearchRequest(tuple(range(n % 20, 30)), 12, 12) for n in range(6)]
    shared = total = 0
    for plain, rounded in zip(*(e.search(batch, trie).results for e in engines), strict=True):
        assert isinstance(plain, SearchResult)
        assert isinstance(rounded, SearchResult)
        scores = {hit.item_index: hit.score for hit in plain.hits}
        found = {hit.item_index: hit.score for hit in rounded.hits}
        common = scores.keys() & found.keys()
        shared += len(common)
        total += len(scores)
        assert all(abs(scores[item] - found[item]) < 1.0 for item in common)
        assert any(scores[item] != found[item] for item in common)
    assert shared / total > 0.6


@pytest.mark.usefixtures("allowed")
def test_the_rounded_weights_need_not_be_kept(tiny_lm: Callable[..., Any]) -> None:
    trie, _ = random_catalog(5, 60)
    model = tiny_lm("qwen3", VOCAB, seed=3).bfloat16()
    engine = build_engine(model, TOKENS, POOL, IN_FP8)
    request = [SearchRequest((1, 2, 3), 12, 12)]
    before = engine.search(request, trie).results
    held = sum(parameter.numel() for parameter in model.parameters())
    let_go_of_rounded(model)
    left = sum(parameter.numel() for parameter in model.parameters())
    # Three layers: 32 x (32 + 2 x 16) and 3 x 32 x 48.
    assert held - left == 3 * (32 * 64 + 3 * 32 * 48)
    assert engine.search(request, trie).results == before


@pytest.mark.usefixtures("allowed")
def test_layers_that_are_not_understood_are_refused(tiny_lm: Callable[..., Any]) -> None:
    model = tiny_lm("llama", VOCAB, seed=3).bfloat16()
    model.get_decoder().layers[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="cannot be computed in FP8"):
        build_engine(model, TOKENS, POOL, IN_FP8)


def test_a_device_without_fp8_is_refused(tiny_lm: Callable[..., Any], tmp_path: Any) -> None:
    model = tiny_lm("llama", VOCAB, seed=3)
    with pytest.raises(ValueError, match=r"capability 8\.9 or higher; this is a cpu"):
        build_engine(model, TOKENS, POOL, IN_FP8)
    # Before anything is read: the folder holds nothing.
    with pytest.raises(ValueError, match=r"capability 8\.9 or higher; this is a cpu"):
        load_engine(tmp_path, TOKENS, device="cpu", device_options=IN_FP8)
