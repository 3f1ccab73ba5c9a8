import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.decoding.vntk import sparse_linear_pytorch, vtnk_pytorch
from rectokens.ops.constrained_node_transition import (
    constrained_node_transition,
    draw_children,
    fused_linear_constrained_node_transition,
    fused_linear_constrained_node_transition_sampling,
    fused_linear_constrained_node_transition_topk,
    rank_children,
)
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.state import ConstraintState

INF = float("inf")
NAN = float("nan")
SHAPES = ["uniform", "skewed", "chains", "one item", "all children"]

cases = st.tuples(
    st.sampled_from(SHAPES),
    st.integers(2, 9),
    st.integers(1, 3),
    st.integers(0, 10_000),
    st.integers(0, 40),
)


def draw_case(random_items, case, dtype=torch.float32):
    """Rows at some depth of a random trie, some at leaves or -1; and a linear layer."""
    shape, vocab_size, num_levels, seed, rows = case
    items = random_items(shape, vocab_size, num_levels, seed)
    trie = CompactCSRTrie.from_sorted_batch(items, vocab_size, 1)
    g = torch.Generator().manual_seed(seed)
    step = int(torch.randint(num_levels, (), generator=g))
    first = sum(items[:, :d].unique(dim=0).shape[0] for d in range(1, step)) + (step > 0)
    count = items[:, :step].unique(dim=0).shape[0] if step else 1
    cur_node = first + torch.randint(count, (rows,), generator=g)
    kind = torch.rand(rows, generator=g)
    cur_node[kind < 0.15] = -1
    cur_node[kind > 0.85] = trie.num_edges  # the last leaf
    a = torch.randn(rows, 6, generator=g).to(dtype)
    weight = torch.randn(vocab_size, 6, generator=g).to(dtype)
    bias = torch.randn(vocab_size, generator=g).to(dtype) if seed % 2 else None
    b = weight.T if seed % 3 else weight.T.contiguous()
    return ConstraintState(step, trie, cur_node), a, b, bias


dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=80, deadline=None)
@given(cases, dtypes)
def test_transition_equals_the_reference(random_items, case, dtype):
    state, a, _, _ = draw_case(random_items, case)
    logits = torch.randn(a.shape[0], state.trie.vocab_size + case[3] % 2).to(dtype)
    results = constrained_node_transition(logits, state)
    expected = vtnk_pytorch(logits, state.cur_node, state.trie, state.step)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert torch.equal(result, wanted)


@settings(max_examples=100, deadline=None)
@given(cases, dtypes)
def test_fused_linear_equals_the_dense_product(random_items, case, dtype):
    state, a, b, bias = draw_case(random_items, case, dtype)
    dense = a.float() @ b.float()
    if bias is not None:
        dense = dense + bias.float()
    expected = vtnk_pytorch(dense, state.cur_node, state.trie, state.step)
    next_node, valid_idxs, logits = fused_linear_constrained_node_transition(a, b, state, bias)
    assert torch.equal(next_node, expected[0])
    assert torch.equal(valid_idxs, expected[1])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected[2], atol=1e-4, rtol=1e-4)
    if bias is None:
        sparse = sparse_linear_pytorch(a, b.T, state.cur_node, state.trie, state.step)
        torch.testing.assert_close(logits, sparse[2], atol=1e-4, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(cases, st.integers(1, 12))
def test_topk_equals_topk_of_masked_logits(random_items, case, k):
    state, a, b, bias = draw_case(random_items, case)
    next_node, valid_idxs, masked = fused_linear_constrained_node_transition(a, b, state, bias)
    found = fused_linear_constrained_node_transition_topk(a, b, state, k, bias)
    assert torch.equal(found[0], next_node)
    assert torch.equal(found[1], valid_idxs)
    logits, idxs = found[2], found[3]
    assert logits.shape == idxs.shape == (a.shape[0], k)
    assert (logits.dtype, idxs.dtype) == (torch.float32, torch.long)
    for row in range(a.shape[0]):
        best = sorted(((-float(x), t) for t, x in enumerate(masked[row]) if x > -INF))[:k]
        assert idxs[row].tolist() == [t for _, t in best] + [-1] * (k - len(best))
        expected = torch.tensor([-x for x, _ in best] + [-INF] * (k - len(best)))
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.integers(1, 6))
def test_log_probas_are_over_all_children(random_items, case, temperature, k):
    state, a, b, bias = draw_case(random_items, case)
    masked = fused_linear_constrained_node_transition(a, b, state, bias)[2]
    expected = (masked / (temperature or 1.0)).log_softmax(-1)
    for choices in (
        rank_children(a, b, state, k, bias=bias, temperature=temperature),
        draw_children(a, b, state, k, bias=bias, temperature=temperature, rng_seed=1),
    ):
        for row, slot in (choices.idxs >= 0).nonzero().tolist():
            token = choices.idxs[row, slot]
            assert choices.log_probas[row, slot] == pytest.approx(
                float(expected[row, token]), abs=1e-4
            )
            assert choices.logits[row, slot] == pytest.approx(float(masked[row, token]), abs=1e-4)
            child = (choices.valid_idxs[row] == token).nonzero().item()
            assert choices.nodes[row, slot] == choices.next_node[row, child]
        dead = choices.idxs < 0
        assert (choices.log_probas[dead] == -INF).all()
        assert (choices.nodes[dead] == -1).all()
        assert ((choices.idxs >= 0).sum(1) == (choices.valid_idxs >= 0).sum(1).clamp(max=k)).all()


@settings(max_examples=60, deadline=None)
@given(cases)
def test_samples_are_children_and_repeat_with_the_seed(random_items, case):
    state, a, b, bias = draw_case(random_items, case)
    draws = [
        fused_linear_constrained_node_transition_sampling(a, b, state, bias, rng_seed=seed)
        for seed in (5, 5, torch.tensor(5))
    ]
    _, valid_idxs, sample = draws[0]
    assert sample.shape == (a.shape[0],)
    assert sample.dtype == torch.long
    assert torch.equal(sample, draws[1][2])
    assert torch.equal(sample, draws[2][2])
    has_child = (valid_idxs >= 0).any(1)
    assert ((valid_idxs == sample.unsqueeze(1)).any(1))[has_child].all()
    assert (sample[~has_child] == -1).all()
    best = fused_linear_constrained_node_transition_topk(a, b, state, 1, bias)[3].squeeze(1)
    greedy = fused_linear_constrained_node_transition_sampling(a, b, state, bias, temperature=0.0)
    assert torch.equal(greedy[2], best)


def one_level(vocab_size, tokens):
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor(tokens).unsqueeze(1), vocab_size, 1)
    return trie, lambda rows: ConstraintState(0, trie, torch.zeros(rows, dtype=torch.long))


@pytest.mark.parametrize("temperature", [None, 0.5, 2.0])
def test_sampling_is_categorical(temperature):
    rows = 40_000
    _, state = one_level(8, [1, 2, 5, 7])
    logits = torch.tensor([9.0, 0.0, 1.0, 9.0, 9.0, -1.0, 9.0, 2.0])
    sample = fused_linear_constrained_node_transition_sampling(
        torch.ones(rows, 1), logits.unsqueeze(0), state(rows), rng_seed=11, temperature=temperature
    )[2]
    expected = torch.zeros(8)
    expected[[1, 2, 5, 7]] = (logits[[1, 2, 5, 7]] / (temperature or 1.0)).softmax(0)
    counts = torch.bincount(sample, minlength=8)
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - rows * expected) ** 2 / (rows * expected))[allowed].sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_draws_without_replacement_are_gumbel_top_k():
    rows = 40_000
    _, state = one_level(3, [0, 1, 2])
    p = torch.tensor([0.6, 0.3, 0.1])
    choices = draw_children(torch.ones(rows, 1), p.log().unsqueeze(0), state(rows), 2, rng_seed=3)
    pairs = torch.bincount(choices.idxs[:, 0] * 3 + choices.idxs[:, 1], minlength=9) / rows
    for i in range(3):
        for j in range(3):
            exact = 0.0 if i == j else float(p[i] * p[j] / (1 - p[i]))
            assert pairs[3 * i + j] == pytest.approx(exact, abs=0.012)


def test_a_draw_depends_on_the_row_not_on_the_batch():
    _, state = one_level(50, list(range(50)))
    a, b = torch.randn(9, 4), torch.randn(4, 50)
    many = fused_linear_constrained_node_transition_sampling(a, b, state(9), rng_seed=4)[2]
    few = fused_linear_constrained_node_transition_sampling(a[:3], b, state(3), rng_seed=4)[2]
    assert torch.equal(many[:3], few)
    same_row = fused_linear_constrained_node_transition_sampling(
        a[:1].expand(9, 4), b, state(9), rng_seed=4
    )[2]
    assert same_row.unique().numel() > 1
    assert not torch.equal(
        many, fused_linear_constrained_node_transition_sampling(a, b, state(9), rng_seed=5)[2]
    )


def test_the_default_seed_comes_from_torchs_generator():
    _, state = one_level(1000, list(range(1000)))
    a, b = torch.zeros(20, 1), torch.zeros(1, 1000)

    def draw():
        return fused_linear_constrained_node_transition_sampling(a, b, state(20))[2]

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_a_temperature_for_each_row():
    _, state = one_level(4, [0, 1, 2, 3])
    b = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    sample = fused_linear_constrained_node_transition_sampling(
        torch.ones(4000, 1), b, state(4000), rng_seed=0, temperature=torch.tensor([0.0, 9.0] * 2000)
    )[2]
    assert (sample[::2] == 3).all()
    assert (torch.bincount(sample[1::2], minlength=4) > 300).all()
    same = fused_linear_constrained_node_transition_sampling(
        torch.ones(9, 1), b, state(9), rng_seed=0, temperature=torch.tensor(0.0)
    )[2]
    assert (same == 3).all()


def test_huge_vocabulary_ids_are_exact():
    top = 2**24 + 1  # the first integer that float32 cannot hold
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor([[top], [top - 1]]), top + 1, 0)
    state = ConstraintState(0, trie, torch.zeros(1, dtype=torch.long))
    b = torch.zeros(1, top + 1)
    b[0, top] = 50.0
    sample = fused_linear_constrained_node_transition_sampling(torch.ones(1, 1), b, state)[2]
    assert sample.tolist() == [top]


@pytest.mark.parametrize(
    ("logits", "ranked"),
    [
        ([NAN, NAN, 1.0, NAN], [2, 0, 1, 3]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2, 3]),
        ([NAN, -INF, INF, 0.0], [2, 3, 0, 1]),
        ([INF, NAN, INF, INF], [0, 2, 3, 1]),
    ],
)
def test_nan_counts_as_minus_infinity(logits, ranked):
    _, state = one_level(6, [0, 1, 2, 3])
    b = torch.tensor([[*logits, 99.0, 99.0]])
    a = torch.ones(50, 1)
    found = fused_linear_constrained_node_transition_topk(a, b, state(50), 5)
    assert found[3][0].tolist() == [*ranked, -1]
    assert not found[2].isnan().any()
    for temperature in (0.0, 1.0):
        choices = draw_children(a, b, state(50), 4, rng_seed=0, temperature=temperature)
        assert ((choices.idxs >= 0) & (choices.idxs < 4)).all()
        assert not choices.log_probas.isnan().any()
        assert (choices.log_probas <= 0).all()
    sample = fused_linear_constrained_node_transition_sampling(a, b, state(50), rng_seed=1)[2]
    if logits[2] == 1.0 or logits[2:] == [INF, 0.0]:
        assert (sample == 2).all()
    assert ((sample >= 0) & (sample < 4)).all()


def test_a_tiny_temperature_does_not_overflow():
    _, state = one_level(3, [0, 1, 2])
    b = torch.tensor([[1e4, 2e4, -1e4]])
    choices = draw_children(torch.ones(4, 1), b, state(4), 3, rng_seed=0, temperature=1e-30)
    assert (choices.idxs[:, 0] == 1).all()
    assert (choices.log_probas[:, 0] == 0).all()
    assert not choices.log_probas.isnan().any()


def test_compiles_without_a_break():
    _, state = one_level(6, [0, 1, 2, 3])
    a, b = torch.randn(3, 4), torch.randn(4, 6)

    def run(a, b):
        one = fused_linear_constrained_node_transition_topk(a, b, state(3), 2)
        two = fused_linear_constrained_node_transition_sampling(a, b, state(3), rng_seed=7)
        return *one, *two, *constrained_node_transition(a @ b, state(3))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(a, b), run(a, b), strict=True):
        torch.testing.assert_close(x, y)


def test_refusals():
    trie, state = one_level(6, [0, 1])
    a, b = torch.ones(2, 3), torch.ones(3, 6)
    call = fused_linear_constrained_node_transition
    with pytest.raises(TypeError, match=r"a has dtype torch\.int64"):
        call(a.long(), b, state(2))
    with pytest.raises(ValueError, match="a has 3 columns, b has 6 rows"):
        call(a, b.T, state(2))
    with pytest.raises(ValueError, match="b columns: 5 tokens; the trie's vocab_size is 6"):
        call(a, b[:, :5], state(2))
    with pytest.raises(ValueError, match="bias has 5 entries; expected 6"):
        call(a, b, state(2), torch.ones(5))
    with pytest.raises(TypeError, match=r"bias has dtype torch\.int64"):
        call(a, b, state(2), torch.ones(6).long())
    with pytest.raises(ValueError, match=r"cur_node has shape \(3,\); expected \(2,\)"):
        call(a, b, state(3))
    with pytest.raises(ValueError, match="cur_node is None"):
        call(a, b, ConstraintState(0, trie, None))
    with pytest.raises(ValueError, match="step is 1; allowed are 0 to 0"):
        call(a, b, state(2)._replace(step=1))
    with pytest.raises(ValueError, match="b is on meta"):
        call(a, b.to("meta"), state(2))
    with pytest.raises(ValueError, match="k is 0"):
        fused_linear_constrained_node_transition_topk(a, b, state(2), 0)
    sampling = fused_linear_constrained_node_transition_sampling
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        sampling(a, b, state(2), temperature=-1.0)
    with pytest.raises(ValueError, match="expected one element or 2"):
        sampling(a, b, state(2), temperature=torch.ones(3))
    with pytest.raises(ValueError, match="expected one integer"):
        sampling(a, b, state(2), rng_seed=torch.ones(2))
    with pytest.raises(ValueError, match="logits has shape"):
        constrained_node_transition(torch.ones(2, 1, 6), state(2))


def test_results_claim_no_gradient():
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor([[0], [2]]), 5, 1)
    state = ConstraintState(0, trie, torch.zeros(2, dtype=torch.long))
    a = torch.randn(2, 3, requires_grad=True)
    b = torch.randn(3, 5, requires_grad=True)
    assert not fused_linear_constrained_node_transition(a, b, state)[2].requires_grad
    assert not fused_linear_constrained_node_transition_topk(a, b, state, 2)[2].requires_grad
    assert not constrained_node_transition(a @ b, state)[2].requires_grad
