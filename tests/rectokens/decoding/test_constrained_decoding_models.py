"""The output layer, and the state that the model is left in."""

import pytest
import torch
from torch import nn

from rectokens.decoding.constrained_decoding import autoregressive_generate
from rectokens.modules.constraint_enforcer import SparseTrieConstraintEnforcer
from rectokens.modules.sparse_linear import SparseLinear
from rectokens.schemas.config import GenerationConfig
from tests.rectokens.decoding.small_search import (
    ITEMS,
    TRIE,
    assert_beams,
)


def test_generate_leaves_the_model_as_it_was(recurrent):
    model = recurrent(5)
    model.dropout = nn.Dropout()
    model.train()
    model.embed.eval()
    head, modes = model.head, [m.training for m in model.modules()]
    config = GenerationConfig(2, temperature=0.0)
    seen = []
    model.register_forward_hook(
        lambda m, *_: seen.append((type(m.head), [p.training for p in m.modules()]))
    )
    ids = autoregressive_generate(model, TRIE, torch.tensor([[1]]), config, "head")
    assert model.head is head
    assert [m.training for m in model.modules()] == modes
    assert seen[0] == (SparseLinear, [False] * len(modes))
    assert not ids.is_inference()
    assert not torch.is_inference_mode_enabled()
    nn.Embedding(5, 2)(ids).sum().backward()


def test_a_failing_model_is_left_as_it_was_too():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 5)

        def forward(self, input_ids, past_key_values, attention_mask, use_cache):
            raise RuntimeError("boom")

    model = Failing()
    head = model.head
    with pytest.raises(RuntimeError, match="boom"):
        autoregressive_generate(model, TRIE, torch.tensor([[1]]), GenerationConfig(1), "head")
    assert model.head is head
    assert model.training


def test_a_prepared_model_stays_prepared(recurrent):
    model = SparseTrieConstraintEnforcer("head").prepare(recurrent(5))
    sparse = model.head
    config = GenerationConfig(2, 3, 3, 0.0, "topk")
    by_path = autoregressive_generate(model, TRIE, torch.tensor([[1]]), config, "head")
    assert model.head is sparse
    without = autoregressive_generate(model, TRIE, torch.tensor([[1]]), config)
    assert torch.equal(by_path, without)
    assert sparse.topk_idxs is not None
    assert sparse.training
    assert sparse.base_linear.training


@pytest.mark.parametrize("kernel", ["topk", "sample"])
def test_a_model_that_transforms_its_logits(recurrent, beam_search, kernel):
    class Capped(recurrent):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2.0 * torch.tanh(output.logits / 2.0) + 1.0
            return output

    model = Capped(5, 3)
    config = GenerationConfig(2, 3, 3, 0.0, kernel)
    ids, scores = autoregressive_generate(
        model, TRIE, torch.tensor([[1, 2]]), config, "head", return_scores=True
    )
    assert_beams(ids[0], scores[0], beam_search(model, [1, 2], ITEMS, 2, 3, 3), 3)


def test_a_bad_path(recurrent):
    model, prompt, config = recurrent(5), torch.tensor([[1]]), GenerationConfig(1)
    with pytest.raises(AttributeError, match="tail"):
        autoregressive_generate(model, TRIE, prompt, config, "tail")
    with pytest.raises(TypeError, match="Embedding"):
        autoregressive_generate(model, TRIE, prompt, config, "embed")
