"""The models of many architectures on CUDA, each by the way that the engine takes there."""

from __future__ import annotations

import pytest
import torch

from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.recompute_runner import RecomputeRunner
from server.engine.runners import PerBeamRunner, SharedContextRunner
from tests.server.engine.small_items import TOKENS
from tests.server.engine.test_architectures import (
    PER_BEAM,
    RECOMPUTED,
    SHARED,
    SHARED_ONLY,
    check,
    model_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
POOL = PoolOptions(memory_bytes=1 << 20)
OPTIONS = DeviceOptions(Buckets((4,), (12,), 48), prompt_rows=(64,))


@pytest.mark.parametrize("kind", SHARED)
def test_attention_models(kind: str) -> None:
    model = model_of(kind, SHARED[kind])
    if kind == "gemma2":  # the attention of early transformers 5 leaves out its soft cap
        model.set_attn_implementation("eager")
    model = model.cuda()
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(engine, DeviceEngine)
    check(engine, model)
    assert engine.prefix_cache is not None


@pytest.mark.parametrize("kind", SHARED_ONLY)
def test_attention_that_the_engine_for_devices_does_not_know(kind: str) -> None:
    model = model_of(kind, SHARED_ONLY[kind]).cuda()
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, SharedContextRunner)
    check(engine, model)


@pytest.mark.parametrize("kind", PER_BEAM)
def test_others_have_a_cache_a_beam(kind: str) -> None:
    model = model_of(kind, PER_BEAM[kind]).cuda()
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, PerBeamRunner)
    check(engine, model)


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_where_that_fails_too_prompts_are_computed_again(kind: str) -> None:
    model = model_of(kind, RECOMPUTED[kind]).cuda()
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, RecomputeRunner)
    check(engine, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recurrent_layers_in_16_bits_still_have_a_cache_a_beam(dtype: torch.dtype) -> None:
    model = model_of("qwen3_5_text", PER_BEAM["qwen3_5_text"]).cuda().to(dtype)
    engine = build_engine(model, TOKENS, POOL, OPTIONS)
    assert isinstance(engine, Engine)
    assert isinstance(engine._runner, PerBeamRunner)
