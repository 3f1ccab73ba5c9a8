"""The demo model's text side: a small tokenizer, and what users might say about an item."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS_TOKEN = "<s>"
PAD_TOKEN = "<pad>"
# Byte-level: any text has tokens. So the vocabulary has at least the bytes.
MIN_VOCAB_SIZE = 2 + 256


def fit_text_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE tokenizer; letters lose their case, as users do not mind it.

    Args:
        texts: to learn from.
        vocab_size: at most so many tokens, at least 258.

    Raises:
        ValueError: ``vocab_size`` below 258.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TOKEN, pad_token=PAD_TOKEN
    )


def describe(title: str, brand: str, category: str, rng: np.random.Generator) -> str:
    """One of the ways to ask for an item in words, drawn at random from what is known of it.

    ``category`` is a path like ``Makeup > Lipstick > Matte``: someone who ``likes matte lipstick``
    may mean the item, and so may one who names its brand, its category or its title. Empty where
    nothing is known.
    """
    path = [part for part in category.split(" > ") if part]
    ways = []
    if path:
        narrow = " ".join(reversed(path[-2:])).lower()
        ways += [f"likes {narrow}", narrow, path[-1].lower()]
        if brand:
            ways.append(f"{brand} {path[-1].lower()}")
    if title:
        ways += [title, title]
    if not ways:
        return brand
    return ways[int(rng.integers(len(ways)))]
