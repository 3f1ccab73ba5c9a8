"""What all tests share: one torch thread, the same chance every time, and tiny language models."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# The gate tries the same examples every time, however slow the machine; `make chaos` new ones.
_ALWAYS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        # Fixtures that examples share are only read, or are meant to be gone through by all.
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
}
hypothesis.settings.register_profile("gate", derandomize=True, **_ALWAYS)
hypothesis.settings.register_profile("explore", print_blob=True, **_ALWAYS)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the environment are none of the test's."""
    for name in os.environ:
        if name.upper().startswith(("RECTOKENS_", "SGP_")):
            monkeypatch.delenv(name)


_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _config(kind: str, vocab_size: int) -> Any:
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

    if kind == "qwen3":
        return Qwen3Config(**_COMMON, vocab_size=vocab_size, tie_word_embeddings=True)
    if kind == "llama":
        return LlamaConfig(**_COMMON, vocab_size=vocab_size, tie_word_embeddings=False)
    if kind == "mistral-sliding":
        return MistralConfig(**_COMMON, vocab_size=vocab_size, sliding_window=6)
    if kind == "gemma2":
        return Gemma2Config(
            **_COMMON,
            vocab_size=vocab_size,
            sliding_window=6,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=4.0,
            query_pre_attn_scalar=8,
        )
    raise ValueError(f"unknown kind {kind!r}")


def _build(kind: str, vocab_size: int = 64, seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(kind, vocab_size))
        # HF's initialisation makes near-uniform logits; wider weights make beams differ.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.25)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[..., Any]:
    """``tiny_lm(kind, vocab_size=64, seed=0)``: a random causal LM in float32, in eval mode."""
    return _build
