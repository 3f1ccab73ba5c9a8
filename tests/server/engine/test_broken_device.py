"""A device that fails once is gone on with; one that is gone ends the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.types import EngineBrokenError

TOKENS = ItemTokens(offset=4, level_stride=4, num_levels=2, codebook_size=4, start_token_id=1)
TRIE, _ = CatalogTrie.from_codes(torch.tensor([[0, 1], [2, 3]]), 4)
REQUEST = SearchRequest((1,), 2, 2)


@pytest.fixture
def engine(tiny_lm: Callable[..., Any]) -> Engine:
    return build_engine(tiny_lm("llama", 16), TOKENS)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise torch.AcceleratorError("invalid configuration argument")


def test_an_error_that_passes_is_the_requests_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "session", fail)
        with pytest.raises(torch.AcceleratorError):
            engine.search([REQUEST], TRIE)
    (found,) = engine.search([REQUEST], TRIE).results
    assert isinstance(found, SearchResult)


def test_a_device_that_is_gone_is_told_apart(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._runner, "session", fail)
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(EngineBrokenError, match="invalid configuration"):
        engine.run(engine.prepare([REQUEST], TRIE))
