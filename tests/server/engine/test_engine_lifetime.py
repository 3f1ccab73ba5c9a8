"""An engine leaves memory when nobody uses it, the model and its pages with it.

Without the garbage collector: what a service has loaded at its start is passed over by it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rectokens.schemas.search import SearchRequest
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import EngineFault
from tests.server.engine.device.device_cases import OPTIONS, POOL, TOKENS, VOCAB, random_catalog

KINDS = ["qwen3", "llama", "mistral-sliding", "gemma2"]


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["cpu", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_freed_by_its_last_user(tiny_lm: Callable[..., Any], kind: str, options: Any) -> None:
    tiny_lm(kind, VOCAB, seed=1)  # imports
    gc.collect()
    gc.disable()
    try:
        model = tiny_lm(kind, VOCAB, seed=3)
        pool = POOL if options is not None else PoolOptions(memory_bytes=1 << 20)
        engine = build_engine(model, TOKENS, pool, options)
        trie, _ = random_catalog(3, 20)
        engine.get_ready(trie)
        requests = [SearchRequest((7, 8, 9), 4, 4), SearchRequest((VOCAB + 1, 8), 4, 4)]
        found = engine.search(requests, trie).results
        assert isinstance(found[1], EngineFault)
        left = [weakref.ref(module) for module in model.modules()]
        left += [weakref.ref(tensor) for tensor in model.parameters()]
        left += [weakref.ref(tensor) for tensor in tensors_of(engine)]
        del model, engine, found
        assert len(left) > 40
        assert [one() for one in left if one() is not None] == []
    finally:
        gc.enable()


def tensors_of(engine: Any) -> list[torch.Tensor]:
    """All that the engine holds, wherever."""
    seen: set[int] = set()
    found: list[torch.Tensor] = []
    queue = list(vars(engine).values())
    while queue:
        one = queue.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, dict):
            queue += one.values()
        elif isinstance(one, list | tuple | set):
            queue += one
        elif type(one).__module__.startswith("server.engine"):
            slots = [getattr(one, name, None) for name in getattr(type(one), "__slots__", ())]
            queue += [*slots, *getattr(one, "__dict__", {}).values()]
    return found
