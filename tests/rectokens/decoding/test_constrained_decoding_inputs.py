"""Prompts, logits and arguments out of the ordinary, and refusals."""

import pytest
import torch
from torch import nn

from rectokens.decoding.constrained_decoding import autoregressive_generate, decode_one_step
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig
from rectokens.schemas.state import ConstraintState
from tests.rectokens.decoding.small_search import (
    INF,
    ITEMS,
    TRIE,
    newest,
    start,
)


def test_left_padding_does_not_matter(random_items, recurrent):
    trie = CompactCSRTrie.from_sorted_batch(random_items("uniform", 6, 3, 5), 6, 1)
    model = recurrent(6, 5)
    config = GenerationConfig(3, k=4, beam_size=4, temperature=0.0)
    prompts = [[1], [2, 3, 4], [5, 0]]
    padded = torch.tensor([[0] * (3 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (3 - len(p)) + [1] * len(p) for p in prompts])
    together = autoregressive_generate(
        model, trie, padded, config, attention_mask=mask, return_scores=True
    )
    for b, prompt in enumerate(prompts):
        alone = autoregressive_generate(
            model, trie, torch.tensor([prompt]), config, return_scores=True
        )
        assert torch.equal(together[0][b], alone[0][0])
        torch.testing.assert_close(together[1][b], alone[1][0])


@pytest.mark.parametrize("path", [None, "head"])
@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
def test_extra_logit_columns_are_never_chosen(markov, path, kernel):
    model = markov(9, 1, width=9)
    with torch.no_grad():
        model.head.bias[5:] = 1e4
    narrow = markov(9, 1, width=9)
    narrow.head = nn.Linear(8, 5)
    narrow.head.load_state_dict({k: v[:5] for k, v in model.head.state_dict().items()})
    config = GenerationConfig(2, 3, 3, 0.0, kernel)
    prompt = torch.tensor([[1]])
    wide = autoregressive_generate(model, TRIE, prompt, config, path, return_scores=True)
    exact = autoregressive_generate(narrow, TRIE, prompt, config, return_scores=True)
    assert torch.equal(wide[0], exact[0])
    torch.testing.assert_close(wide[1], exact[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_logit_dtypes(markov, dtype):
    model = markov(5).to(dtype)
    config = GenerationConfig(2, k=3, beam_size=3, temperature=0.0)
    for path in (None, "head"):
        ids, scores = autoregressive_generate(
            model, TRIE, torch.tensor([[1]]), config, path, return_scores=True
        )
        assert {tuple(i) for i in ids[0].tolist()} == set(ITEMS)
        assert scores.exp().sum() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("path", [None, "head"])
@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
def test_nan_counts_as_minus_infinity(markov, temperature, path, kernel):
    model = markov(5)
    with torch.no_grad():
        model.head.bias[[0, 2]] = float("nan")
        model.head.bias[1] = INF
    config = GenerationConfig(2, 4, 4, temperature, kernel)
    ids, scores = autoregressive_generate(
        model, TRIE, torch.tensor([[1]]), config, path, return_scores=True
    )
    # Below the root only 4 has a number, below 4 only 1.
    assert ids.tolist() == [[[4, 1], [-1, -1], [-1, -1], [-1, -1]]]
    assert scores.tolist() == [[0.0, -INF, -INF, -INF]]


def test_an_empty_batch(recurrent):
    config = GenerationConfig(2, k=3, beam_size=3)
    for path in (None, "head"):
        ids, scores = autoregressive_generate(
            recurrent(5), TRIE, torch.empty(0, 2).long(), config, path, return_scores=True
        )
        assert ids.shape == (0, 3, 2)
        assert scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GenerationConfig(3), "steps is 3; the trie has 2 levels"),
        (GenerationConfig(0), "steps is 0"),
        (GenerationConfig(1, k=0), "k is 0"),
        (GenerationConfig(1, k=3, beam_size=2), "beam_size is 2; it must be at least k = 3"),
        (GenerationConfig(1, temperature=-1.0), "temperature is -1"),
        (GenerationConfig(1, csr_kernel="fast"), "csr_kernel is 'fast'"),
    ],
)
def test_bad_configurations(markov, config, message):
    with pytest.raises(ValueError, match=message):
        autoregressive_generate(markov(5), TRIE, torch.tensor([[1]]), config)


def test_bad_arguments(markov):
    model, config = markov(5), GenerationConfig(2, k=2, beam_size=2, temperature=0.0)
    prompt = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"input_ids have shape \(2,\)"):
        decode_one_step(start(config), model, prompt[0])
    with pytest.raises(ValueError, match=r"input_ids have shape \(1, 0\)"):
        decode_one_step(start(config), model, prompt[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\); expected \(1, 2\)"):
        decode_one_step(start(config), model, prompt, torch.ones(1, 3))
    with pytest.raises(ValueError, match="padded on the left"):
        autoregressive_generate(model, TRIE, prompt, config, attention_mask=torch.tensor([[1, 0]]))
    state = decode_one_step(start(config), model, prompt)
    with pytest.raises(ValueError, match="input_ids have 3 rows"):
        decode_one_step(state, model, torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match="step is 1 and generation_state is None"):
        decode_one_step(state._replace(generation_state=None), model, newest(state))
    with pytest.raises(ValueError, match="step is 0 and generation_state is given"):
        decode_one_step(
            state._replace(constraint_state=ConstraintState(0, TRIE, None)), model, newest(state)
        )
    done = decode_one_step(state, model, newest(state))
    with pytest.raises(ValueError, match="step is 2; allowed are 0 to 1"):
        decode_one_step(done, model, newest(done))
    with pytest.raises(ValueError, match="cur_node is None"):
        decode_one_step(
            state._replace(constraint_state=ConstraintState(1, TRIE, None)), model, newest(state)
        )
    with pytest.raises(ValueError, match="4 logits a position; the trie's vocab_size is 5"):
        decode_one_step(start(config), markov(5, width=4), prompt)
