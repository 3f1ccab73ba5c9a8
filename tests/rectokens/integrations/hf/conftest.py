"""Tiny tokenizers and models, built from nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rectokens.core.tokenizer import TokenSequence
from rectokens.integrations.hf import ItemAwareTokenizer

TEXTS = ["I like matte lipstick and shampoo", "nothing for dry hair, please", "gift under 20"]


@pytest.fixture
def text_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s>, </s>, <pad> and <unk>, and a chat template."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=77,
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


class RoundingItemTokenizer:
    """Codes are the rounded entries of the vector; remembers the batches it was given."""

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.batches: list[tuple[int, ...]] = []

    def encode(self, features: Tensor) -> TokenSequence:
        self.batches.append(tuple(features.shape))
        return TokenSequence(features[..., : self.num_levels].round().long())


@pytest.fixture
def item_tokenizer() -> RoundingItemTokenizer:
    return RoundingItemTokenizer(3)


@pytest.fixture
def aware(
    text_tokenizer: PreTrainedTokenizerFast, item_tokenizer: RoundingItemTokenizer
) -> ItemAwareTokenizer:
    """L = 3, K = 5."""
    return ItemAwareTokenizer(text_tokenizer, item_tokenizer, num_levels=3, codebook_size=5)


def _shape(vocab_size: int) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }


def qwen3_tied(vocab_size: int) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_shape(vocab_size), head_dim=8, tie_word_embeddings=True))


def llama_untied(vocab_size: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_shape(vocab_size), tie_word_embeddings=False))


def gpt2_tied(vocab_size: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    )


@pytest.fixture(params=[qwen3_tied, llama_untied, gpt2_tied], ids=lambda f: f.__name__)
def make_model(request: pytest.FixtureRequest) -> Callable[[int], PreTrainedModel]:
    """A function of the vocabulary size; weights differ from row to row, seeded."""

    def make(vocab_size: int) -> PreTrainedModel:
        torch.manual_seed(0)
        return request.param(vocab_size).eval()

    return make


class BareLM(nn.Module):
    """The least an inner model may offer."""

    def __init__(self, vocab_size: int, *, tied: bool, head: bool, resizes_head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab_size, 8)
        self.head = nn.Linear(8, vocab_size) if head else None
        self.tied = tied
        self.resizes_head = resizes_head
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def resize_token_embeddings(self, rows: int, /) -> None:
        old, old_head = self.embed, self.head
        keep = min(rows, old.num_embeddings)
        self.embed = nn.Embedding(rows, 8)
        self.embed.weight.data[:keep] = old.weight.data[:keep]
        if old_head is not None and self.resizes_head:
            self.head = nn.Linear(8, rows)
            self.head.weight.data[:keep] = old_head.weight.data[:keep]
            self.head.bias.data[:keep] = old_head.bias.data[:keep]
        if self.tied:
            self.head.weight = self.embed.weight


@pytest.fixture
def make_bare() -> Callable[..., BareLM]:
    return BareLM
