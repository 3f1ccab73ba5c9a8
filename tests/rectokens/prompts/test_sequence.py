"""The layout of prompts, and that training shows exactly what serving sends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.prompts.parts import ItemPart, TextPart
from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import prompt_builder

L, K = 3, 5

shared = settings(max_examples=150, deadline=None)

items = st.builds(ItemPart, st.tuples(*[st.integers(0, K - 1)] * L))
texts = st.builds(
    TextPart,
    st.text(max_size=10)
    | st.sampled_from(["<item_L0_C3>", "a<|item_start|>b", "</s>", "matte <|item_end|>"]),
).filter(lambda part: part.text.isprintable())
common = st.fixed_dictionaries(
    {
        "max_items": st.integers(1, 4) | st.just(50),
        "end_token": st.booleans(),
        "bos_token_id": st.sampled_from([None, 0]),
    }
)
text_bounds = st.fixed_dictionaries(
    {"max_texts": st.integers(1, 3) | st.just(50), "max_text_tokens": st.integers(1, 20)}
)
cases = st.one_of(
    st.tuples(st.just("item_history"), common, st.lists(items, max_size=8)),
    st.tuples(
        st.just("interleaved"),
        st.builds(lambda a, b: {**a, **b}, common, text_bounds),
        st.lists(items | texts, max_size=10),
    ),
)


def start_of_codes(ids: list[int], builder, parts, k: int, item_tokens) -> int:
    """Position in ``ids`` of the codes of ``parts[k]``: behind the (n+1)-th start token."""
    before = sum(isinstance(part, ItemPart) for part in parts[:k])
    starts = [i for i, token in enumerate(ids) if token == item_tokens.start_token_id]
    return starts[before] + 1


@shared
@given(case=cases)
def test_training_prefix_of_every_item_is_its_serving_prompt(aware, item_tokens, case):
    name, params, parts = case
    builder = prompt_builder(PromptRecipe(name, 1, params), item_tokens, aware)
    item_positions = [k for k, part in enumerate(parts) if isinstance(part, ItemPart)]
    if not item_positions:
        with pytest.raises(ValueError, match="nothing to train on"):
            builder.training_sequence(parts)
        return
    ids, labels = builder.training_sequence(parts)
    assert len(ids) == len(labels)

    last = item_positions[-1]
    full = builder.build(parts[:last])
    dropped_texts = sum(isinstance(p, TextPart) for p in parts[:last]) > params.get("max_texts", 0)
    if not full.items_truncated and not dropped_texts:
        trained = set()
        for k in item_positions:
            p = start_of_codes(ids, builder, parts, k, item_tokens)
            target = builder.target(parts[k].codes)
            assert builder.build(parts[:k]).token_ids == tuple(ids[:p])
            assert ids[p : p + len(target)] == target
            assert labels[p : p + len(target)] == target
            trained |= set(range(p, p + len(target)))
        assert all(labels[i] == -100 for i in range(len(ids)) if i not in trained)

    # Of any history, the last item stands behind its own serving prompt.
    target = builder.target(parts[last].codes)
    p = len(ids) - len(target)
    assert full.token_ids == tuple(ids[:p])
    assert ids[p:] == labels[p:] == target


@shared
@given(case=cases)
def test_build_against_reference(aware, item_tokens, case):
    name, params, parts = case
    builder = prompt_builder(PromptRecipe(name, 1, params), item_tokens, aware)
    backend = aware.backend_tokenizer
    backend.encode_special_tokens = True

    item_indices = [i for i, part in enumerate(parts) if isinstance(part, ItemPart)]
    text_indices = [i for i, part in enumerate(parts) if isinstance(part, TextPart)]
    kept_items = item_indices[-params["max_items"] :]
    kept_texts = text_indices[-params.get("max_texts", 1) :]
    expected = [] if params["bos_token_id"] is None else [params["bos_token_id"]]
    texts_changed = len(text_indices) - len(kept_texts)
    for i in sorted(kept_items + kept_texts):
        if isinstance(parts[i], ItemPart):
            expected.append(item_tokens.start_token_id)
            expected += [
                item_tokens.token_id(level, code) for level, code in enumerate(parts[i].codes)
            ]
            expected += [item_tokens.end_token_id] * params["end_token"]
        else:
            ids = backend.encode(parts[i].text, add_special_tokens=False).ids
            expected += ids[: params["max_text_tokens"]]
            texts_changed += len(ids) > params["max_text_tokens"]
    backend.encode_special_tokens = False
    expected.append(item_tokens.start_token_id)

    prompt = builder.build(parts)
    assert list(prompt.token_ids) == expected
    assert prompt.items_used == len(kept_items)
    assert prompt.items_truncated == len(item_indices) - len(kept_items)
    assert prompt.texts_truncated == texts_changed
    assert len(prompt.token_ids) <= builder.max_prompt_tokens


def test_documented_layouts(aware, item_tokens):
    start, end = item_tokens.start_token_id, item_tokens.end_token_id
    a, b = ItemPart((0, 1, 2)), ItemPart((4, 4, 4))
    a_ids, b_ids = item_tokens.encode(a.codes), item_tokens.encode(b.codes)
    text = aware.encode("like", add_special_tokens=False)

    history = prompt_builder(PromptRecipe("item_history", 1, {}), item_tokens)
    assert history.build([a, b]).token_ids == (start, *a_ids, start, *b_ids, start)
    assert history.target(a.codes) == a_ids
    assert history.training_sequence([a, b]) == (
        [start, *a_ids, start, *b_ids],
        [-100, *a_ids, -100, *b_ids],
    )
    mixed = prompt_builder(PromptRecipe("interleaved", 1, {"bos_token_id": 0}), item_tokens, aware)
    assert mixed.build([a, TextPart("like"), b]).token_ids == (
        *(0, start, *a_ids, end),
        *text,
        *(start, *b_ids, end, start),
    )
    assert mixed.target(a.codes) == [*a_ids, end]


def test_empty_history_is_the_start_prompt(aware, item_tokens):
    start = item_tokens.start_token_id
    for name in ("item_history", "interleaved"):
        with_bos = PromptRecipe(name, 1, {"bos_token_id": 1})
        assert prompt_builder(with_bos, item_tokens, aware).build([]).token_ids == (1, start)
        without = prompt_builder(PromptRecipe(name, 1, {}), item_tokens, aware)
        assert without.build([]).token_ids == (start,)


def test_a_truncated_training_sequence_does_not_claim_an_empty_history(item_tokens):
    builder = prompt_builder(PromptRecipe("item_history", 1, {"max_items": 2}), item_tokens)
    parts = [ItemPart((code, 0, 0)) for code in range(5)]
    ids, labels = builder.training_sequence(parts)
    assert [token for token in ids if token < item_tokens.offset + K] == [
        item_tokens.token_id(0, code) for code in (2, 3, 4)
    ]
    assert labels[:5] == [-100] * 5
    assert labels[5:] == [*ids[5:8], -100, *ids[9:]]


def test_a_long_history_keeps_what_the_user_said(aware, item_tokens):
    builder = prompt_builder(PromptRecipe("interleaved", 1, {"max_items": 1}), item_tokens, aware)
    parts = [TextPart("like"), *[ItemPart((0, 0, c)) for c in range(5)]]
    prompt = builder.build(parts)
    text = tuple(aware.encode("like", add_special_tokens=False))
    assert prompt.token_ids[: len(text)] == text
    assert (prompt.items_used, prompt.items_truncated, prompt.texts_truncated) == (1, 4, 0)


def test_text_where_it_is_not_taken(item_tokens):
    builder = prompt_builder(PromptRecipe("item_history", 1, {}), item_tokens)
    with pytest.raises(ValueError, match="take items only"):
        builder.build([ItemPart((0, 0, 0)), TextPart("hello")])
    with pytest.raises(ValueError, match="take items only"):
        builder.training_sequence([TextPart("hello"), ItemPart((0, 0, 0))])


@pytest.mark.parametrize("codes", [(0, 0), (0, 0, 0, 0), (0, 0, 5), (-1, 0, 0)])
def test_codes_that_are_no_semantic_id(item_tokens, codes):
    builder = prompt_builder(PromptRecipe("item_history", 1, {}), item_tokens)
    for call in (
        lambda: builder.build([ItemPart(codes)]),
        lambda: builder.target(codes),
        lambda: builder.training_sequence([ItemPart(codes)]),
    ):
        with pytest.raises(ValueError, match=r"codes|allowed"):
            call()


def test_end_token_of_a_model_without_one(item_tokens):
    bare = replace(item_tokens, end_token_id=None)
    with pytest.raises(ValueError, match="no end token"):
        prompt_builder(PromptRecipe("item_history", 1, {"end_token": True}), bare)
    builder = prompt_builder(PromptRecipe("item_history", 1, {"bos_token_id": 0}), bare)
    assert builder.build([]).token_ids == (0, bare.start_token_id)
