"""FP8 on CUDA: the kernels round as the definition does, and the engine finds nearly the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rectokens.kernels import decoder_launch
from rectokens.ops.decoder_pieces import ACTIVATIONS, Norm, add_norm_, gate
from rectokens.ops.fp8 import Fp8Rows, add_norm_fp8_, fp8_linear, fp8_refusal, fp8_rows, gate_fp8
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.device.fused_decoder import Fp8Projection
from server.engine.device.graphs import CapturedCall
from server.engine.loading import build_engine
from tests.server.engine.device.device_cases import POOL, TOKENS, VOCAB, random_catalog

REFUSAL = (
    "needs a CUDA device"
    if not torch.cuda.is_available()
    else fp8_refusal(torch.device("cuda"), torch.bfloat16)
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))]


def assert_same(found: Fp8Rows, wanted: Fp8Rows) -> None:
    assert torch.allclose(found.scale, wanted.scale, rtol=1e-2)
    steps = found.values.view(torch.int8).int() - wanted.values.view(torch.int8).int()
    assert int(steps.abs().max()) <= 1
    assert float((steps == 0).float().mean()) > 0.95


@pytest.mark.parametrize("size", [48, 2048, 6144])
@pytest.mark.parametrize("rows", [1, 257])
def test_kernels_round_as_the_definition(size: int, rows: int) -> None:
    x, residual = torch.randn(2, rows, size, device="cuda").bfloat16()
    x[0] = residual[0] = 0
    norm = Norm(torch.randn(size, device="cuda").bfloat16(), 1e-6)
    mine, theirs = residual.clone(), residual.clone()
    assert_same(add_norm_fp8_(x, mine, norm), fp8_rows(add_norm_(x, theirs, norm)))
    assert torch.equal(mine, theirs)
    assert_same(add_norm_fp8_(x, None, norm), fp8_rows(add_norm_(x, None, norm)))
    wide = torch.randn(rows, 2 * size, device="cuda").bfloat16()
    assert size <= decoder_launch.MAX_FP8_GATE
    for activation in ACTIVATIONS:
        assert_same(gate_fp8(wide, activation), fp8_rows(gate(wide, activation)))


@pytest.mark.parametrize("rows", [1, 17, 256, 1000])
def test_products(rows: int) -> None:
    x = torch.randn(rows, 512, device="cuda") * torch.logspace(-3, 3, rows, device="cuda")[:, None]
    weight = torch.randn(768, 512, device="cuda")
    weight *= torch.logspace(2, -2, 768, device="cuda")[:, None]
    bias = torch.randn(768, device="cuda").bfloat16()
    size = x.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    for given in (None, bias):
        found = fp8_linear(fp8_rows(x), fp8_rows(weight), given).float()
        wanted = x.double() @ weight.double().t() + (0 if given is None else given.double())
        gap = (found - wanted).abs()
        assert bool((gap <= 0.02 * size + 0.01 * wanted.abs()).all())


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_nearly_the_same_items_captured(tiny_lm: Callable[..., Any], kind: str) -> None:
    trie = random_catalog(5, 60)[0].to("cuda")
    model = tiny_lm(kind, VOCAB, seed=3).to("cuda", torch.bfloat16)
    engines = []
    for fp8 in (False, True):
        options = DeviceOptions(Buckets((1, 2, 4), (4, 12), 32), prompt_rows=(64, 256), fp8=fp8)
        engine = build_engine(model, TOKENS, POOL, options)
        assert isinstance(engine, DeviceEngine)
        assert isinstance(engine._model.decoder.layers[0].qkv, Fp8Projection) is fp8  # type: ignore[attr-defined]
        engines.append(engine)
    batch = [SearchRequest(tuple(range(n % 20, 30)), 12, 12) for n in range(12)]
    exact, rounded = (engine.search(batch, trie).results for engine in engines)
    assert all(isinstance(run, CapturedCall) for _, run in engines[1]._searches._ready.values())
    shared = total = 0
    for one, other in zip(exact, rounded, strict=True):
        assert isinstance(one, SearchResult)
        assert isinstance(other, SearchResult)
        items = {hit.item_index for hit in one.hits}
        shared += len(items & {hit.item_index for hit in other.hits})
        total += len(items)
    assert shared / total > 0.6
