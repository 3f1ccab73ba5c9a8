"""Prompts of items only, built in one piece, are those that are built part by part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.prompts.parts import ItemPart, PromptTooLongError
from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import prompt_builder

L, K = 3, 5

histories = st.lists(st.tuples(*[st.integers(0, K - 1)] * L), max_size=12)
limits = st.fixed_dictionaries(
    {
        "max_items": st.integers(4, 6) | st.just(50),
        "block_items": st.integers(1, 4),
        "end_token": st.booleans(),
    }
)
bos = st.fixed_dictionaries({"bos_token_id": st.sampled_from([None, 0])})
frame = st.fixed_dictionaries(
    {
        f"{name}_token_ids": st.lists(st.integers(0, 3), max_size=2)
        for name in ("head", "before_item", "tail")
    }
)
recipes = st.one_of(
    st.tuples(st.sampled_from(["item_history", "interleaved"]), limits, bos),
    st.tuples(st.just("framed_history"), limits, frame),
)


def rows(history) -> np.ndarray:
    return np.array(history, dtype=np.int64).reshape(len(history), L)


@settings(max_examples=200, deadline=None)
@given(recipes, histories, st.none() | st.integers(0, 70))
def test_all_builders(aware, item_tokens, recipe, history, max_tokens):
    name, common, own = recipe
    builder = prompt_builder(PromptRecipe(name, 1, {**common, **own}), item_tokens, aware)
    try:
        expected = builder.build([ItemPart(codes) for codes in history], max_tokens=max_tokens)
    except PromptTooLongError as error:
        with pytest.raises(PromptTooLongError, match=str(error)):
            builder.build_items(rows(history), max_tokens=max_tokens)
        return
    found = builder.build_items(rows(history), max_tokens=max_tokens)
    assert found == expected
    assert all(type(token) is int for token in found.token_ids)


@pytest.mark.parametrize("codes", [(0, 0), (0, 0, 0, 0), (0, 0, 5), (-1, 0, 0)])
@pytest.mark.parametrize("name", ["item_history", "framed_history"])
def test_codes_that_are_no_semantic_id(item_tokens, name, codes):
    builder = prompt_builder(PromptRecipe(name, 1, {}), item_tokens)
    with pytest.raises(ValueError, match=r"expected \(n, 3\)|allowed are 0 to 4"):
        builder.build_items(np.array([codes, codes]))
