"""The prompt recipe of a model that was fine-tuned on chats."""

from __future__ import annotations

from examples.data.chat_encoding import ChatEncoder
from examples.data.chat_templates import sid_sequence_to_sid
from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer
from rectokens.prompts import framed_history
from rectokens.prompts.recipe import PromptRecipe


def chat_recipe(tokenizer: ItemAwareTokenizer, max_items: int) -> PromptRecipe:
    """Prompts like those of ``sid_sequence_to_sid`` samples, by a builder that servers have.

    Args:
        tokenizer: with the chat template of the model.
        max_items: newest items of a history in a prompt.

    Raises:
        ValueError: the chat template writes a history of two items in another way than one.
    """
    encoder = ChatEncoder(tokenizer)
    items = tokenizer.item_tokens
    zero, last = [0] * items.num_levels, [items.codebook_size - 1] * items.num_levels

    def prompt(*history: list[int]) -> list[int]:
        return encoder.prompt(sid_sequence_to_sid(list(history), zero)["messages"][:-1])

    def item(codes: list[int]) -> list[int]:
        return [tokenizer.item_sep_token_id, *items.encode(codes), tokenizer.item_end_token_id]

    one = prompt(zero)
    first = one.index(tokenizer.item_sep_token_id)
    width = len(item(zero))
    tail = one[first + width :]
    two = prompt(zero, last)
    second = two.index(tokenizer.item_sep_token_id, first + width)
    before = two[first + width : second]
    head = one[: first - len(before)]
    if one != [*head, *before, *item(zero), *tail] or two != [
        *head,
        *before,
        *item(zero),
        *before,
        *item(last),
        *tail,
    ]:
        raise ValueError(
            "the chat template does not write items one after the other between a fixed beginning "
            "and a fixed end; there is no prompt recipe for such a model"
        )
    return PromptRecipe(
        framed_history.NAME,
        1,
        {
            "max_items": max_items,
            "head_token_ids": head,
            "before_item_token_ids": before,
            "tail_token_ids": tail,
            "end_token": True,
        },
    )
