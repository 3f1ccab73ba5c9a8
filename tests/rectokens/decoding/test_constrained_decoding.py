import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rectokens.decoding.constrained_decoding import autoregressive_generate, decode_one_step
from rectokens.modules.constraint_enforcer import SparseTrieConstraintEnforcer
from rectokens.modules.sparse_linear import SparseLinear
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig
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


# --- shapes and bookkeeping -------------------------------------------------------------------


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


# --- the search itself ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["uniform", "skewed", "chains", "one item", "all children"]),
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(0, 10_000),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_beam_search_equals_the_slow_one(
    random_items, recurrent, beam_search, shape, vocab, levels, seed, k, extra, dense
):
    items = random_items(shape, vocab, levels, seed)
    trie = CompactCSRTrie.from_sorted_batch(items, vocab, dense)
    model = recurrent(vocab, seed)
    steps = 1 + seed % levels
    config = GenerationConfig(steps, k=k, beam_size=k + extra, temperature=0.0)
    prompts = torch.randint(vocab, (2, 3), generator=torch.Generator().manual_seed(seed))
    last = run(model, config, prompts, trie)[-1].generation_state
    for b in range(2):
        slow = beam_search(model, prompts[b].tolist(), distinct(items), steps, k, k + extra)
        assert_beams(last.generated_ids[b], last.log_probas.view(2, k)[b], slow, k)


@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
@pytest.mark.parametrize("dense", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_enough_beams_find_and_rank_every_item(
    random_items, recurrent, beam_search, kernel, dense, temperature
):
    items = random_items("uniform", 5, 3, 7)
    leaves = distinct(items)
    trie = CompactCSRTrie.from_sorted_batch(items, 5, dense)
    k = len(leaves) + 2
    config = GenerationConfig(3, k, k, temperature, kernel)
    model, prompts = recurrent(5, 3), torch.tensor([[1, 2], [3, 0]])
    for path in ("head", None):
        ids, scores = autoregressive_generate(
            model, trie, prompts, config, attr_path=path, return_scores=True
        )
        for b in range(2):
            slow = beam_search(model, prompts[b].tolist(), leaves, 3, k, k, temperature)
            assert_beams(ids[b], scores[b], slow, k)


@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 3))
def test_at_temperature_0_all_kernels_search_alike(random_items, recurrent, kernel, seed, k, extra):
    trie = CompactCSRTrie.from_sorted_batch(random_items("uniform", 6, 3, seed), 6, 1)
    model = recurrent(6, seed)
    config = GenerationConfig(3, k=k, beam_size=k + extra, temperature=0.0)
    prompts = torch.tensor([[1, 2], [3, 0]])
    plain = autoregressive_generate(model, trie, prompts, config, return_scores=True)
    fused = autoregressive_generate(
        model, trie, prompts, config._replace(csr_kernel=kernel), "head", return_scores=True
    )
    assert torch.equal(plain[0], fused[0])
    torch.testing.assert_close(plain[1], fused[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
def test_scores_are_log_probabilities_at_the_temperature(
    random_items, recurrent, beam_search, kernel
):
    items = random_items("uniform", 5, 3, 1)
    leaves, trie = distinct(items), CompactCSRTrie.from_sorted_batch(items, 5, 1)
    model, prompts = recurrent(5, 1), torch.tensor([[1, 2]] * 4)
    exact = dict(beam_search(model, [1, 2], leaves, 3, 99, 99, 2.0))
    config = GenerationConfig(3, k=3, beam_size=3, temperature=2.0, csr_kernel=kernel)
    ids, scores = autoregressive_generate(model, trie, prompts, config, "head", return_scores=True)
    for b in range(4):
        found = [tuple(i) for i in ids[b].tolist()]
        assert len(set(found)) == 3
        for sequence, score in zip(found, scores[b].tolist(), strict=True):
            assert score == pytest.approx(exact[sequence], abs=1e-4)


@pytest.mark.parametrize(("kernel", "path"), [("default", None), ("sample", "head")])
def test_one_beam_draws_exactly(markov, beam_search, kernel, path):
    rows, temperature = 20_000, 1.5
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor(ITEMS), 5, 1)
    model = markov(5, 2)
    with torch.no_grad():
        model.head.weight.mul_(0.2)
    exact = beam_search(model, [1], ITEMS, 2, 9, 9, temperature)
    config = GenerationConfig(2, 1, 1, temperature, kernel)
    torch.manual_seed(0)
    ids = autoregressive_generate(model, trie, torch.ones(rows, 1).long(), config, path)[:, 0]
    counts = torch.bincount(ids[:, 0] * 5 + ids[:, 1], minlength=25)
    chi_square = sum(
        (counts[a * 5 + b].item() - rows * math.exp(s)) ** 2 / (rows * math.exp(s))
        for (a, b), s in exact
    )
    assert counts.sum() == sum(counts[a * 5 + b] for a, b in ITEMS)
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


def test_draws_follow_torchs_generator(markov, random_items):
    trie = CompactCSRTrie.from_sorted_batch(random_items("all children", 8, 2, 0), 8, 1)
    model, prompts = markov(8), torch.zeros(20, 1, dtype=torch.long)
    for kernel in ("default", "sample"):
        config = GenerationConfig(2, 1, 1, 5.0, kernel)
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append(autoregressive_generate(model, trie, prompts, config, "head"))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])


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


def test_a_lone_child_costs_nothing(recurrent):
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor([[3, 1, 2]]), 5, 1)
    config = GenerationConfig(3, temperature=0.0)
    ids, scores = autoregressive_generate(
        recurrent(5), trie, torch.tensor([[0]]), config, return_scores=True
    )
    assert ids.tolist() == [[[3, 1, 2]]]
    assert scores.tolist() == [[0.0]]


def test_a_trie_without_items_gives_dead_beams(recurrent):
    trie = CompactCSRTrie.from_sorted_batch(torch.empty(0, 2, dtype=torch.long), 5, 1)
    config = GenerationConfig(2, k=2, beam_size=2)
    for path in (None, "head"):
        ids, scores = autoregressive_generate(
            recurrent(5), trie, torch.tensor([[0]]), config, path, return_scores=True
        )
        assert ids.tolist() == [[[-1, -1], [-1, -1]]]
        assert (scores == -INF).all()


def test_fan_out_beyond_the_vocabulary_is_clamped(recurrent):
    config = GenerationConfig(2, k=3, beam_size=1000, temperature=0.0)
    wide = autoregressive_generate(recurrent(5), TRIE, torch.tensor([[1]]), config)
    exact = autoregressive_generate(
        recurrent(5), TRIE, torch.tensor([[1]]), config._replace(beam_size=5)
    )
    assert torch.equal(wide, exact)


def test_a_wider_search_returns_the_best_of_more(random_items, recurrent, beam_search):
    items = random_items("uniform", 6, 3, 2)
    trie = CompactCSRTrie.from_sorted_batch(items, 6, 1)
    model, prompt = recurrent(6, 8), torch.tensor([[1, 2]])
    config = GenerationConfig(3, k=2, beam_size=2, temperature=0.0)
    ids, scores = autoregressive_generate(
        model, trie, prompt, config, return_scores=True, search_width=500
    )
    assert_beams(ids[0], scores[0], beam_search(model, [1, 2], distinct(items), 3, 999, 999)[:2], 2)
    with pytest.raises(ValueError, match="search_width is 1; it must be at least k = 2"):
        autoregressive_generate(model, trie, prompt, config, search_width=1)


# --- prompts, widths, odd numbers -------------------------------------------------------------


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


def test_fewer_steps_give_prefixes(random_items, recurrent):
    items = random_items("uniform", 6, 4, 5)
    trie = CompactCSRTrie.from_sorted_batch(items, 6, 2)
    ids = autoregressive_generate(
        recurrent(6), trie, torch.tensor([[1]]), GenerationConfig(2, 3, 3, 0.0)
    )
    assert ids.shape == (1, 3, 2)
    assert {tuple(i) for i in ids[0].tolist()} <= {i[:2] for i in distinct(items)}


# --- the output layer and the model's own state -----------------------------------------------


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


# --- refusals ---------------------------------------------------------------------------------


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


def test_a_later_step_may_propose_fewer_than_k(random_items, recurrent, beam_search):
    trie = CompactCSRTrie.from_sorted_batch(random_items("uniform", 6, 2, 0), 6, 1)
    model, config = recurrent(6), GenerationConfig(2, k=3, beam_size=3, temperature=0.0)
    state = decode_one_step(start(config, trie), model, torch.tensor([[1]]))
    state = state._replace(generation_config=config._replace(beam_size=1))
    state = decode_one_step(state, model, newest(state))
    first = state.generation_state.generated_ids[0, :, 0]
    assert first.unique().numel() == 3
