import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rectokens.decoding.constrained_decoding import generate_with_item_constraints
from rectokens.decoding.trie import Trie
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

# Tokens 0-4 are item tokens, 5 text, 6 the separator, 7 the end, 8 more text.
TRIE = CompactCSRTrie.from_sorted_batch(torch.tensor([(0, 2), (0, 3), (4, 1)]), 9, 1)
SEPARATOR, END = 6, 7


class Scripted(nn.Module):
    """Prefers the script's tokens one call after the other; remembers what it was fed."""

    def __init__(self, script, vocab_size=9):
        super().__init__()
        self.script, self.vocab_size, self.fed = script, vocab_size, []

    def forward(self, input_ids, past_key_values, attention_mask, use_cache):
        calls = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        self.fed.append(input_ids.tolist())
        logits = torch.zeros(1, input_ids.shape[1], self.vocab_size)
        logits[0, -1, self.script[calls]] = 3.0
        cache = torch.zeros(1, calls + 1)
        return SimpleNamespace(logits=logits, past_key_values=((cache, cache),))


def generate(script, prompt=(5,), **kwargs):
    kwargs = {"item_sep_token_id": SEPARATOR, "num_levels": 2, **kwargs}
    model = kwargs.pop("model", None) or Scripted(script)
    return generate_with_item_constraints(model, torch.tensor([prompt]).long(), TRIE, **kwargs)


def test_free_then_an_item_then_free_again():
    # Inside an item the script's wishes count only among children: 8 and 5 are none.
    found = generate([5, 6, 8, 5, 8, 6, 4, 8, 7, 5], max_new_tokens=20, eos_token_id=END)
    assert found.dtype == torch.long
    assert found.tolist() == [5, 6, 0, 2, 8, 6, 4, 1, 7]


def test_only_new_tokens_are_fed_after_the_prompt():
    model = Scripted([5, 8, 7])
    generate(None, prompt=(1, 2, 3), model=model, eos_token_id=END)
    assert model.fed == [[[1, 2, 3]], [[5]], [[8]]]


def test_a_prompt_that_ends_in_the_separator_starts_with_an_item():
    assert generate([8, 8, 7], prompt=(5, 6), eos_token_id=END).tolist() == [0, 2, 7]
    assert generate([8, 8, 7], prompt=(6, 5), eos_token_id=END).tolist() == [8, 8, 7]


def test_the_limit_may_cut_an_item():
    assert generate([6, 4, 4], max_new_tokens=2).tolist() == [6, 4]
    assert generate([5], max_new_tokens=0).tolist() == []
    assert len(generate([5] * 200)) == 128


def test_without_an_end_token_only_the_limit_stops():
    assert generate([7, 7, 7], max_new_tokens=3).tolist() == [7, 7, 7]


def test_several_end_tokens():
    assert generate([5, 8, 7], eos_token_id=[END, 8]).tolist() == [5, 8]


def test_the_end_token_does_not_stop_an_item():
    # 4 ends free text; inside an item it is a code like any other.
    assert generate([6, 4, 4, 4], eos_token_id=4, max_new_tokens=9).tolist() == [6, 4, 1, 4]


def test_fewer_levels_than_the_trie():
    found = generate([6, 4, 8, 7], num_levels=1, eos_token_id=END)
    assert found.tolist() == [6, 4, 8, 7]


def test_an_item_shorter_than_the_levels_ends_early():
    pointer = Trie()
    pointer.insert([3])
    pointer.insert([1, 2])
    trie = CompactCSRTrie.from_trie(pointer, 9, 1)
    found = generate_with_item_constraints(
        Scripted([6, 3, 8, 7]), torch.tensor([[5]]), trie, SEPARATOR, 2, eos_token_id=END
    )
    assert found.tolist() == [6, 3, 8, 7]


def test_extra_logit_columns_are_never_chosen():
    model = Scripted([10, 7], vocab_size=11)
    assert generate(None, model=model, max_new_tokens=1).tolist() == [0]


def test_nan_logits_give_real_tokens():
    class NaN(Scripted):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.full_like(output.logits, float("nan"))
            return output

    for sample in (False, True):
        found = generate(None, prompt=(6,), model=NaN([0] * 9), max_new_tokens=6, do_sample=sample)
        assert tuple(found[:2].tolist()) in {(0, 2), (0, 3), (4, 1)}
        assert ((found >= 0) & (found < 9)).all()


@pytest.mark.parametrize(("do_sample", "temperature"), [(False, 5.0), (True, 0.0)])
def test_greedy_unless_sampling_is_asked_for(do_sample, temperature):
    for seed in range(5):
        torch.manual_seed(seed)
        found = generate(
            [5, 6, 4, 0, 7], do_sample=do_sample, temperature=temperature, eos_token_id=END
        )
        assert found.tolist() == [5, 6, 4, 1, 7]


def test_sampling_is_exact_inside_and_outside_items():
    torch.manual_seed(0)
    n, temperature = 1500, 2.0
    firsts = torch.tensor(
        [
            generate([4], prompt=(5, 6), max_new_tokens=1, do_sample=True, temperature=temperature)
            for _ in range(n)
        ]
    )
    p = 1 / (1 + math.exp(-3.0 / temperature))
    assert set(firsts.tolist()) == {0, 4}
    assert (firsts == 4).double().mean() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    free = torch.tensor(
        [generate([5], max_new_tokens=1, do_sample=True, temperature=temperature) for _ in range(n)]
    )
    p = math.exp(1.5) / (math.exp(1.5) + 8)
    assert (free == 5).double().mean() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    assert len(set(free.tolist())) == 9


def test_more_than_one_prompt():
    for bad in (torch.zeros(2, 3), torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(AssertionError, match=r"expected \(1, T\)"):
            generate_with_item_constraints(Scripted([0]), bad.long(), TRIE, SEPARATOR, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_levels": 3}, "num_levels is 3; allowed are 1 to 2"),
        ({"num_levels": 0}, "num_levels is 0"),
        ({"item_sep_token_id": 9}, "item_sep_token_id is 9; allowed are 0 to 8"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        generate([5], **change)
    with pytest.raises(ValueError, match="4 logits a position"):
        generate(None, model=Scripted([1], vocab_size=4))
    with pytest.raises(ValueError, match="input_ids are empty"):
        generate([5], prompt=())
