import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from rectokens.decoding.constrained_decoding import autoregressive_generate
from rectokens.decoding.model_cache import cache_argument, returned_cache
from rectokens.decoding.model_protocol import call_model
from rectokens.integrations.hf import ItemAwareCausalLM, ItemAwareCausalLMConfig
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig


class New(nn.Module):
    def forward(self, input_ids, cache=None, attention_mask=None, use_cache=None):
        return SimpleNamespace(cache=(cache, "grown"))


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, attention_mask=None, use_cache=None):
        return SimpleNamespace(past_key_values=(past_key_values, "grown"))


@pytest.mark.parametrize("model", [New(), Old(), New().forward])
def test_a_model_gets_and_gives_its_cache_by_its_own_name(model):
    output = call_model(model, torch.tensor([[1]]), "cache", None)
    assert returned_cache(output) == ("cache", "grown")


def test_a_catch_all_gets_the_name_of_the_protocol():
    assert cache_argument(lambda input_ids, **rest: rest, 1) == {"past_key_values": 1}
    with pytest.raises(AttributeError, match="past_key_values"):
        returned_cache(SimpleNamespace(logits=0))


@pytest.mark.parametrize("wrapped", [False, True])
def test_models_of_transformers_are_not_called_by_a_name_that_goes(wrapped):
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = Qwen3ForCausalLM(config)
    if wrapped:
        model = ItemAwareCausalLM(
            ItemAwareCausalLMConfig(num_levels=2, codebook_size=2), hf_model=model
        )
    items = torch.tensor([[3, 5], [3, 6], [4, 5]])
    trie = CompactCSRTrie.from_sorted_batch(items, vocab_size=config.vocab_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        found = autoregressive_generate(
            model,
            trie,
            torch.tensor([[1, 2]]),
            GenerationConfig(steps=2, k=3, beam_size=3, temperature=0.0),
        )
    assert sorted(found[0].tolist()) == items.tolist()
