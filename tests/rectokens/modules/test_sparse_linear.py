import copy

import pytest
import torch
from torch import nn

from rectokens.decoding.vntk import vtnk_pytorch
from rectokens.modules.sparse_linear import SparseLinear
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.state import ConstraintState

INF = float("inf")
ITEMS = torch.tensor([(0, 2), (0, 3), (4, 1)])
TRIE = CompactCSRTrie.from_sorted_batch(ITEMS, 5, 1)
STATE = ConstraintState(1, TRIE, torch.tensor([1, 2, -1]))
RESULTS = ("next_nodes", "valid_idxs", "sample", "topk_logits", "topk_idxs")


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def base(request):
    torch.manual_seed(0)
    return nn.Linear(4, 5, bias=request.param)


def expected(base, x):
    return vtnk_pytorch(base(x).float(), STATE.cur_node, TRIE, STATE.step)


def test_outside_the_context_it_is_the_base_layer(base):
    layer = SparseLinear(base)
    assert layer.base_linear is base
    for shape in [(4,), (3, 4), (3, 2, 4), (2, 2, 2, 4)]:
        x = torch.randn(shape)
        assert torch.equal(layer(x), base(x))
    assert all(getattr(layer, name) is None for name in RESULTS)


def test_default_masks_logits(base):
    layer, x = SparseLinear(base), torch.randn(3, 4)
    with layer.constrained(STATE):
        logits = layer(x)
    next_node, valid_idxs, masked = expected(base, x)
    torch.testing.assert_close(logits, masked)
    assert torch.equal(layer.next_nodes, next_node)
    assert torch.equal(layer.valid_idxs, valid_idxs)
    assert layer.sample is layer.topk_logits is layer.topk_idxs is None


def test_topk_ranks_children(base):
    layer, x = SparseLinear(base), torch.randn(3, 4)
    with layer.constrained(STATE, strategy="topk", k=3):
        result = layer(x)
    best = expected(base, x)[2].topk(3)
    assert result.shape == (3, 3)
    torch.testing.assert_close(result, best.values)
    assert torch.equal(layer.topk_logits, result)
    assert torch.equal(layer.topk_idxs, best.indices.masked_fill(best.values == -INF, -1))
    assert torch.equal(layer.valid_idxs, expected(base, x)[1])
    assert layer.sample is None


def test_sample_draws_a_child(base):
    layer, x = SparseLinear(base), torch.randn(3, 4)
    with layer.constrained(STATE, strategy="sample", temperature=2.0, rng_seed=3):
        result, first = layer(x), layer.sample
        layer(x)
        assert torch.equal(layer.sample, first)
    assert result.shape == (3, 5)
    assert not result.any()
    assert first[0].item() in (2, 3)
    assert first[1:].tolist() == [1, -1]
    assert layer.topk_logits is layer.topk_idxs is None
    with layer.constrained(STATE, strategy="sample", temperature=0.0):
        layer(x)
    assert layer.sample[0] == base(x)[0, 2:4].argmax() + 2


def test_every_forward_resets_the_results(base):
    layer, x = SparseLinear(base), torch.randn(3, 4)
    with layer.constrained(STATE, strategy="topk"):
        layer(x)
    assert layer.topk_idxs is not None
    layer(x)
    assert all(getattr(layer, name) is None for name in RESULTS)


@pytest.mark.parametrize("length", [1, 3])
def test_three_dimensions_constrain_the_last_position(base, length):
    layer, x = SparseLinear(base), torch.randn(3, length, 4)
    with layer.constrained(STATE):
        logits = layer(x)
    assert logits.shape == (3, length, 5)
    torch.testing.assert_close(logits[:, -1], expected(base, x[:, -1])[2])
    torch.testing.assert_close(logits[:, :-1], base(x[:, :-1]))
    with layer.constrained(STATE, "topk", k=2):
        assert layer(x).shape == (3, 1, 2)
    with layer.constrained(STATE, "sample"):
        assert layer(x).shape == (3, 1, 5)


def test_the_context_ends_with_the_block_and_with_an_error(base):
    layer, x = SparseLinear(base), torch.randn(3, 4)
    with layer.constrained(STATE):
        layer(x)
    assert torch.equal(layer(x), base(x))
    with pytest.raises(RuntimeError, match="boom"), layer.constrained(STATE):
        raise RuntimeError("boom")
    assert torch.equal(layer(x), base(x))
    with pytest.raises(ValueError, match="cur_node has shape"), layer.constrained(STATE):
        layer(x[:2])
    assert torch.equal(layer(x), base(x))


def test_an_inner_context_gives_way_to_the_outer_one(base):
    layer, x = SparseLinear(base), torch.randn(3, 4)
    with layer.constrained(STATE):
        with layer.constrained(STATE, "topk", k=2):
            assert layer(x).shape == (3, 2)
        assert layer(x).shape == (3, 5)


def test_a_head_wider_than_the_vocabulary():
    torch.manual_seed(0)
    layer, x = SparseLinear(nn.Linear(4, 8)), torch.randn(3, 4)
    with layer.constrained(STATE):
        logits = layer(x)
    assert logits.shape == (3, 8)
    assert (logits[:, 5:] == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_give_float32_logits(dtype):
    layer, x = SparseLinear(nn.Linear(4, 5).to(dtype)), torch.randn(3, 4).to(dtype)
    with layer.constrained(STATE):
        logits = layer(x)
    assert logits.dtype == torch.float32
    wide = x.float() @ layer.weight.float().T + layer.bias.float()
    torch.testing.assert_close(logits[0, 2:4], wide[0, 2:4])


def test_keys_parameters_and_moves_are_those_of_the_base_layer(base):
    layer = SparseLinear(base)
    assert list(layer.state_dict()) == list(base.state_dict())
    assert layer.weight is base.weight
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert isinstance(layer, nn.Linear)
    layer.to(torch.float64)
    assert base.weight.dtype == torch.float64
    base.weight = nn.Parameter(torch.zeros(5, 4))
    assert layer.weight is base.weight
    layer.load_state_dict(
        {k: torch.ones_like(v) for k, v in base.state_dict().items()}, assign=True
    )
    assert (base.weight == 1).all()
    assert layer.weight is base.weight


def test_training_mode_reaches_the_base_layer(base):
    layer = SparseLinear(base)
    layer.eval()
    assert not base.training
    layer.train()
    assert base.training
    assert layer.training


def test_a_copy_stands_alone(base):
    layer = SparseLinear(base)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
    assert twin.base_linear.weight is twin.weight
    assert base.weight.any()


def test_refusals(base):
    with pytest.raises(TypeError, match="Embedding"):
        SparseLinear(nn.Embedding(2, 2))
    with pytest.raises(TypeError, match="SparseLinear"):
        SparseLinear(SparseLinear(base))
    layer = SparseLinear(base)
    with pytest.raises(ValueError, match="'best'; allowed are default, sample, topk"):
        layer.constrained(STATE, strategy="best")
    with pytest.raises(ValueError, match="k is 0"):
        layer.constrained(STATE, strategy="topk", k=0)
    for shape in [(4,), (3, 0, 4), (3, 1, 1, 4)]:
        with pytest.raises(ValueError, match="expected"), layer.constrained(STATE):
            layer(torch.zeros(shape))
