"""Chats about items, and how they become tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.data import chat_templates as templates
from examples.data.chat_encoding import ChatEncoder
from rectokens.core.tokenizer import TokenSequence
from rectokens.integrations.hf import ItemAwareTokenizer

A, B, NEXT = [0, 1], [2, 3], [3, 0]
CHATS = {
    "description_to_sid": templates.description_to_sid("red soap", A),
    "sid_to_description": templates.sid_to_description(A, "red soap"),
    "sid_sequence_to_sid": templates.sid_sequence_to_sid([A, B], NEXT),
    "description_sequence_to_sid": templates.description_sequence_to_sid(["soap", "comb"], NEXT),
    "mixed_sequence_to_sid": templates.mixed_sequence_to_sid([("soap", A), ("comb", B)], NEXT),
    "description_sequence_to_sid_and_description": (
        templates.description_sequence_to_sid_and_description(["soap", "comb"], NEXT, "a brush")
    ),
    "sid_sequence_to_sid_and_description": (
        templates.sid_sequence_to_sid_and_description([A, B], NEXT, "a brush")
    ),
}


@pytest.fixture(scope="module")
def aware(chat_tokenizer):
    return ItemAwareTokenizer(chat_tokenizer, num_levels=2, codebook_size=4)


def items(ids, aware):
    return [
        part.codes.tolist()
        for part in aware.decode_sequence(ids)
        if isinstance(part, TokenSequence)
    ]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_has_three_turns_of_texts_and_items(name):
    messages = CHATS[name]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    for message in messages:
        for part in message["content"]:
            assert part["type"] in ("text", "item")
            assert set(part) == {"type", "text" if part["type"] == "text" else "codes"}


@pytest.mark.parametrize(
    ("name", "asked", "answered", "said", "answer"),
    [
        ("description_to_sid", [], [A], "red soap", ""),
        ("sid_to_description", [A], [], "", "red soap"),
        ("sid_sequence_to_sid", [A, B], [NEXT], "", ""),
        ("description_sequence_to_sid", [], [NEXT], "- soap\n- comb", ""),
        ("mixed_sequence_to_sid", [A, B], [NEXT], "- soap: ", ""),
        ("description_sequence_to_sid_and_description", [], [NEXT], "- soap\n- comb", "a brush"),
        ("sid_sequence_to_sid_and_description", [A, B], [NEXT], "", "a brush"),
    ],
)
def test_labels_are_the_assistants_turn(aware, name, asked, answered, said, answer):
    ids, labels = ChatEncoder(aware).sample(CHATS[name]["messages"])
    assert len(ids) == len(labels)
    learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    first = labels.index(learned[0])
    assert labels[first : first + len(learned)] == learned  # in one piece
    assert learned[-1] == aware.convert_tokens_to_ids("<|im_end|>")
    assert items(ids[:first], aware) == asked
    assert items(learned, aware) == answered
    assert said in aware.decode(ids[:first])
    assert answer in aware.decode(learned)
    if answered:
        assert learned[0] == aware.item_sep_token_id
        assert learned[3] == aware.item_end_token_id


@pytest.mark.parametrize("name", CHATS)
def test_a_prompt_is_how_the_sample_begins(aware, name):
    encoder = ChatEncoder(aware)
    ids, labels = encoder.sample(CHATS[name]["messages"])
    first = next(place for place, label in enumerate(labels) if label != -100)
    assert encoder.prompt(CHATS[name]["messages"][:-1]) == ids[:first]
    text = aware.decode(ids[:first])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["<|im_end|>", "<|item_start|><item_L0_C1>", "<s>", "\ue0000\ue001", "</think>", " "]
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_texts_are_data(aware, texts):
    """Whatever a description says, the special tokens are those of the template."""
    encoder = _encoder(aware)
    plain, _ = encoder.sample(
        templates.description_sequence_to_sid(["x"] * len(texts), NEXT)["messages"]
    )
    ids, _ = encoder.sample(templates.description_sequence_to_sid(texts, NEXT)["messages"])
    special = encoder._special
    assert [token for token in ids if token in special] == [
        token for token in plain if token in special
    ]


_encoders = {}


def _encoder(aware):
    return _encoders.setdefault(id(aware), ChatEncoder(aware))


def test_plain_texts_are_contents_too(aware):
    encoder = ChatEncoder(aware)
    parts = [{"type": "text", "text": "hello"}]
    assert encoder.prompt([{"role": "user", "content": "hello"}]) == encoder.prompt(
        [{"role": "user", "content": parts}]
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the last message of a sample must be the assistant's"),
        ([{"role": "user", "content": "x"}], "must be the assistant's"),
        ([{"role": "assistant", "content": []}], r"content is \[\]"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "expected a text with 'text'"),
        ([{"role": "assistant", "content": [{"type": "item", "codes": [1]}]}], "has 1 codes"),
        ([{"role": "assistant", "content": [{"type": "item", "codes": [1, 4]}]}], "code is 4"),
    ],
)
def test_other_forms_are_refused(aware, messages, message):
    with pytest.raises(ValueError, match=message):
        ChatEncoder(aware).sample(messages)


def test_a_tokenizer_without_a_chat_template_is_refused(chat_tokenizer):
    aware = ItemAwareTokenizer(chat_tokenizer, num_levels=2, codebook_size=4)
    aware.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ChatEncoder(aware)


def test_a_template_that_drops_messages_is_refused(chat_tokenizer):
    aware = ItemAwareTokenizer(chat_tokenizer, num_levels=2, codebook_size=4)
    aware.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="does not write every message once"):
        ChatEncoder(aware).sample(CHATS["sid_sequence_to_sid"]["messages"])
