"""A release with weights: a small random model over a random catalog, as the service loads one."""

from __future__ import annotations

from typing import Any

import torch

from rectokens.artifacts.model import RetrievalSpec
from rectokens.catalog.build import build_catalog
from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.item_tokens import ItemTokens
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.release import Release

LEVELS, CODES = 3, 12
TOKENS = ItemTokens(
    offset=4, level_stride=CODES, num_levels=LEVELS, codebook_size=CODES, start_token_id=1
)
FINGERPRINT = "cd" * 32


def make_real_release(
    model: Any,
    items: int = 400,
    seed: int = 0,
    pool: PoolOptions | None = None,
    recipe: PromptRecipe | None = None,
) -> Release:
    """Items ``item-0`` ... with skewed codes, so that some share a semantic ID and some nodes
    have one child; constraint sets ``even``, ``third`` and ``few``.

    Args:
        model: a causal LM with a vocabulary of at least 40.
        items: N.
        seed: of the codes.
        pool: of the engine.
        recipe: of the prompts; by default the newest ten items.
    """
    recipe = recipe or PromptRecipe("item_history", 1, {"max_items": 10})
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(items, LEVELS, generator=generator) ** 1.5 * CODES).long()
    ids = [f"item-{row}" for row in range(items)]
    catalog = build_catalog(
        ids,
        codes,
        codebook_size=CODES,
        tokenizer_fingerprint=FINGERPRINT,
        constraint_sets={"even": ids[::2], "few": ids[:7], "third": ids[::3]},
    )
    return Release(
        model_name="real",
        model_version="0",
        created_s=0,
        spec=RetrievalSpec(FINGERPRINT, TOKENS, recipe),
        catalog=catalog,
        trie=catalog.trie,
        prompts=prompt_builder(recipe, TOKENS, None),
        engine=build_engine(model, TOKENS, pool),
    )
