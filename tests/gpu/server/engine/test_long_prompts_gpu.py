"""Captured passes over long prompts: another kernel than for short ones, the same answers."""

from __future__ import annotations

import pytest
import torch

from rectokens.kernels import paired_launch
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from tests.server.engine.device.device_cases import TOKENS, VOCAB, random_catalog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper device",
    ),
]
ROWS = (64, 2304, 4096)


def engine_of() -> DeviceEngine:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().cuda()
    options = DeviceOptions(Buckets((1, 4), (12,), 48), prompt_rows=ROWS)
    # No prompt is kept, so that every search computes all rows.
    engine = build_engine(model, TOKENS, PoolOptions(64 << 20, keep=False), options)
    assert isinstance(engine, DeviceEngine)
    return engine


def request(length: int) -> SearchRequest:
    return SearchRequest(tuple((n * n + length) % VOCAB for n in range(length)), 12, 12)


def test_long_prompts_take_passes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    monkeypatch.setattr(paired_launch, "is_worthwhile", lambda *_: False)
    other = engine_of()
    long = [(rows, True) for rows in ROWS if rows >= paired_launch.MIN_ROWS]
    short = [(rows, False) for rows in ROWS]
    assert set(engine._passes._ready) == {*short, *long}
    assert set(other._passes._ready) == set(short)
    monkeypatch.setattr(type(engine._model), "run_prompts", None)  # nothing runs uncaptured
    trie = random_catalog(5, 40)[0].to("cuda")
    taken = []
    for kind, (block, run) in list(engine._passes._ready.items()):
        engine._passes._ready[kind] = block, lambda kind=kind, run=run: taken.append(kind) or run()
    for lengths, expected in (
        ([2100], (2304, True)),
        ([3000, 900, 150], (4096, True)),
        ([2000, 1900], (4096, False)),
        ([2047], (2304, False)),
        ([60], (64, False)),
    ):
        batch = [request(length) for length in lengths]
        found, wanted = (one.search(batch, trie).results for one in (engine, other))
        assert taken.pop() == expected
        assert taken == []
        for mine, theirs in zip(found, wanted, strict=True):
            assert isinstance(mine, SearchResult)
            assert isinstance(theirs, SearchResult)
            scores = {hit.item_index: hit.score for hit in theirs.hits}
            common = [hit for hit in mine.hits if hit.item_index in scores]
            assert len(common) >= 9
            assert all(abs(hit.score - scores[hit.item_index]) < 0.1 for hit in common)
