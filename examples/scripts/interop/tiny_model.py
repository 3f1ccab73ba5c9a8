"""A small causal LM with a tokenizer, made by code, that is sure of its next token.

A model of random weights has nearly tied logits, and then rounding anywhere decides its greedy
tokens. This one is trained for a minute to continue a few fixed sequences of words, from wherever a
prompt leaves off, so that what it answers depends on the whole prompt and with a margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HIDDEN_SIZE = 256
VOCAB_SIZE = 512
_WORDS_FROM = 4
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """What was made.

    Attributes:
        model: float32, in evaluation mode.
        songs: the sequences that it knows, token ids (sequences, length).
        loss: of the last step of training, nats a token.
    """

    model: Qwen3ForCausalLM
    songs: Tensor
    loss: float


def make_tiny_model(
    *, songs: int = 24, length: int = 96, steps: int = 120, seed: int = 0
) -> TinyModel:
    """A Qwen3 of two layers, trained to continue sequences of random words."""
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
    )
    model = Qwen3ForCausalLM(config)
    known = torch.randint(_WORDS_FROM, VOCAB_SIZE, (songs, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = model(input_ids=known, labels=known).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return TinyModel(model.eval(), known, float(loss.detach()))


def save_tiny_model(folder: Path, tiny: TinyModel) -> None:
    """Write the model and a tokenizer of the words ``w0``, ``w1``, ... to a folder."""
    tiny.model.save_pretrained(folder)
    words = ["<s>", "</s>", "user", "assistant"]
    words += [f"w{i}" for i in range(VOCAB_SIZE - _WORDS_FROM)]
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


def text_of(ids: list[int]) -> str:
    """The words of token ids."""
    return " ".join(f"w{i - _WORDS_FROM}" for i in ids)
