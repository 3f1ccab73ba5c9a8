"""From a loaded model to a device engine: fused where that is understood, by modules elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rectokens.kernels.compile_ahead import compile_ahead
from rectokens.schemas.item_tokens import ItemTokens
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.device.fp8 import in_fp8
from server.engine.device.model import Decoder, DeviceModel
from server.engine.device.module_decoder import ModuleDecoder
from server.engine.device.observation import Observed, observe
from server.engine.device.passes import BeamKV
from server.engine.device.recognition import NotRecognisedError, recognise
from server.engine.device.trial import TrialRunner
from server.engine.kv_pool import KVPool, LayerShape
from server.engine.pool_setup import PoolOptions, logit_difference, pool_bytes
from server.engine.positions import max_positions
from server.engine.prefix_cache import PrefixCache
from server.engine.runners import Runner
from server.engine.types import MEMORY_ERRORS

logger = logging.getLogger(__name__)

PAGE_TOKENS = 64  # a page is then what an attention program reads in one turn
_TRIAL_PAGES = 8
_MAX_TABLE = 1 << 20  # positions that rotary angles are tabulated for
# Logits in FP8 may differ by this part of their range: what rounding explains, no wrong result.
_FP8_TOLERANCE = 0.25
_BEAM_SHARE = 0.1  # of the free memory, at most, for beam KV of captured searches

# Logits of fixed prompts and beams, as made by a runner.
Probe = Callable[[Runner], Tensor]


@torch.inference_mode()
def build_device_engine(
    model: Any,
    item_tokens: ItemTokens,
    pool: PoolOptions | None,
    options: DeviceOptions,
    probe: Probe,
    expected: Tensor,
    tolerance: float,
) -> DeviceEngine | None:
    """A device engine whose logits are the model's own, or None and the reason in the log.

    Args:
        model: a causal LM of transformers whose layers are all attention layers, on its device.
        item_tokens: where the item tokens lie in its vocabulary.
        pool: memory for context KV; None keeps nothing from batch to batch.
        options: what is captured.
        probe: logits of fixed prompts and beams by a runner.
        expected: what the model itself makes of them.
        tolerance: largest difference, as a part of their range.

    Raises:
        ValueError: the memory for context KV holds no page.
        MemoryError, torch.OutOfMemoryError: memory was too small to try anything.
    """
    attention = model.config._attn_implementation
    try:
        seen = observe(model)
    except MEMORY_ERRORS:  # the other way would be gone for as long as the model is loaded
        raise
    except Exception:  # an odd model is run another way
        logger.warning("the model cannot be observed, and is run without pages", exc_info=True)
        return None
    reason = _unsuited(seen)
    if reason is not None:
        logger.warning("the model is run without pages: %s", reason)
        return None
    trial = KVPool(
        seen.shapes,
        num_pages=_TRIAL_PAGES,
        page_size=PAGE_TOKENS,
        device=model.device,
        dtype=model.dtype,
    )
    if options.fp8:
        tolerance = max(tolerance, _FP8_TOLERANCE)
    for name, make in _decoders(model, seen, options):
        try:
            decoder = make()
            candidate = DeviceModel(model, item_tokens, decoder, trial)
            if model.device.type == "cuda":
                compile_ahead([partial(probe, TrialRunner(candidate))])
            difference = logit_difference(expected, probe(TrialRunner(candidate)))
        except NotRecognisedError as why:
            logger.info("the model is not run %s: %s", name, why)
            continue
        except MEMORY_ERRORS:
            raise
        except Exception as why:  # any failure of a fast way means that the next one is taken
            logger.warning("the model is not run %s: %s", name, why)
            continue
        if not difference <= tolerance:
            logger.warning(
                "the model is not run %s: its logits differ by %.2g of their range",
                name,
                difference,
            )
            continue
        logger.info("the model is run %s", name)
        del trial
        return _engine(model, item_tokens, decoder, seen.shapes, pool, options)
    model.set_attn_implementation(attention)
    return None


def _decoders(
    model: Any, seen: Observed, options: DeviceOptions
) -> Iterator[tuple[str, Callable[[], Decoder]]]:
    positions = min(max_positions(model.config), _MAX_TABLE)
    if options.fp8:
        yield "with fused layers in FP8", lambda: in_fp8(recognise(model, seen, positions))
        return
    yield "with fused layers", lambda: recognise(model, seen, positions)
    yield "by its own modules over pages", lambda: ModuleDecoder(model)


def _engine(
    model: Any,
    item_tokens: ItemTokens,
    decoder: Decoder,
    shapes: dict[int, LayerShape],
    pool: PoolOptions | None,
    options: DeviceOptions,
) -> DeviceEngine:
    given = pool or PoolOptions(keep=False)
    page_tokens = max(given.page_tokens, PAGE_TOKENS)
    pages = KVPool.within(
        shapes,
        budget_bytes=pool_bytes(given, model.device),
        page_size=page_tokens,
        device=model.device,
        dtype=model.dtype,
    )
    cache = PrefixCache(
        pages.num_pages,
        pages.page_size,
        enabled=given.keep,
        model_version=given.model_version,
    )
    options = replace(options, buckets=_affordable(options.buckets, model, item_tokens, shapes))
    return DeviceEngine(model, DeviceModel(model, item_tokens, decoder, pages), cache, options)


def _affordable(
    buckets: Buckets, model: Any, item_tokens: ItemTokens, shapes: dict[int, LayerShape]
) -> Buckets:
    """Buckets whose beam KV takes no more than its share of the memory that is left."""
    if model.device.type != "cuda":
        return buckets
    free, _ = torch.cuda.mem_get_info(model.device)
    rows = buckets.max_rows
    steps = max(item_tokens.num_levels - 1, 1)
    while rows > 1 and BeamKV.num_bytes(shapes, steps, rows, model.dtype) > _BEAM_SHARE * free:
        rows //= 2
    return replace(buckets, max_rows=rows)


def _unsuited(seen: Observed) -> str | None:
    shapes = seen.shapes
    if not shapes:
        return "no layer calls its attention through transformers' registry"
    if seen.untold_windows:
        return f"a sliding window of {min(seen.untold_windows)} is in its mask only"
    for layer, shape in shapes.items():
        if shape.key_dim != shape.value_dim:
            return f"layer {layer} has keys of {shape.key_dim} and values of {shape.value_dim}"
    return None
