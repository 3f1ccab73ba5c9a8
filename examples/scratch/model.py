"""The language model: its vocabulary, its prompts, and its fresh weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.scratch.settings import DropoutSettings, ModelSettings
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens

PAD_ID, BOS_ID, START_ID, _FIRST_CODE = 0, 1, 2, 3


def item_tokens(num_levels: int, codebook_size: int) -> ItemTokens:
    """The vocabulary: padding, beginning, item start, then a block of codes for each level."""
    return ItemTokens(
        offset=_FIRST_CODE,
        level_stride=codebook_size,
        num_levels=num_levels,
        codebook_size=codebook_size,
        start_token_id=START_ID,
    )


def prompt_recipe(max_items: int) -> PromptRecipe:
    """How a history becomes a prompt, in training as in serving."""
    return PromptRecipe(
        builder="item_history",
        version=1,
        params={"max_items": max_items, "bos_token_id": BOS_ID, "end_token": False},
    )


def new_model(
    tokens: ItemTokens, shape: ModelSettings, dropout: DropoutSettings, seed: int
) -> nn.Module:
    """A Qwen3 causal LM with fresh weights and tied embeddings; dropout works in training only."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width = 1 + tokens.num_levels
    positions = 2 + (shape.max_items + 1) * width
    config = Qwen3Config(
        vocab_size=tokens.end,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size or 4 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=1 << (positions - 1).bit_length(),
        tie_word_embeddings=True,
        # Of unit scale at the head: normalised states times rows of this size.
        initializer_range=shape.hidden_size**-0.5,
        attention_dropout=dropout.attention,
        bos_token_id=BOS_ID,
        eos_token_id=None,
        pad_token_id=PAD_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = Qwen3ForCausalLM(config)
    if dropout.layer > 0:
        for block in model.model.layers:
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.register_forward_hook(_Dropped(dropout.layer))
    return model


class _Dropped:
    """Forward hook: dropout of a module's output while it trains."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, self._share, module.training)
