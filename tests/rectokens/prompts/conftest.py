"""Text tokenizers and item tokens for prompts."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rectokens.integrations.hf import ItemAwareTokenizer
from rectokens.schemas.item_tokens import ItemTokens

L, K = 3, 5


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(["I like matte lipstick and shampoo"] * 3, trainer)
    return backend


@pytest.fixture(scope="module")
def aware() -> ItemAwareTokenizer:
    source = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(), bos_token="<s>", eos_token="</s>"
    )
    return ItemAwareTokenizer(source, num_levels=L, codebook_size=K)


@pytest.fixture(scope="module")
def item_tokens(aware: ItemAwareTokenizer) -> ItemTokens:
    return aware.item_tokens


@pytest.fixture(scope="module")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that has the start token's string as an ordinary word."""
    backend = Backend(models.WordLevel({"[unk]": 0, "hair": 1, "<|item_start|>": 25}, "[unk]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]")
