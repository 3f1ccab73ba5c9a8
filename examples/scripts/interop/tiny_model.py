"""A causal LM of random weights with a tokenizer, small enough to serve on one core."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HIDDEN_SIZE = 256
VOCAB_SIZE = 512
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def save_tiny_model(folder: Path, seed: int = 0) -> Qwen3ForCausalLM:
    """Write a Qwen3 of two layers and a tokenizer of the words ``w0``, ``w1``, ... to a folder.

    Args:
        folder: made if missing.
        seed: of the weights.

    Returns:
        The model, float32.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        # Wide enough that greedy choices are not ties.
        initializer_range=0.1,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = ["<s>", "</s>", "user", "assistant", *(f"w{i}" for i in range(VOCAB_SIZE - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="w0",
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return model
