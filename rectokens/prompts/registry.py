"""From a recipe to its builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rectokens.prompts import framed_history, interleaved, item_history
from rectokens.prompts.builder import PromptBuilder
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Factory = Callable[[PromptRecipe, ItemTokens, PreTrainedTokenizerFast | None], PromptBuilder]

# A published (name, version) never changes: models were trained with it.
_FACTORIES: dict[tuple[str, int], Factory] = {
    (framed_history.NAME, 1): lambda recipe, items, _: framed_history.framed_history_v1(
        recipe.params, items
    ),
    (item_history.NAME, 1): lambda recipe, items, _: item_history.item_history_v1(
        recipe.params, items
    ),
    (interleaved.NAME, 1): lambda recipe, items, text: interleaved.interleaved_v1(
        recipe.params, items, text
    ),
}


def known_builders() -> tuple[tuple[str, int], ...]:
    """Every (name, version) that a recipe may name, sorted."""
    return tuple(sorted(_FACTORIES))


def prompt_builder(
    recipe: PromptRecipe,
    item_tokens: ItemTokens,
    text_tokenizer: PreTrainedTokenizerFast | None = None,
) -> PromptBuilder:
    """The builder that a recipe names, for training and for serving alike.

    Args:
        recipe: name, version and parameters, as stored with the model.
        item_tokens: where the model's item tokens lie.
        text_tokenizer: the model's text tokenizer; builders of items only need none.

    Raises:
        ValueError: an unknown builder or version (the message names the known ones), an unknown
            or bad parameter, or a text tokenizer is missing.
    """
    factory = _FACTORIES.get((recipe.builder, recipe.version))
    if factory is None:
        known = ", ".join(f"{name} version {version}" for name, version in known_builders())
        raise ValueError(
            f"prompt builder is {recipe.builder!r} version {recipe.version}; known are {known}"
        )
    return factory(recipe, item_tokens, text_tokenizer)
