"""Models whose prompts depend on more than transformers' attention arguments tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.engine import DeviceOptions
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.positions import max_positions
from server.engine.runners import PerBeamRunner, SharedContextRunner
from server.engine.types import EngineFault
from tests.server.engine.small_items import ITEMS, LEVELS, TOKENS, TRIE, VOCAB

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def model_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, 0.25)
    return model


def request(length: int, seed: int = 0) -> SearchRequest:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    return SearchRequest(tuple(prompt), beam_width=6, top_k=6)


def scores_of(result: Any) -> list[float]:
    assert isinstance(result, SearchResult)
    return [hit.score for hit in result.hits]


def test_positions_that_turn_when_a_neighbour_is_long_are_not_used() -> None:
    from transformers import Phi3Config

    model = model_of(
        Phi3Config(
            **SIZES,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 4,
                "long_factor": [8.0, 4.0, 3.0, 2.0],
            },
        )
    )
    engine = build_engine(model, TOKENS, PoolOptions(memory_bytes=1 << 20))
    assert isinstance(engine._runner, SharedContextRunner)
    assert engine.max_prompt_tokens == 64 - LEVELS + 1
    short, longest, longer = request(40), request(62, 1), request(63, 2)
    (alone,) = engine.search([short], TRIE).results
    together = engine.search([short, longest, longer], TRIE).results
    assert scores_of(together[0]) == pytest.approx(scores_of(alone), abs=1e-5)
    expected = ReferenceSearch(model, TOKENS, ITEMS).search(longest)
    assert scores_of(together[1]) == pytest.approx(scores_of(expected), abs=1e-4)
    assert isinstance(together[2], EngineFault)


def test_a_window_that_is_in_the_mask_only_is_found_out() -> None:
    from transformers import Qwen2MoeConfig

    model = model_of(
        Qwen2MoeConfig(
            **SIZES,
            max_position_embeddings=128,
            use_sliding_window=True,
            sliding_window=12,
            max_window_layers=0,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )
    assert isinstance(build_engine(model, TOKENS, None, DeviceOptions()), Engine)
    engine = build_engine(model, TOKENS)
    assert isinstance(engine._runner, PerBeamRunner)
    asked = request(40)
    (found,) = engine.search([asked], TRIE).results
    expected = ReferenceSearch(model, TOKENS, ITEMS).search(asked)
    assert scores_of(found) == pytest.approx(scores_of(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, 512),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "longrope"}, 512),
        (
            {
                "sliding_attention": {"rope_type": "default"},
                "full_attention": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 128,
                },
            },
            128,
        ),
    ],
)
def test_positions_of_rotary_embeddings(rope: dict[str, Any], expected: int) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(max_position_embeddings=512)
    config.rope_parameters = rope
    assert max_positions(config) == expected
