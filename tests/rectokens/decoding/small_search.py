"""A trie of three items, a search made step by step, and what its beams must be."""

import pytest
import torch

from rectokens.decoding.constrained_decoding import decode_one_step
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.state import ConstrainedGenerationState, ConstraintState

INF = float("inf")
ITEMS = [(0, 2), (0, 3), (4, 1)]
TRIE = CompactCSRTrie.from_sorted_batch(torch.tensor(ITEMS), 5, 1)


def start(config, trie=TRIE):
    return ConstrainedGenerationState(config, ConstraintState(0, trie, None))


def newest(state):
    ids = state.generation_state.generated_ids
    return ids.reshape(-1, ids.shape[-1])[:, -1:]


def run(model, config, prompts, trie=TRIE, mask=None):
    """All steps by hand, as a caller of ``decode_one_step`` does; every state."""
    state, states, ids = start(config, trie), [], prompts
    for step in range(config.steps):
        with torch.no_grad():
            state = decode_one_step(
                constrained_generation_state=state,
                model_fwd=model,
                input_ids=ids,
                attention_mask=mask if step == 0 else None,
            )
        states.append(state)
        ids = newest(state)
    return states


def distinct(items):
    return sorted({tuple(i) for i in items.tolist()})


def assert_beams(ids, scores, expected, k):
    """``ids`` (k, steps), ``scores`` (k,) against (sequence, score) pairs, dead beams last."""
    assert ids.shape[0] == k
    for beam, (sequence, score) in enumerate(expected):
        assert tuple(ids[beam].tolist()) == sequence
        assert float(scores[beam]) == pytest.approx(score, abs=1e-4)
    assert (ids[len(expected) :] == -1).all()
    assert (scores[len(expected) :] == -INF).all()
