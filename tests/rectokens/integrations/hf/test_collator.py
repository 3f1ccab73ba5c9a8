from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.integrations.hf.collator import (
    InterleavedSequenceCollator,
    PrecomputedSequenceCollator,
)

L, K = 3, 5

codes = st.tuples(*[st.integers(0, K - 1)] * L)
parts = st.lists(st.sampled_from(["hair", "I like ", "gift"]) | codes, max_size=4)


def as_parts(history):
    return [p if isinstance(p, str) else torch.tensor(p, dtype=torch.float32) for p in history]


@settings(max_examples=80, deadline=None)
@given(
    batch=st.lists(parts, min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    loss_on=st.sampled_from(["all", "items", "text"]),
    max_length=st.none() | st.integers(1, 9),
)
def test_interleaved_against_reference(aware, batch, side, loss_on, max_length):
    collate = InterleavedSequenceCollator(
        aware, padding_side=side, pad_token_id=2, loss_on=loss_on, max_length=max_length
    )
    out = collate([as_parts(history) for history in batch])
    assert set(out) == {"input_ids", "attention_mask", "labels"}

    encoded = [aware.encode_sequence(as_parts(history))[:max_length] for history in batch]
    longest = max(map(len, encoded))
    for row, ids in enumerate(encoded):
        labels = []
        for position, token in enumerate(ids):
            is_item = token >= aware.original_vocab_size
            trained = loss_on == "all" or (loss_on == "items") == is_item
            labels.append(token if trained and position > 0 else -100)
        gap = longest - len(ids)
        before, after = (gap, 0) if side == "left" else (0, gap)
        assert out["input_ids"][row].tolist() == [2] * before + ids + [2] * after
        assert out["attention_mask"][row].tolist() == [0] * before + [1] * len(ids) + [0] * after
        assert out["labels"][row].tolist() == [-100] * before + labels + [-100] * after
    assert all(tensor.dtype == torch.long for tensor in out.values())


def test_defaults(aware):
    out = InterleavedSequenceCollator(aware)([["hair"], ["I like matte lipstick"]])
    assert out["input_ids"][0, -1] == 0
    assert out["attention_mask"][0, 0] == 1
    assert (out["labels"][1, 1:] == out["input_ids"][1, 1:]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_precomputed(side):
    collate = PrecomputedSequenceCollator(pad_token_id=9, max_length=3, padding_side=side)
    out = collate(
        [
            {"input_ids": torch.tensor([1, 2, 3, 4]), "labels": torch.tensor([1, -100, 3, 4])},
            {"input_ids": [5], "labels": [5]},
        ]
    )
    short = {"left": ([9, 9, 5], [0, 0, 1], [-100, -100, 5])}.get(
        side, ([5, 9, 9], [1, 0, 0], [5, -100, -100])
    )
    assert out["input_ids"].tolist() == [[1, 2, 3], short[0]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], short[1]]
    assert out["labels"].tolist() == [[1, -100, 3], short[2]]
    assert set(out) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.long for tensor in out.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_on": "item"}, "'item'; allowed are 'all', 'items', 'text'"),
        ({"padding_side": "top"}, "'top'"),
        ({"max_length": 0}, "at least 1"),
    ],
)
def test_bad_options(aware, options, message):
    with pytest.raises(ValueError, match=message):
        InterleavedSequenceCollator(aware, **options)
    if "loss_on" not in options:
        with pytest.raises(ValueError, match=message):
            PrecomputedSequenceCollator(**options)


def test_bad_batches(aware):
    with pytest.raises(ValueError, match="empty"):
        InterleavedSequenceCollator(aware)([])
    with pytest.raises(ValueError, match="empty"):
        PrecomputedSequenceCollator()([])
    with pytest.raises(ValueError, match=r"\(2,\) and labels \(1,\)"):
        PrecomputedSequenceCollator()([{"input_ids": [1, 2], "labels": [1]}])
