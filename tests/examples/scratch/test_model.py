"""The loss against the scores that are served, and against a loop."""

from __future__ import annotations

import pytest
import torch

from examples.scratch.model import BOS_ID, item_tokens, new_model, prompt_recipe
from examples.scratch.objective import Objective
from examples.scratch.settings import (
    DropoutSettings,
    ModelSettings,
    OptimizerSettings,
    TeacherSettings,
)
from examples.scratch.teacher import NO_TARGET, Teacher
from examples.scratch.windows import PADDING
from rectokens.catalog.build import build_catalog
from rectokens.prompts.parts import ItemPart
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.search import SearchRequest
from server.engine.loading import build_engine

NO_DROPOUT = DropoutSettings(embedding=0, layer=0, output=0)
CODES = torch.tensor([[0, 1], [0, 2], [1, 0], [1, 3], [2, 2], [3, 1], [3, 3], [0, 0]])
TOKENS = item_tokens(2, 4)


@pytest.fixture
def model():
    made = new_model(
        TOKENS, ModelSettings(hidden_size=16, num_layers=2, num_heads=2), NO_DROPOUT, seed=0
    )
    with torch.no_grad():  # sharper than fresh weights are
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return made.eval()


def loss_of(model, windows, teacher=None, max_items=20, **how):
    settings = OptimizerSettings(**{"label_smoothing": 0.0, **how})
    objective = Objective(
        model, TOKENS, CODES, NO_DROPOUT, settings, max_items=max_items, teacher=teacher
    )
    with torch.no_grad():
        return float(objective(torch.tensor(windows)))


@pytest.mark.parametrize("softmax", ["children", "level"])
def test_the_loss_is_the_score_that_is_served(model, softmax):
    """A history's loss is what constrained search says of each of its items, in one pass."""
    windows = [[3, 5, 1], [6, 2, PADDING]]
    catalog = build_catalog(
        [f"I{row}" for row in range(8)], CODES, codebook_size=4, tokenizer_fingerprint="0" * 64
    )
    builder = prompt_builder(prompt_recipe(20), TOKENS)
    engine = build_engine(model, TOKENS)
    scores = []
    for row in windows:
        items = [item for item in row if item != PADDING]
        for place, item in enumerate(items):
            history = [ItemPart(tuple(CODES[at].tolist())) for at in items[:place]]
            request = SearchRequest(
                builder.build(history).token_ids, beam_width=8, top_k=8, normalization=softmax
            )
            (result,) = engine.search([request], catalog.trie).results
            names = catalog.ids_of([hit.item_index for hit in result.hits])
            scores.append(result.hits[names.index(f"I{item}")].score)
    expected = -sum(scores) / len(scores)
    assert loss_of(model, windows, softmax=softmax) == pytest.approx(expected, rel=1e-4)


def test_training_sees_the_prompts_of_the_recipe(model):
    objective = Objective(model, TOKENS, CODES, NO_DROPOUT, OptimizerSettings())
    (ids,) = objective.token_ids(torch.tensor([[3, 5, 1]])).tolist()
    builder = prompt_builder(prompt_recipe(20), TOKENS)
    parts = [ItemPart(tuple(CODES[row].tolist())) for row in (3, 5, 1)]
    assert ids == builder.training_sequence(parts)[0]
    assert ids[0] == BOS_ID


def test_padding_has_no_say(model):
    alone = loss_of(model, [[3, 5, 1]])
    beside = loss_of(model, [[3, 5, 1], [3, PADDING, PADDING]])
    single = loss_of(model, [[3]])
    assert beside == pytest.approx((3 * alone + single) / 4, rel=1e-5)


def test_level_weights_and_smoothing(model):
    first = loss_of(model, [[3, 5]], level_weights=(1.0, 0.0))
    second = loss_of(model, [[3, 5]], level_weights=(0.0, 1.0))
    assert loss_of(model, [[3, 5]], level_weights=(2.0, 0.5)) == pytest.approx(
        2 * first + 0.5 * second, rel=1e-5
    )
    # Item 4 is alone behind its code: only its first level can be wrong.
    assert loss_of(model, [[4]], level_weights=(0.0, 1.0)) == pytest.approx(0.0, abs=1e-6)
    smooth = loss_of(model, [[4]], level_weights=(0.0, 1.0), label_smoothing=0.5)
    assert smooth == pytest.approx(0.0, abs=1e-6)
    assert loss_of(model, [[3, 5]], label_smoothing=0.1) != pytest.approx(first + second)
    with pytest.raises(ValueError, match="level_weights has 3 values; the model has 2 levels"):
        loss_of(model, [[3]], level_weights=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("draws", [1, 2])
def test_branches_are_prompts_that_end_there(model, draws):
    """The loss of drawn targets is that of histories which end with them."""

    class Fixed(Teacher):
        def targets(self, windows):
            following = {3: 5, 5: 6, 1: 0, 2: NO_TARGET, PADDING: NO_TARGET}
            return torch.tensor([[following[item] for item in row] for row in windows.tolist()])

    windows = [[3, 5, 1], [2, 3, PADDING]]
    single = {}
    for history in ([3], [3, 5], [3, 5, 1], [2, 3]):
        target = {3: 5, 5: 6, 1: 0}[history[-1]]
        # The sum over a window less that over all but its last item is the last item's.
        whole = (len(history) + 1) * loss_of(model, [[*history, target]])
        single[tuple(history)] = whole - len(history) * loss_of(model, [history])
    nothing = torch.zeros(0)
    for weight, trunk in ((1.0, 0.0), (0.25, 2.0)):
        how = TeacherSettings(weight=weight, trunk_weight=trunk, draws=draws)
        teacher = Fixed(nothing, nothing, nothing, nothing, how)
        expected = weight * sum(single.values()) / 4 + trunk * loss_of(model, windows)
        assert loss_of(model, windows, teacher) == pytest.approx(expected, rel=1e-4)
    # A history as long as the longest prompt has a target behind it, a longer one has none.
    how = TeacherSettings(weight=1.0, trunk_weight=0.0, draws=draws)
    teacher = Fixed(nothing, nothing, nothing, nothing, how)
    short = sum(value for history, value in single.items() if len(history) <= 2) / 3
    assert loss_of(model, windows, teacher, max_items=2) == pytest.approx(short, rel=1e-4)


def test_dropout_works_in_training_only():
    dropped = DropoutSettings(embedding=0.5, layer=0.5, output=0.5, item=0.5)
    model = new_model(TOKENS, ModelSettings(hidden_size=16, num_layers=1, num_heads=2), dropped, 0)
    ids = torch.tensor([[1, 2, 4, 8]])
    model.eval()
    assert model(ids).logits.equal(model(ids).logits)
    model.train()
    assert not model(ids).logits.equal(model(ids).logits)
