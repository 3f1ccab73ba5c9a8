"""Small artifacts of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.tokenizer import tokenizer_fingerprint
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer


@pytest.fixture
def tokenizer() -> RQKMeansTokenizer:
    fitted = RQKMeansTokenizer(num_levels=3, codebook_size=8, dim=6, seed=1)
    return fitted.fit_step(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def spec(tokenizer: RQKMeansTokenizer) -> RetrievalSpec:
    tokens = ItemTokens(
        offset=4, level_stride=8, num_levels=3, codebook_size=8, start_token_id=28, end_token_id=29
    )
    recipe = PromptRecipe("item_history", 1, {"max_items": 20})
    return RetrievalSpec(tokenizer_fingerprint(tokenizer), tokens, recipe)


@pytest.fixture(scope="session")
def causal_lm():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def model_folder(tmp_path: Path, causal_lm, spec: RetrievalSpec) -> Path:
    return save_model(tmp_path / "store" / "models", causal_lm, spec, numbers={"recall": 0.5})
