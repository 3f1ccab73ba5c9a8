"""All choices that make a demo release, and their identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

import numpy as np

from rectokens.prompts.recipe import PromptRecipe
from rectokens.tokenizers.fitting import CodebookStyle
from server.demo.data import DemoData
from server.demo.samples import Augmentation
from server.demo.training import TrainSettings

# Raised whenever the same recipe would no longer give the same release.
BUILD_VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Shape of the language model, a Qwen3 configuration with tied embeddings.

    Attributes:
        hidden_size: H, a power of two.
        num_layers: decoder layers.
        num_heads: attention heads, each with its own keys; divides ``hidden_size``.
        intermediate_size: width inside the feed-forward blocks.
    """

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 256

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.hidden_size & (self.hidden_size - 1):
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be a power of two")
        if self.num_heads < 1 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"num_heads is {self.num_heads}; hidden_size {self.hidden_size} must be "
                "divisible by twice that"
            )


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """How to get from data to a release.

    Attributes:
        num_levels, codebook_size: of the semantic IDs.
        codebook_style: how the tokenizer's codebooks are fitted.
        text_vocab_size: most tokens of the text tokenizer.
        max_history_items, max_texts, max_text_tokens: what of a history goes into a prompt.
        validation_users: whose held-out items choose the epoch to keep.
        model: the language model's shape.
        augmentation: how histories become samples.
        train: how to train.
        seed: of everything.
    """

    num_levels: int = 3
    codebook_size: int = 256
    codebook_style: CodebookStyle = "separating"
    text_vocab_size: int = 1024
    max_history_items: int = 20
    max_texts: int = 8
    max_text_tokens: int = 32
    validation_users: int = 2000
    model: ModelSize = field(default_factory=ModelSize)
    augmentation: Augmentation = field(default_factory=Augmentation)
    train: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_history_items", "validation_users"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.augmentation.max_items > self.max_history_items + 1:
            raise ValueError(
                f"augmentation.max_items is {self.augmentation.max_items}; a prompt holds "
                f"{self.max_history_items} items, so at most {self.max_history_items + 1}"
            )

    def prompt(self, bos_token_id: int) -> PromptRecipe:
        """The prompt recipe of the model."""
        return PromptRecipe(
            builder="interleaved",
            version=1,
            params={
                "max_items": self.max_history_items,
                "max_texts": self.max_texts,
                "max_text_tokens": self.max_text_tokens,
                "bos_token_id": bos_token_id,
                "end_token": False,
            },
        )


def recipe_key(recipe: DemoRecipe, data: DemoData) -> str:
    """Identity of what a recipe makes of some data: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    described = {"build": BUILD_VERSION, "recipe": asdict(recipe)}
    digest.update(json.dumps(described, sort_keys=True).encode())
    digest.update(json.dumps([data.name, data.item_ids, data.texts, data.sequences]).encode())
    digest.update(json.dumps(data.metadata.to_dict(as_series=False), sort_keys=True).encode())
    digest.update(np.ascontiguousarray(data.embeddings).tobytes())
    return digest.hexdigest()
