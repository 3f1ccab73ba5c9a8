"""The training loop learns, repeats, keeps its best weights and refuses nonsense."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.item_tokens import ItemTokens
from server.demo.data import HeldOut
from server.demo.samples import Augmentation, SampleMaker
from server.demo.training import TrainSettings, answer_loss, train

CODES, LEVELS, ITEMS = 8, 2, 24
TOKENS = ItemTokens(offset=2, level_stride=CODES, num_levels=LEVELS, codebook_size=CODES,
                    start_token_id=2 + LEVELS * CODES)  # fmt: skip
FAST = TrainSettings(epochs=30, batch_tokens=128, peak_lr=1e-2, dropout=0.0, label_smoothing=0.0)


def make_model(seed=0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=TOKENS.start_token_id + 1, hidden_size=32, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        )
    )  # fmt: skip


@dataclass
class World:
    histories: list[tuple[int, ...]]
    validation: list[Any]
    maker: SampleMaker


@pytest.fixture(scope="module")
def world(tiny_data):
    """Users who always go on to the next item."""
    data = replace(
        tiny_data,
        item_ids=tiny_data.item_ids[:ITEMS],
        texts=tiny_data.texts[:ITEMS],
        embeddings=tiny_data.embeddings[:ITEMS],
        metadata=tiny_data.metadata[:ITEMS],
        sequences=(),
    )
    rows = np.arange(ITEMS)
    codes = np.stack([rows // CODES, rows % CODES], axis=1)
    builder = prompt_builder(PromptRecipe("item_history", 1, {"bos_token_id": 0}), TOKENS)
    maker = SampleMaker(
        data, codes, builder, Augmentation(text_share=0.0, described_share=0.0, crop_share=0.2)
    )
    histories = [tuple((first + i) % ITEMS for i in range(4)) for first in range(ITEMS)]
    questions = [HeldOut(history, (history[-1] + 1) % ITEMS) for history in histories]
    return World(histories, [maker.question(question) for question in questions], maker)


def run(world, model, settings, report=None):
    return train(
        model,
        TOKENS,
        world.histories,
        world.validation,
        world.maker,
        1,
        settings,
        seed=5,
        report=report,
    )


def test_learns_what_follows_what(world):
    model = make_model()
    before = answer_loss(model, TOKENS, world.validation, 1)
    report = run(world, model, FAST)
    assert before > 3.5  # about 2 ln 8
    assert report.validation_loss < 0.5
    assert report.validation_loss == pytest.approx(
        answer_loss(model, TOKENS, world.validation, 1), abs=1e-5
    )
    assert report.epochs == FAST.epochs
    # The few positions of the full softmax taught it to give codes of the right level.
    prompt = torch.tensor([world.validation[0].token_ids[:-LEVELS]])
    logits = model(input_ids=prompt).logits[0, -1]
    assert int(logits.argmax()) in range(*TOKENS.level_slice(0).indices(10**6))


def test_the_same_seed_gives_the_same_weights(world):
    settings = replace(FAST, epochs=2, dropout=0.2)
    models = [make_model(), make_model()]
    torch.manual_seed(1)
    run(world, models[0], settings)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    run(world, models[1], settings)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_epoch_is_kept(world):
    losses = []

    def note(progress):
        if progress.validation_loss is not None and len(losses) < progress.epoch:
            losses.append(progress.validation_loss)

    model = make_model()
    # A rate this high makes later epochs worse than some earlier one.
    report = run(world, model, replace(FAST, epochs=6, peak_lr=0.3), report=note)
    assert len(losses) == 6
    assert report.validation_loss == min(losses)
    assert report.best_epoch == losses.index(min(losses)) + 1
    assert answer_loss(model, TOKENS, world.validation, 1) == pytest.approx(min(losses), rel=1e-5)


def test_a_time_limit_ends_the_schedule_early(world):
    report = run(world, make_model(), replace(FAST, epochs=100_000, max_seconds=0.5))
    assert report.seconds < 10
    assert report.epochs < 100_000


def test_loss_that_is_not_finite_stops_training(world):
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the training loss is nan"):
        run(world, model, replace(FAST, epochs=1))


def test_bad_settings_are_refused(world):
    with pytest.raises(ValueError, match="epochs is 0"):
        TrainSettings(epochs=0)
    with pytest.raises(ValueError, match="max_seconds is 0"):
        TrainSettings(max_seconds=0)
    with pytest.raises(ValueError, match=r"dropout is 1\.0; allowed are 0 to below 1"):
        TrainSettings(dropout=1.0)
    with pytest.raises(ValueError, match="0 histories and 24 validation samples"):
        train(make_model(), TOKENS, [], world.validation, world.maker, 1, FAST, seed=0)
