"""From a folder on disk to an engine: plain and item-aware folders, shards, types of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rectokens.decoding.catalog_search import ReferenceSearch
from rectokens.integrations.hf import ItemAwareCausalLM, ItemAwareCausalLMConfig
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.engine import Engine
from server.engine.loading import load_engine
from tests.server.engine.same_answers import assert_same

LEVELS, CODES, TEXT = 3, 8, 20
TOKENS = ItemTokens(
    offset=TEXT, level_stride=CODES, num_levels=LEVELS, codebook_size=CODES, start_token_id=3
)
VOCAB = TOKENS.end
_CODES = torch.randint(CODES, (200, LEVELS), generator=torch.Generator().manual_seed(1))
TRIE, _ORDER = CatalogTrie.from_codes(_CODES, CODES)
ITEMS = _CODES[_ORDER]


def requests(count: int = 6) -> list[SearchRequest]:
    generator = torch.Generator().manual_seed(2)
    return [
        SearchRequest(
            tuple(torch.randint(0, VOCAB, (3 + 5 * at,), generator=generator).tolist()), 20, 20
        )
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def model(tiny_lm: Callable[..., Any]) -> Any:
    return tiny_lm("qwen3", VOCAB, seed=5)


def test_plain_sharded_and_item_aware_folders_give_the_same(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    config = ItemAwareCausalLMConfig(LEVELS, CODES, base_model_config=model.config.to_dict())
    aware = ItemAwareCausalLM(config, model)
    aware.save_pretrained(tmp_path / "aware")
    kind = json.loads((tmp_path / "aware" / "config.json").read_text())["model_type"]
    assert kind == "item_aware_causal_lm"
    reference = ReferenceSearch(model, TOKENS, ITEMS)
    for name in ("plain", "shards", "aware"):
        engine = load_engine(tmp_path / name, TOKENS, device="cpu")
        for request, found in zip(requests(), engine.search(requests(), TRIE).results, strict=True):
            assert_same(found, reference.search(request), atol=1e-4)


@pytest.mark.parametrize(
    ("saved", "asked", "loaded"),
    [
        (torch.bfloat16, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float16, "float16", torch.float16),
    ],
)
def test_types_of_weights(
    saved: torch.dtype,
    asked: str,
    loaded: torch.dtype,
    tiny_lm: Callable[..., Any],
    tmp_path: Path,
) -> None:
    tiny_lm("llama", VOCAB, seed=6).to(saved).save_pretrained(tmp_path)
    engine = load_engine(tmp_path, TOKENS, device="cpu", dtype=asked)
    assert isinstance(engine, Engine)
    # The weights as they are rounded, searched in float32.
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded).float()
    reference = ReferenceSearch(exact, TOKENS, ITEMS)
    batch = requests()
    shared = 0
    for request, found in zip(batch, engine.search(batch, TRIE).results, strict=True):
        assert isinstance(found, SearchResult)
        right = {hit.item_index: hit.score for hit in reference.search(request).hits}
        mine = {hit.item_index: hit.score for hit in found.hits}
        assert len(mine) == request.top_k
        shared += len(right.keys() & mine.keys())
        for item in right.keys() & mine.keys():
            # Logits of these weights reach ten or so: rounded to 0.01 and to 0.06.
            tolerance = {torch.float32: 1e-4, torch.float16: 0.06, torch.bfloat16: 0.4}[loaded]
            assert mine[item] == pytest.approx(right[item], abs=tolerance)
    total = sum(request.top_k for request in batch)
    assert shared >= {torch.float32: 1.0, torch.float16: 0.97, torch.bfloat16: 0.9}[loaded] * total


def test_what_is_no_safetensors_folder_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no causal LM that can be loaded"):
        load_engine(tmp_path, TOKENS, device="cpu")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    # Weights that only unpickling could read are not even looked at.
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no causal LM that can be loaded"):
        load_engine(tmp_path, TOKENS, device="cpu")
