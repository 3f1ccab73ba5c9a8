"""Training samples are what serving's prompts are made of, and no test item is among them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rectokens.prompts.parts import ItemPart
from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.item_tokens import ItemTokens
from server.demo.data import HeldOut, leave_one_out
from server.demo.samples import Augmentation, Sample, SampleMaker, batches
from server.demo.text import fit_text_tokenizer

LEVELS, CODES, BOS = 2, 40, 0


@pytest.fixture(scope="module")
def world(tiny_data):
    """Data, codes that are all distinct, and the builder of their prompts."""
    text = fit_text_tokenizer(tiny_data.texts, 300)
    tokens = ItemTokens(len(text), CODES, LEVELS, CODES, start_token_id=len(text) + LEVELS * CODES)
    recipe = PromptRecipe("interleaved", 1, {"bos_token_id": BOS, "end_token": False})
    rows = np.arange(len(tiny_data.item_ids))
    codes = np.stack([rows // CODES, rows % CODES], axis=1)
    assert codes.max() < CODES
    return tiny_data, codes, tokens, prompt_builder(recipe, tokens, text)


def items_in(token_ids, tokens):
    """Rows of the items of a sequence, with the codes of `world`."""
    at = [i for i, token in enumerate(token_ids) if token == tokens.start_token_id]
    decoded = [tokens.decode(token_ids[i + 1 : i + 1 + LEVELS]) for i in at]
    return [first * CODES + second for first, second in decoded]


def test_an_epoch_holds_every_history_and_nothing_held_out(world):
    data, codes, tokens, builder = world
    split = leave_one_out(data.sequences)
    plain = Augmentation(max_items=60, crop_share=0.0, text_share=0.0, described_share=0.0)
    maker = SampleMaker(data, codes, builder, plain)
    samples = maker.epoch(split.train, np.random.default_rng(0))
    assert [items_in(sample.token_ids, tokens) for sample in samples] == [
        list(history) for history in split.train
    ]


def test_no_test_item_leaks_into_the_training_samples_of_its_user(world):
    data, codes, tokens, builder = world
    split = leave_one_out(data.sequences)
    maker = SampleMaker(data, codes, builder, Augmentation(described_share=0.0))
    rng = np.random.default_rng(0)
    for _ in range(3):
        samples = maker.epoch(split.train, rng)
        parts = zip(samples, split.train, split.validation, split.test, strict=True)
        for sample, train, validation, test in parts:
            seen = items_in(sample.token_ids, tokens)
            assert set(seen) <= set(train)
            assert test.target not in seen
            assert validation.target not in seen


def test_labels_are_the_codes_that_follow_the_prompt_that_serving_builds(world):
    data, codes, tokens, builder = world
    plain = Augmentation(crop_share=0.0, text_share=0.0, described_share=0.0)
    maker = SampleMaker(data, codes, builder, plain)
    history = data.sequences[0][:4]
    (sample,) = maker.epoch([history], np.random.default_rng(0))
    for length in range(len(history)):
        parts = [ItemPart(tuple(codes[row].tolist())) for row in history[:length]]
        prompt = list(builder.build(parts).token_ids)
        assert sample.token_ids[: len(prompt)] == prompt
        target = tokens.encode(codes[history[length]].tolist())
        assert sample.labels[len(prompt) : len(prompt) + LEVELS] == target
    question = maker.question(HeldOut(history[:-1], history[-1]))
    assert question.token_ids == sample.token_ids
    assert question.labels == [-100] * (len(question.labels) - LEVELS) + sample.labels[-LEVELS:]


def test_windows_are_stretches_of_the_history(world):
    data, codes, tokens, builder = world
    short = Augmentation(max_items=5, crop_share=1.0, text_share=0.0, described_share=0.0)
    maker = SampleMaker(data, codes, builder, short)
    history = max(data.sequences, key=len)
    rng = np.random.default_rng(1)
    windows = [items_in(maker.epoch([history], rng)[0].token_ids, tokens) for _ in range(40)]
    for window in windows:
        first = history.index(window[0])
        assert list(history[first : first + len(window)]) == window
        assert len(window) == 5
    assert len({window[0] for window in windows}) > 3
    crops = {len(items_in(maker.epoch([history[:5]], rng)[0].token_ids, tokens)) for _ in range(40)}
    assert crops == {2, 3, 4, 5}


def test_texts_come_before_items(world):
    data, codes, tokens, builder = world
    texts = Augmentation(crop_share=0.0, text_share=1.0, described_share=1.0)
    maker = SampleMaker(data, codes, builder, texts)
    samples = maker.epoch([data.sequences[0][:3]], np.random.default_rng(0))
    assert len(samples) == 1 + len(data.item_ids)
    for sample in samples:
        first_item = sample.token_ids.index(tokens.start_token_id)
        assert first_item > 1
        assert sample.token_ids[0] == BOS
        assert all(token < tokens.offset for token in sample.token_ids[:first_item])
        assert sample.labels[: first_item + 1] == [-100] * (first_item + 1)
    described = [items_in(sample.token_ids, tokens) for sample in samples[1:]]
    assert described == [[row] for row in range(len(data.item_ids))]


def test_batches_hold_every_sample_once_within_the_budget():
    rng = np.random.default_rng(0)
    samples = [
        Sample([number + 1] * length, [number + 1] * length)
        for number, length in enumerate(rng.integers(1, 30, size=100).tolist())
    ]
    samples.append(Sample([101] * 80, [101] * 80))
    seen = []
    for batch in batches(samples, 64, 0, np.random.default_rng(1)):
        assert batch.token_ids.shape == batch.labels.shape
        assert batch.token_ids.numel() <= 64 or len(batch.token_ids) == 1
        assert torch.equal(batch.labels == -100, batch.token_ids == 0)
        for row in batch.token_ids:
            kept = row[row > 0].tolist()
            assert kept == samples[kept[0] - 1].token_ids
            seen.append(kept[0])
    assert sorted(seen) == list(range(1, 102))


def test_bad_shares_are_refused():
    with pytest.raises(ValueError, match=r"crop_share is 1\.5; allowed are 0 to 1"):
        replace(Augmentation(), crop_share=1.5)
    with pytest.raises(ValueError, match="max_items is 0"):
        Augmentation(max_items=0)
