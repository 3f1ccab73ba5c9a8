"""A device that fails once is gone on with; one that is gone ends the engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.engine import DeviceOptions
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import EngineBrokenError

TOKENS = ItemTokens(offset=4, level_stride=4, num_levels=2, codebook_size=4, start_token_id=1)
TRIE, _ = CatalogTrie.from_codes(torch.tensor([[0, 1], [2, 3]]), 4)
REQUEST = SearchRequest((1,), 2, 2)
FILTERED = SearchRequest((1,), 2, 2, allowed_items=torch.tensor([0, 1]))
# What a lost device is told by: torch's own errors, and those of whoever calls the driver himself.
LOST = [torch.AcceleratorError("unspecified failure"), RuntimeError("Triton Error [CUDA]: lost")]


@pytest.fixture
def engine(tiny_lm: Callable[..., Any]) -> Engine:
    return build_engine(tiny_lm("llama", 16), TOKENS)


@pytest.fixture(params=[None, DeviceOptions()], ids=["any device", "for devices"])
def either(request: pytest.FixtureRequest, tiny_lm: Callable[..., Any]) -> Any:
    pool = PoolOptions(memory_bytes=1 << 20)
    return build_engine(tiny_lm("llama", 64), TOKENS, pool, request.param)


def lose_device(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let copies to the device raise, and its being asked whether it still works."""
    zeros = torch.zeros

    def copied(*args: Any, **kwargs: Any) -> Any:
        raise error

    def gone(*args: Any, **kwargs: Any) -> Any:
        if args == (1,):
            raise torch.AcceleratorError("unspecified failure")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch, "zeros", gone)


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


@pytest.mark.parametrize("error", LOST, ids=["torch", "triton"])
def test_a_device_that_is_lost_while_a_batch_is_prepared_is_told_apart(
    either: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_device(monkeypatch, error)
    with pytest.raises(EngineBrokenError, match=re.escape(str(error))):
        either.prepare([FILTERED], TRIE)


def test_one_whose_kernels_are_not_launched_any_more_is_told_apart(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = engine.prepare([REQUEST], TRIE)
    lose_device(monkeypatch, LOST[1])
    monkeypatch.setattr(engine._runner, "run_prompts", torch.Tensor.to)
    with pytest.raises(EngineBrokenError, match="Triton Error"):
        engine.run(prepared)


def test_memory_that_is_short_while_a_batch_is_prepared_is_the_batchs_own(
    either: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = either.search([FILTERED], TRIE).results
    with monkeypatch.context() as patch:
        lose_device(patch, torch.OutOfMemoryError("tried to allocate 8 GiB"))
        patch.setattr(torch, "zeros", torch.Tensor.to)  # there is none for the question either
        with pytest.raises(torch.OutOfMemoryError, match="8 GiB"):
            either.prepare([FILTERED], TRIE)
    assert either.search([FILTERED], TRIE).results == expected


def test_a_filter_of_another_catalog_is_the_callers_mistake(either: Any) -> None:
    other = SearchRequest((1,), 2, 2, allowed_prefix=torch.zeros(9, dtype=torch.int32))
    with pytest.raises(ValueError, match="allowed_prefix has shape"):
        either.prepare([other], TRIE)
