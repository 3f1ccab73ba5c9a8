"""Tiny models of many architectures, by whatever way the engine takes: the reference's answers.

Prompts are of unequal lengths and longer than the sliding windows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.recompute_runner import RecomputeRunner
from server.engine.runners import PerBeamRunner, SharedContextRunner
from tests.server.engine.same_answers import assert_same
from tests.server.engine.small_items import ITEMS, TOKENS, TRIE, VOCAB

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED: dict[str, dict[str, Any]] = {
    # Biases, and a window on the second layer only.
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    # Says that it has a window of 0 where it has none.
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    # A window and rotary angles of their own on all layers but one.
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere2": {"sliding_window": 6},
    "gpt2": {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
}
# Attention with sinks, which the engine for devices does not know.
SHARED_ONLY: dict[str, dict[str, Any]] = {
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "sliding_window": 6},
}
# Layers that no other position may be put beside, and attention that is not looked up or has keys
# of another size than values.
PER_BEAM: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"head_dim": 8, **DELTA, "layer_types": ["linear_attention", "full_attention"]},
    # Its cache does not tell how long it is: the first layer is recurrent.
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}
# Transformers' own cache of these cannot be given more rows than it was made with, or is no cache
# of transformers at all.
RECOMPUTED: dict[str, dict[str, Any]] = {
    "minimax": {"num_local_experts": 2, "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32},
}


def model_of(kind: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # HF's initialisation makes near-uniform logits, and biases and sinks of zero.
                if parameter.ndim >= 2 or "bias" in name or "sink" in name:
                    parameter.normal_(0.0, 0.25)
    return model


def requests() -> list[SearchRequest]:
    generator = torch.Generator().manual_seed(0)
    return [
        SearchRequest(
            tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()),
            beam_width=width,
            top_k=width,
            normalization=normalization,
            temperature=temperature,
            seed=5,
        )
        for length, width, normalization, temperature in (
            (3, 4, "level", 0.0),
            (17, 9, "vocab", 0.0),
            (1, 7, "children", 0.5),
            (40, 6, "level", 0.0),
        )
    ]


def check(engine: Any, model: Any) -> None:
    batch, trie = requests(), TRIE.to(model.device)
    reference = ReferenceSearch(model, TOKENS, ITEMS)
    expected = [reference.search(request) for request in batch]
    # The second time, prompts may come from the cache.
    for _ in range(2):
        for found, right in zip(engine.search(batch, trie).results, expected, strict=True):
            assert_same(found, right, atol=1e-4)


@pytest.mark.parametrize("kind", [*SHARED, *SHARED_ONLY])
def test_attention_models_share_their_prompts(kind: str) -> None:
    model = model_of(kind, (SHARED | SHARED_ONLY)[kind])
    options = DeviceOptions() if kind in SHARED_ONLY else None
    engine = build_engine(model, TOKENS, PoolOptions(memory_bytes=1 << 20), options)
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, SharedContextRunner)
    check(engine, model)
    assert engine.prefix_cache is not None
    assert engine.prefix_cache.hit_tokens > 0


@pytest.mark.parametrize("kind", SHARED)
def test_attention_models_on_the_engine_for_devices(kind: str) -> None:
    model = model_of(kind, SHARED[kind])
    engine = build_engine(model, TOKENS, PoolOptions(memory_bytes=1 << 20), DeviceOptions())
    assert isinstance(engine, DeviceEngine)
    check(engine, model)


@pytest.mark.parametrize("kind", PER_BEAM)
def test_others_have_a_cache_a_beam(kind: str) -> None:
    model = model_of(kind, PER_BEAM[kind])
    engine = build_engine(model, TOKENS, PoolOptions(memory_bytes=1 << 20), DeviceOptions())
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, PerBeamRunner)
    check(engine, model)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "bamba", "deepseek_v3"])
def test_no_logits_of_the_vocabulary_beam_by_beam(kind: str) -> None:
    model = model_of(kind, PER_BEAM[kind])
    engine = build_engine(model, TOKENS)
    called: list[Any] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: called.append(1))
    batch = [request for request in requests() if request.normalization != "vocab"]
    assert all(isinstance(found, SearchResult) for found in engine.search(batch, TRIE).results)
    assert called == []


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_where_that_fails_too_prompts_are_computed_again(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(kind, RECOMPUTED[kind])
    engine = build_engine(model, TOKENS)
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, RecomputeRunner)
    assert "every level computes their prompts again" in caplog.text
    check(engine, model)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_scores_of_long_prompts_are_made_in_parts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.packed_attention._MAX_SCORES", 300)
    test_attention_models_share_their_prompts(kind)


@pytest.mark.parametrize("prompt_kind", ["tokens", "embeds"])
def test_computing_again_takes_either_kind_of_prompt(prompt_kind: str) -> None:
    model = model_of("llama", {})
    engine = Engine(model, TOKENS, RecomputeRunner(model, TOKENS))
    batch = requests()
    expected = [ReferenceSearch(model, TOKENS, ITEMS).search(request) for request in batch]
    if prompt_kind == "embeds":
        embed = model.get_input_embeddings()
        batch = [
            SearchRequest(
                (),
                request.beam_width,
                request.top_k,
                normalization=request.normalization,
                temperature=request.temperature,
                seed=request.seed,
                prompt_embeds=embed(torch.tensor(request.prompt)).detach(),
            )
            for request in batch
        ]
    for found, right in zip(engine.search(batch, TRIE).results, expected, strict=True):
        assert_same(found, right, atol=1e-4)


def test_long_sequences_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", {})
    batch = requests()
    whole = Engine(model, TOKENS, RecomputeRunner(model, TOKENS)).search(batch, TRIE).results
    monkeypatch.setattr("server.engine.recompute_runner._MAX_TOKENS", 50)
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    parts = Engine(model, TOKENS, RecomputeRunner(model, TOKENS)).search(batch, TRIE).results
    assert 1 in rows
    for found, right in zip(parts, whole, strict=True):
        assert_same(found, right, atol=1e-5)
