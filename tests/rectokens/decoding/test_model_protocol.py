from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rectokens.decoding.model_protocol import (
    call_model,
    evaluating,
    gather_cache_rows,
    last_logits,
    sparse_output_layer,
)
from rectokens.modules.sparse_linear import SparseLinear

IDS = torch.tensor([[7, 3, -1], [0, 5, 6]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


class Four(nn.Module):
    def forward(self, input_ids, past_key_values, attention_mask, use_cache):
        return {"ids": input_ids, "past": past_key_values, "mask": attention_mask, "use": use_cache}


class Six(nn.Module):
    def forward(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        use_cache=None,
        position_ids=None,
        logits_to_keep=0,
    ):
        return {"position_ids": position_ids, "logits_to_keep": logits_to_keep}


def test_four_parameters_are_enough():
    seen = call_model(Four(), IDS, "cache", MASK)
    assert seen["ids"].tolist() == [[7, 3, 0], [0, 5, 6]]
    assert (seen["past"], seen["use"]) == ("cache", True)
    assert seen["mask"] is MASK
    first_is_positional = call_model(
        lambda tokens, /, past_key_values, attention_mask, use_cache: tokens, IDS, None, None
    )
    assert first_is_positional.shape == (2, 3)


def test_named_extras_are_passed():
    seen = call_model(Six(), IDS, None, MASK)
    assert seen["logits_to_keep"] == 1
    assert seen["position_ids"].tolist() == [[0, 0, 1], [1, 2, 3]]
    assert call_model(Six(), IDS, None, None)["position_ids"] is None
    assert call_model(Six().forward, IDS, None, MASK)["logits_to_keep"] == 1
    compiled = torch.compile(Six(), backend="eager")
    assert call_model(compiled, IDS, None, MASK)["logits_to_keep"] == 1


def test_a_catch_all_is_not_a_name():
    def forward(input_ids, **kwargs):
        return kwargs

    assert set(call_model(forward, IDS, None, MASK)) == {
        "past_key_values",
        "attention_mask",
        "use_cache",
    }


def test_a_callable_without_a_signature():
    class Opaque:
        __signature__ = "none"

        def __call__(self, input_ids, **kwargs):
            return sorted(kwargs)

    assert call_model(Opaque(), IDS, None, MASK) == [
        "attention_mask",
        "past_key_values",
        "use_cache",
    ]


def test_tuple_caches_are_gathered_by_row():
    rows = torch.tensor([1, 1, 0])
    k, v = torch.randn(2, 3, 4), torch.randn(2, 5)
    gathered = gather_cache_rows(((k, v), (v, None)), rows)
    assert isinstance(gathered, tuple)
    assert torch.equal(gathered[0][0], k[rows])
    assert torch.equal(gathered[1][0], v[rows])
    assert gathered[1][1] is None
    assert gather_cache_rows(None, rows) is None


def test_caches_with_reorder_cache():
    class InPlace:
        def reorder_cache(self, rows):
            self.rows = rows

    class Fresh:
        def reorder_cache(self, rows):
            return ("new", rows)

    rows, cache = torch.tensor([1, 0]), InPlace()
    assert gather_cache_rows(cache, rows) is cache
    assert cache.rows is rows
    assert gather_cache_rows(Fresh(), rows) == ("new", rows)


def test_an_unknown_cache():
    with pytest.raises(TypeError, match="past_key_values is a dict"):
        gather_cache_rows({}, torch.tensor([0]))


def test_last_logits():
    logits = torch.randn(2, 3, 7)
    assert torch.equal(last_logits(SimpleNamespace(logits=logits), 2, 5), logits[:, -1])
    for bad, message in [
        (logits[:, 0], r"\(2, 7\)"),
        (logits[:1], r"\(1, 3, 7\)"),
        (logits[:, :0], r"\(2, 0, 7\)"),
        (logits[..., :4], "4 logits a position"),
    ]:
        with pytest.raises(ValueError, match=message):
            last_logits(SimpleNamespace(logits=bad), 2, 5)


def test_the_sparse_layer_of_a_model():
    model = nn.Sequential(nn.Linear(2, 2), SparseLinear(nn.Linear(2, 2)))
    assert sparse_output_layer(model) is model[1]
    assert sparse_output_layer(model.forward) is model[1]
    assert sparse_output_layer(nn.Linear(2, 2)) is None
    assert sparse_output_layer(lambda *_: None) is None
    model.append(SparseLinear(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="2 SparseLinear layers"):
        sparse_output_layer(model)


def test_evaluating_restores_each_mode():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]
    with pytest.raises(RuntimeError, match="boom"), evaluating(model):
        raise RuntimeError("boom")
    assert [m.training for m in model.modules()] == [True, True, False]
