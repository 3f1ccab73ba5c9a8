"""Random catalogs, requests and models, and how answers are compared; for CPU and CUDA tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceOptions
from server.engine.pool_setup import PoolOptions

LEVELS, CODES, VOCAB = 3, 5, 40
TOKENS = ItemTokens(
    offset=11, level_stride=6, num_levels=LEVELS, codebook_size=CODES, start_token_id=3
)
KINDS = ["qwen3", "llama", "mistral-sliding", "gemma2", "olmo2"]
OPTIONS = DeviceOptions(Buckets((1, 2, 4), (4, 12), 32))
POOL = PoolOptions(memory_bytes=1 << 20)


def random_catalog(seed: int, items: int) -> tuple[CatalogTrie, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(items, LEVELS, generator=generator) ** 2 * CODES).long()
    trie, order = CatalogTrie.from_codes(codes, CODES)
    return trie, codes[order]


def olmo2() -> Any:
    """Norms after attention and feed-forward, not before: no common shape."""
    from transformers import AutoModelForCausalLM, Olmo2Config

    config = Olmo2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.25)
    return model


@st.composite
def requests_of(draw: st.DrawFn, num_items: int) -> SearchRequest:
    width = draw(st.integers(1, 15))
    items = st.sets(st.integers(0, num_items - 1))
    excluded, listed = draw(st.none() | items), draw(st.none() | st.none() | items)
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=num_items, max_size=num_items))
    prefix = None
    if allowed is not None:
        prefix = torch.tensor([False, *allowed]).int().cumsum(0).int()
    return SearchRequest(
        prompt=tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=70))),
        beam_width=width,
        top_k=draw(st.integers(1, width)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 2.5])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        normalization=draw(st.sampled_from(NORMALIZATIONS)),
        excluded_items=None if excluded is None else torch.tensor(sorted(excluded)).long(),
        allowed_prefix=prefix,
        allowed_items=None if listed is None else torch.tensor(sorted(listed)).long(),
    )
