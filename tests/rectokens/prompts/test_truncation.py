"""What is left out of long histories, and that a growing one's prompt seldom begins anew."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.prompts.parts import ItemPart, PromptTooLongError, TextPart
from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import prompt_builder
from rectokens.prompts.truncation import items_to_drop, items_to_drop_by_limits

L, K = 3, 5
ITEM = 1 + L

shared = settings(max_examples=150, deadline=None)


def history(length):
    return [ItemPart((i // 25 % K, i // 5 % K, i % K)) for i in range(length)]


@given(st.integers(0, 60), st.integers(1, 30), st.integers(1, 40))
def test_blocks_by_trying(num_items, room, block):
    fitting = [n for n in range(0, num_items, block) if num_items - n <= room]
    expected = min(fitting, default=max(num_items - room, 0))
    assert items_to_drop(num_items, room, block) == expected


@shared
@given(data=st.data())
def test_the_newest_items_and_all_texts_stay_within_the_limit(aware, item_tokens, data):
    params = {
        "max_items": data.draw(st.integers(1, 12)),
        "bos_token_id": data.draw(st.sampled_from([None, 0])),
        "end_token": data.draw(st.booleans()),
        "max_texts": 2,
    }
    builder = prompt_builder(PromptRecipe("interleaved", 1, params), item_tokens, aware)
    parts = data.draw(
        st.lists(
            st.sampled_from(history(30)) | st.sampled_from([TextPart("matte"), TextPart("I like")]),
            max_size=20,
        )
    )
    limit = data.draw(st.integers(1, 80))
    whole = builder.build(parts)
    # By trying: leave out one kept item after the other.
    items = [i for i, part in enumerate(parts) if isinstance(part, ItemPart)]
    most = next(
        (
            len(items) - n
            for n in range(whole.items_truncated, max(len(items), 1))
            if len(builder.build(_without(parts, items[:n])).token_ids) <= limit
        ),
        None,
    )
    if most is None:
        with pytest.raises(PromptTooLongError, match=f"at most {limit} fit"):
            builder.build(parts, max_tokens=limit)
        return
    prompt = builder.build(parts, max_tokens=limit)
    assert len(prompt.token_ids) <= limit
    assert prompt.items_used + prompt.items_truncated == len(items)
    assert prompt.texts_truncated == whole.texts_truncated
    assert (
        prompt.token_ids
        == builder.build(_without(parts, items[: prompt.items_truncated])).token_ids
    )
    # No more than a block, a quarter of what the limit leaves room for, goes beyond need.
    size = ITEM + params["end_token"]
    block = max((limit - 1 - (params["bos_token_id"] is not None)) // size // 4, 1)
    assert most - block < prompt.items_used <= most
    if len(whole.token_ids) <= limit:
        assert prompt == whole


def test_a_limit_that_the_layout_already_keeps_leaves_nothing_out(aware, item_tokens):
    recipe = PromptRecipe("interleaved", 1, {"max_items": 10, "end_token": True, "max_texts": 2})
    builder = prompt_builder(recipe, item_tokens, aware)
    parts = [*history(12), TextPart("matte")]
    whole = builder.build(parts)
    assert whole.items_truncated == 2
    assert len(whole.token_ids) <= 61
    assert builder.build(parts, max_tokens=61) == whole  # blocks of three items for this limit


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 60), st.integers(0, 6)
)
def test_the_beginning_never_moves_back_while_a_history_grows(
    max_items, block, tokens_of_item, space, text_tokens
):
    dropped = [
        items_to_drop_by_limits(
            num_items,
            3 + space + text_tokens + tokens_of_item,
            max_items=max_items,
            block=min(block, max_items),
            bare_tokens=3,
            tokens_of_item=tokens_of_item,
            text_tokens=text_tokens,
        )
        for num_items in range(80)
    ]
    assert dropped == sorted(dropped)


def _without(parts, left_out):
    return [part for i, part in enumerate(parts) if i not in set(left_out)]


@pytest.mark.parametrize(
    ("params", "max_tokens", "least", "changes"),
    [
        ({"max_items": 1_000}, 1 + 40 * ITEM, 31, 6),  # the model's limit: blocks of ten items
        ({"max_items": 40, "block_items": 10}, None, 31, 6),  # the recipe's
        ({"max_items": 40}, None, 40, 60),  # one by one, every prompt begins anew
    ],
)
def test_the_prompt_of_a_growing_history_begins_as_the_one_before(
    item_tokens, params, max_tokens, least, changes
):
    builder = prompt_builder(PromptRecipe("item_history", 1, params), item_tokens)
    prompts = [builder.build(history(n), max_tokens=max_tokens) for n in range(101)]
    begun_anew = 0
    for n, (before, after) in enumerate(pairwise(prompts), start=1):
        assert after.items_used >= min(n, least)
        assert after.items_used + after.items_truncated == n
        begun_anew += after.token_ids[: len(before.token_ids)] != before.token_ids
    assert begun_anew == changes


def test_training_shows_the_blocks_that_serving_sends(item_tokens):
    recipe = PromptRecipe("item_history", 1, {"max_items": 8, "block_items": 3})
    builder = prompt_builder(recipe, item_tokens)
    for length in range(1, 30):
        parts = history(length)
        ids, labels = builder.training_sequence(parts)
        prompt = builder.build(parts[:-1])
        assert tuple(ids[:-L]) == prompt.token_ids
        assert ids[-L:] == labels[-L:] == builder.target(parts[-1].codes)
        assert prompt.items_truncated % 3 == 0


def test_a_block_larger_than_the_layout_is_refused(item_tokens):
    recipe = PromptRecipe("item_history", 1, {"max_items": 4, "block_items": 5})
    with pytest.raises(ValueError, match="block_items is 5; allowed are 1 to max_items, 4"):
        prompt_builder(recipe, item_tokens)
