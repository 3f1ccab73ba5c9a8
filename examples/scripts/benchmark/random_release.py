"""A release with random weights over a random catalog: the shapes of a real one, in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.open_store import open_release_store
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens

FINGERPRINT = "0" * 64
_SPECIAL_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ReleaseShape:
    """What is made.

    Attributes:
        num_layers: of the model, a Qwen3.
        hidden_size: H; heads have 64 elements, two query heads share one of keys.
        num_items: N, named ``item-0`` and so on.
        num_levels: L.
        codebook_size: K.
        max_history: most items of a prompt.
        seed: of weights and codes.
    """

    num_layers: int
    hidden_size: int
    num_items: int
    num_levels: int
    codebook_size: int
    max_history: int
    seed: int


def make_random_release(root: Path, shape: ReleaseShape) -> Path:
    """Write a store with one release; the release's folder."""
    heads = max(shape.hidden_size // 64, 2)
    decoder = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": 3 * shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 64,
    }
    return write_random_release(root, shape, decoder, torch.float32, torch.device("cpu"))


def write_random_release(
    root: Path,
    shape: ReleaseShape,
    decoder: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Path:
    """Write a store with one release; the release's folder.

    Args:
        root: of the store.
        shape: of catalog and prompts; what it says of the model is not looked at.
        decoder: sizes in a Qwen3's configuration.
        dtype: of the weights.
        device: where they are drawn.
    """
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokens = ItemTokens(
        offset=_SPECIAL_TOKENS,
        level_stride=shape.codebook_size,
        num_levels=shape.num_levels,
        codebook_size=shape.codebook_size,
        start_token_id=1,
        end_token_id=2,
    )
    sizes: dict[str, Any] = {
        **decoder,
        "vocab_size": _SPECIAL_TOKENS + shape.num_levels * shape.codebook_size,
        "max_position_embeddings": (shape.max_history + 2) * (shape.num_levels + 2),
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        with device:
            model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=dtype).eval()
        codes = torch.randint(0, shape.codebook_size, (shape.num_items, shape.num_levels))
    recipe = PromptRecipe("item_history", 1, {"max_items": shape.max_history})
    catalog = build_catalog(
        [f"item-{row}" for row in range(shape.num_items)],
        codes,
        codebook_size=shape.codebook_size,
        tokenizer_fingerprint=FINGERPRINT,
    )
    saved = save_model(root / "models", model, RetrievalSpec(FINGERPRINT, tokens, recipe))
    written = save_catalog(root / "catalogs", catalog)
    return root / "releases" / open_release_store(root).bind(saved.name, written.name)
