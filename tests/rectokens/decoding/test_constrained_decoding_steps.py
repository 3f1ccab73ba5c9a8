"""What each step keeps of its beams and hands to the model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rectokens.decoding.constrained_decoding import decode_one_step
from rectokens.modules.constraint_enforcer import SparseTrieConstraintEnforcer
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig
from tests.rectokens.decoding.small_search import (
    INF,
    ITEMS,
    distinct,
    newest,
    run,
    start,
)


@pytest.mark.parametrize("dense", [0, 1, 2, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_shapes_of_every_state(recurrent, random_items, dense, masked):
    B, T, k = 3, 4, 2
    trie = CompactCSRTrie.from_sorted_batch(random_items("uniform", 6, 4, 0), 6, dense)
    prompts = torch.randint(6, (B, T))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]) if masked else None
    config = GenerationConfig(4, k=k, beam_size=3, temperature=0.0)
    before = torch.zeros(B * k)
    for step, state in enumerate(run(recurrent(6), config, prompts, trie, mask)):
        beams, constraint = state.generation_state, state.constraint_state
        assert state.generation_config is config
        assert beams.generated_ids.shape == (B, k, step + 1)
        assert beams.generated_ids.dtype == torch.long
        assert beams.log_probas.shape == (B * k,)
        assert (beams.log_probas <= 0).all()
        scores = beams.log_probas.view(B, k)
        assert (scores.diff(dim=1) <= 0).all()
        assert (scores[:, 0] <= before.view(B, k)[:, 0] + 1e-6).all()
        before = beams.log_probas
        assert [t.shape[0] for t in beams.past_key_values[0]] == [B * k, B * k]
        if masked:
            expected = torch.cat([mask.repeat_interleave(k, 0), torch.ones(B * k, step + 1)], 1)
            assert torch.equal(beams.attention_mask, expected.long())
        else:
            assert beams.attention_mask is None
        assert constraint.step == step + 1
        assert constraint.trie is trie
        if step >= dense - 1:
            assert constraint.cur_node.shape == (B * k,)
        else:
            assert constraint.cur_node is None


def test_the_nodes_are_those_of_the_sequences():
    config = GenerationConfig(2, k=3, beam_size=3, temperature=0.0)
    model = FixedLogits([0.0, 0.0, 1.0, 0.0, 0.5])
    first, second = run(model, config, torch.tensor([[1]]))
    assert first.generation_state.generated_ids[0, :, 0].tolist() == [4, 0, -1]
    assert first.constraint_state.cur_node.tolist() == [2, 1, -1]
    assert second.generation_state.generated_ids[0].tolist() == [[4, 1], [0, 2], [0, 3]]
    assert second.constraint_state.cur_node.tolist() == [5, 3, 4]


class FixedLogits(nn.Module):
    """The same logits everywhere; records its calls."""

    def __init__(self, logits, past=None):
        super().__init__()
        self.logits, self.past, self.calls = torch.tensor(logits), past, []

    def forward(self, input_ids, past_key_values, attention_mask, use_cache):
        self.calls.append((input_ids, past_key_values, attention_mask, use_cache))
        logits = self.logits.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=logits, past_key_values=self.past)


def test_the_model_gets_the_states_mask_and_cache_not_the_arguments():
    config = GenerationConfig(2, k=2, beam_size=2, temperature=0.0)
    model = FixedLogits([0.0, 0.0, 1.0, 0.0, 0.5])
    mask = torch.tensor([[0, 1, 1]])
    state = decode_one_step(start(config), model, torch.tensor([[9, 1, 1]]), mask)
    wrong = torch.zeros(2, 99, dtype=torch.long)
    state = decode_one_step(state, model, newest(state), wrong)
    (ids0, past0, mask0, use0), (ids1, past1, mask1, use1) = model.calls
    assert ids0.tolist() == [[9, 1, 1]]
    assert mask0.tolist() == [[0, 1, 1]]
    assert ids1.tolist() == [[4], [0]]
    assert mask1.tolist() == [[0, 1, 1, 1]] * 2
    assert (use0, use1) == (True, True)
    assert past0 is None
    assert past1 is None
    assert state.generation_state.past_key_values is None


def test_dead_beams_are_fed_as_token_zero():
    config = GenerationConfig(2, k=3, beam_size=3, temperature=0.0)
    model = FixedLogits([0.0] * 5)
    run(model, config, torch.tensor([[1]]))
    assert sorted(model.calls[1][0].flatten().tolist()) == [0, 0, 4]


def test_every_beam_is_a_prefix_when_enough_continue(random_items, recurrent):
    items = random_items("skewed", 6, 3, 4)
    trie = CompactCSRTrie.from_sorted_batch(items, 6, 1)
    k = 6
    for kernel in ("default", "topk", "sample"):
        config = GenerationConfig(3, k, k, 1.0, kernel)
        model = recurrent(6, 4)
        SparseTrieConstraintEnforcer("head").prepare(model)
        for step, state in enumerate(run(model, config, torch.tensor([[0, 1], [2, 3]]), trie)):
            prefixes = {i[: step + 1] for i in distinct(items)}
            for beams in state.generation_state.generated_ids.tolist():
                alive = [tuple(b) for b in beams if b[0] >= 0]
                assert set(alive) <= prefixes
                assert len(set(alive)) == len(alive) == min(k, len(prefixes))


def test_dead_beams_come_last_and_may_revive_never(recurrent):
    config = GenerationConfig(2, k=5, beam_size=5, temperature=0.0)
    first, last = run(recurrent(5), config, torch.tensor([[1], [2]]))
    assert (first.generation_state.generated_ids[:, 2:] == -1).all()
    ids = last.generation_state.generated_ids
    scores = last.generation_state.log_probas.view(2, 5)
    for b in range(2):
        assert {tuple(i) for i in ids[b, :3].tolist()} == set(ITEMS)
    assert (ids[:, 3:] == -1).all()
    assert (scores[:, 3:] == -INF).all()
    assert torch.isfinite(scores[:, :3]).all()
    assert (last.constraint_state.cur_node.view(2, 5)[:, 3:] == -1).all()


def test_a_later_step_may_propose_fewer_than_k(random_items, recurrent, beam_search):
    trie = CompactCSRTrie.from_sorted_batch(random_items("uniform", 6, 2, 0), 6, 1)
    model, config = recurrent(6), GenerationConfig(2, k=3, beam_size=3, temperature=0.0)
    state = decode_one_step(start(config, trie), model, torch.tensor([[1]]))
    state = state._replace(generation_config=config._replace(beam_size=1))
    state = decode_one_step(state, model, newest(state))
    first = state.generation_state.generated_ids[0, :, 0]
    assert first.unique().numel() == 3
