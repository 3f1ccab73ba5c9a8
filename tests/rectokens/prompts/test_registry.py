from __future__ import annotations

import pytest

from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import known_builders, prompt_builder


def test_known_builders(item_tokens, aware):
    assert known_builders() == (("framed_history", 1), ("interleaved", 1), ("item_history", 1))
    for name, version in known_builders():
        builder = prompt_builder(PromptRecipe(name, version, {}), item_tokens, aware)
        assert (builder.name, builder.version) == (name, version)


@pytest.mark.parametrize(("name", "version"), [("chat", 1), ("item_history", 2)])
def test_unknown_builder_names_the_known(item_tokens, name, version):
    with pytest.raises(
        ValueError,
        match=f"'{name}' version {version}; known are framed_history version 1, interleaved",
    ):
        prompt_builder(PromptRecipe(name, version, {}), item_tokens)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("item_history", {"max_item": 3}, "no parameter 'max_item'; known are block_items, bos"),
        ("item_history", {"max_text_tokens": 3}, "no parameter 'max_text_tokens'"),
        ("item_history", {"max_items": 0}, "max_items is 0; allowed are 1 to 10000"),
        ("item_history", {"max_items": 2.0}, "max_items is 2.0; it must be an integer"),
        ("item_history", {"max_items": True}, "max_items is True"),
        ("item_history", {"max_items": None}, "max_items is None"),
        ("item_history", {"end_token": 1}, "end_token is 1; it must be true or false"),
        ("item_history", {"bos_token_id": -1}, "bos_token_id is -1"),
        ("item_history", {"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
        ("interleaved", {"max_text_tokens": 0}, "max_text_tokens is 0"),
        ("interleaved", {"max_texts": 10_001}, "max_texts is 10001"),
        ("interleaved", {"separator": " "}, "no parameter 'separator'"),
    ],
)
def test_bad_params(item_tokens, aware, name, params, message):
    with pytest.raises(ValueError, match=message):
        prompt_builder(PromptRecipe(name, 1, params), item_tokens, aware)


def test_bos_may_be_no_item_token(item_tokens, aware):
    for token in (item_tokens.offset, item_tokens.start_token_id, item_tokens.end_token_id):
        recipe = PromptRecipe("item_history", 1, {"bos_token_id": token})
        with pytest.raises(ValueError, match="item token"):
            prompt_builder(recipe, item_tokens)


def test_interleaved_needs_a_fast_text_tokenizer(item_tokens):
    recipe = PromptRecipe("interleaved", 1, {})
    with pytest.raises(ValueError, match="needs the model's text tokenizer"):
        prompt_builder(recipe, item_tokens, None)
    with pytest.raises(ValueError, match="fast tokenizer"):
        prompt_builder(recipe, item_tokens, object())
