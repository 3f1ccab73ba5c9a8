"""The builder whose prompts have a fixed beginning and end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectokens.prompts.framed_history import framed_history_v1
from rectokens.prompts.parts import ItemPart, PromptTooLongError, TextPart
from rectokens.prompts.sequence import IGNORED_LABEL
from rectokens.schemas.item_tokens import ItemTokens

TOKENS = ItemTokens(
    offset=100, level_stride=5, num_levels=2, codebook_size=5, start_token_id=110, end_token_id=111
)
FRAME = {"head_token_ids": [7, 8], "before_item_token_ids": [9], "tail_token_ids": [5, 6]}
HISTORIES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4)).map(ItemPart), min_size=0, max_size=12
)


def test_layout():
    builder = framed_history_v1(FRAME, TOKENS)
    prompt = builder.build([ItemPart((0, 3)), ItemPart((4, 1))])
    first, second = [9, 110, 100, 108, 111], [9, 110, 104, 106, 111]
    assert list(prompt.token_ids) == [7, 8, *first, *second, 5, 6, 110]
    assert list(builder.build([]).token_ids) == [7, 8, 5, 6, 110]
    assert builder.target((4, 1)) == [104, 106, 111]
    bare = framed_history_v1({"end_token": False}, TOKENS)
    assert list(bare.build([ItemPart((0, 3))]).token_ids) == [110, 100, 108, 110]


@given(HISTORIES, st.integers(1, 6), st.integers(0, 60))
def test_prompts_keep_the_newest_and_the_limits(history, max_items, max_tokens):
    builder = framed_history_v1({**FRAME, "max_items": max_items}, TOKENS)
    prompt = builder.build(history)
    assert prompt.token_ids == builder.build(history[-max_items:]).token_ids
    assert len(prompt.token_ids) <= builder.max_prompt_tokens
    try:
        cut = builder.build(history, max_tokens=max_tokens)
    except PromptTooLongError:
        assert max_tokens < 5 + 5 * min(len(history), 1)
        return
    assert len(cut.token_ids) <= max_tokens
    kept = history[len(history) - cut.items_used :]
    assert cut.token_ids == builder.build(kept).token_ids
    assert cut.items_used + cut.items_truncated == len(history)


@given(HISTORIES.filter(bool), st.integers(1, 6))
def test_training_sequences_end_like_prompts(history, max_items):
    builder = framed_history_v1({**FRAME, "max_items": max_items}, TOKENS)
    ids, labels = builder.training_sequence(history)
    prompt = list(builder.build(history[:-1]).token_ids)
    target = builder.target(history[-1].codes)
    assert ids == prompt + target
    assert labels == [IGNORED_LABEL] * len(prompt) + target


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"head_token_ids": 3}, "head_token_ids is 3; it must be a list of token ids"),
        ({"tail_token_ids": [1, True]}, "tail_token_ids is"),
        ({"tail_token_ids": [-1]}, "tail_token_ids is"),
        ({"head_token_ids": [103]}, "head_token_ids has 103, which is the token of a code"),
        ({"max_items": 2, "block_items": 3}, "block_items is 3; allowed are 1 to max_items, 2"),
        ({"separator": []}, "no parameter 'separator'"),
    ],
)
def test_bad_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        framed_history_v1(params, TOKENS)


def test_what_it_does_not_take():
    builder = framed_history_v1(FRAME, TOKENS)
    with pytest.raises(ValueError, match="take items only"):
        builder.build([TextPart("red")])
    with pytest.raises(ValueError, match="nothing to train on"):
        builder.training_sequence([])
    without_end = ItemTokens(
        offset=100, level_stride=5, num_levels=2, codebook_size=5, start_token_id=110
    )
    with pytest.raises(ValueError, match="no end token"):
        framed_history_v1({}, without_end)
