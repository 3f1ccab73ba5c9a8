"""Memory that is short for a moment while a model is loaded decides nothing for good.

How a model is run is found out by trying; a trial that memory was too small for says nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine.device.engine import DeviceEngine
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.runners import SharedContextRunner
from tests.server.engine.device.device_cases import OPTIONS, POOL, TOKENS, VOCAB

ERRORS = [torch.OutOfMemoryError("tried to allocate 8 GiB"), MemoryError()]


@pytest.fixture
def model(tiny_lm: Callable[..., Any]) -> Any:
    return tiny_lm("llama", VOCAB, seed=3)


def short(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "step",
    [
        "server.engine.device.build.observe",
        "server.engine.device.build.recognise",
        "server.engine.device.trial._TrialSession.prefill",
    ],
)
def test_the_engine_for_devices(
    step: str, error: BaseException, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step, short(error))
        with pytest.raises(type(error)):
            build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(build_engine(model, TOKENS, POOL, OPTIONS), DeviceEngine)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "step",
    [
        "server.engine.runners.SharedContextRunner.__init__",
        "server.engine.runners._SharedContextSession.advance",
        "server.engine.pooled_prompts.PromptPool.lease",
    ],
)
def test_the_way_that_prompts_are_shared_and_kept(
    step: str, error: BaseException, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step, short(error))
        with pytest.raises(type(error)):
            build_engine(model, TOKENS, POOL)
    engine = build_engine(model, TOKENS, POOL)
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, SharedContextRunner)
    assert engine.prefix_cache is not None
