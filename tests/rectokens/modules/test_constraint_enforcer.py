import pytest
import torch
from torch import nn

from rectokens.modules.constraint_enforcer import ConstraintEnforcer, SparseTrieConstraintEnforcer
from rectokens.modules.sparse_linear import SparseLinear
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.state import ConstraintState

TRIE = CompactCSRTrie.from_sorted_batch(torch.tensor([(0, 2), (0, 3), (4, 1)]), 5, 1)
STATE = ConstraintState(0, TRIE, torch.zeros(2, dtype=torch.long))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"head": nn.Linear(4, 5)}))
        self.body[1]["head"].weight = self.embed.weight
        self.scale = 2.0


def test_convert_follows_a_dotted_path_and_keeps_keys_and_ties():
    model = Nested()
    keys, head = list(model.state_dict()), model.body[1]["head"]
    sparse = SparseTrieConstraintEnforcer.convert_to_sparse_linear(model, "body.1.head")
    assert model.body[1]["head"] is sparse
    assert sparse.base_linear is head
    assert list(model.state_dict()) == keys
    assert sparse.weight is model.embed.weight
    assert SparseTrieConstraintEnforcer.convert_to_sparse_linear(model, "body.1.head") is sparse
    back = SparseTrieConstraintEnforcer.restore_linear(model, "body.1.head")
    assert back is head
    assert model.body[1]["head"] is head
    assert SparseTrieConstraintEnforcer.restore_linear(model, "body.1.head") is head


@pytest.mark.parametrize(
    "path", ["missing", "body.7.head", "body.1.tail", "", "body..head", "scale.x"]
)
def test_a_path_that_leads_nowhere(path):
    with pytest.raises(AttributeError, match="leads nowhere"):
        SparseTrieConstraintEnforcer.convert_to_sparse_linear(Nested(), path)


@pytest.mark.parametrize(("path", "kind"), [("embed", "Embedding"), ("scale", "float")])
def test_a_path_to_something_else(path, kind):
    with pytest.raises(TypeError, match=f"{path} is a {kind}; expected an nn.Linear"):
        SparseTrieConstraintEnforcer.convert_to_sparse_linear(Nested(), path)
    with pytest.raises(TypeError, match=kind):
        SparseTrieConstraintEnforcer.restore_linear(Nested(), path)


def test_prepare_constrains_and_restore_undoes():
    model, enforcer = Nested(), SparseTrieConstraintEnforcer("body.1.head")
    head = model.body[1]["head"]
    assert isinstance(enforcer, ConstraintEnforcer)
    assert enforcer.constrained_linear is None
    assert enforcer.prepare(model) is model
    sparse = enforcer.constrained_linear
    assert isinstance(sparse, SparseLinear)
    assert enforcer.prepare(model).body[1]["head"] is sparse
    x = torch.randn(2, 4)
    with enforcer.constrained(STATE, strategy="topk", k=3):
        assert model.body[1]["head"](x).shape == (2, 3)
        assert sparse.topk_idxs[:, 2].tolist() == [-1, -1]
    assert not list(enforcer.parameters())
    assert enforcer.restore(model) is model
    assert model.body[1]["head"] is head
    assert enforcer.constrained_linear is None
    enforcer.restore(model)
    with pytest.raises(RuntimeError, match="prepare"):
        enforcer.constrained(STATE)


def test_constrained_before_prepare():
    with pytest.raises(RuntimeError, match="prepare"):
        SparseTrieConstraintEnforcer("head").constrained(STATE)


def test_forward_is_not_for_calling():
    with pytest.raises(NotImplementedError, match="SparseTrieConstraintEnforcer"):
        SparseTrieConstraintEnforcer("head")(torch.ones(1))


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        ConstraintEnforcer()


def test_converted_undoes_itself_even_on_errors():
    model = Nested()
    head = model.body[1]["head"]
    converted = SparseTrieConstraintEnforcer.converted(model, "body.1.head")
    with pytest.raises(RuntimeError, match="boom"), converted:
        raise RuntimeError("boom")
    assert model.body[1]["head"] is head
    sparse = SparseTrieConstraintEnforcer.convert_to_sparse_linear(model, "body.1.head")
    with SparseTrieConstraintEnforcer.converted(model, "body.1.head") as inner:
        assert inner is sparse
    assert model.body[1]["head"] is sparse


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_an_hf_model_keeps_its_keys_ties_and_outputs(tiny_lm, tmp_path, kind):
    model = tiny_lm(kind)
    keys = list(model.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (kind == "qwen3")
    enforcer = SparseTrieConstraintEnforcer("lm_head")
    enforcer.prepare(model)
    assert "lm_head.weight" in model.state_dict()
    assert list(model.state_dict()) == keys
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    restored = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(restored(ids).logits, before)
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids).logits, before)
    enforcer.restore(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model(ids).logits, before)
