"""From settings to the pool that a runner keeps prompts in, tried before it is trusted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.kv_pool import PAGE_ALIGNMENT, KVPool, LayerShape
from server.engine.pooled_prompts import PromptPool
from server.engine.positions import max_positions
from server.engine.prefix_cache import PrefixCache
from server.engine.prompt_leases import Prompts
from server.engine.runners import SharedContextRunner
from server.engine.types import MEMORY_ERRORS

logger = logging.getLogger(__name__)

DEFAULT_CPU_BYTES = 512 << 20
_CUDA_SHARE = 0.4  # of the memory that is free once the weights are loaded
_TRIAL_LENGTHS = (19, 40)  # tokens; one page and a bit, and two


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How much of earlier prompts is kept, and whose.

    Attributes:
        memory_bytes: for keys and values; None for what suits the device.
        page_tokens: positions in a page, a multiple of 16.
        model_version: of the model; a cache never outlives it.
        keep: False keeps nothing from batch to batch; an engine whose attention reads pages
            needs the memory all the same.
    """

    memory_bytes: int | None = None
    page_tokens: int = PAGE_ALIGNMENT
    model_version: str = ""
    keep: bool = True


def logit_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference between logits, as a part of the range of those that are right."""
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1.0))


def pool_bytes(options: PoolOptions, device: torch.device) -> int:
    """Memory for keys and values: as asked, else 40 % of what a GPU has free, 512 MiB on a CPU."""
    if options.memory_bytes is not None:
        return options.memory_bytes
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    return DEFAULT_CPU_BYTES


@torch.inference_mode()
def attach_pool(runner: SharedContextRunner, options: PoolOptions, tolerance: float) -> bool:
    """Let the runner keep prompts, if what it makes of a kept one is what it makes of a new one.

    Attention variants keep appearing, so that is tried on two short prompts. A model that cannot
    be tried, or fails, goes without.

    Args:
        runner: without a pool.
        options: of the pool.
        tolerance: largest difference of the logits, as a part of their range.

    Returns:
        Whether it has a pool now.

    Raises:
        ValueError: the memory holds no page, or the page size is no multiple of 16.
        MemoryError, torch.OutOfMemoryError: memory was too small to try it.
    """
    positions = max_positions(runner.decoder.config)
    if positions < _TRIAL_LENGTHS[-1] + runner.item_tokens.num_levels:
        logger.info("prompts are not kept for this model, which takes %d tokens", positions)
        return False
    shapes, dtype = layer_shapes(runner)
    difference = _difference(runner, shapes, dtype)
    if not difference <= tolerance:
        logger.warning(
            "prompts are not kept for this model: a kept one gives logits that differ by %.2g of "
            "their range",
            difference,
        )
        return False
    pool = KVPool.within(
        shapes,
        budget_bytes=pool_bytes(options, runner.device),
        page_size=options.page_tokens,
        device=runner.device,
        dtype=dtype,
    )
    cache = PrefixCache(pool.num_pages, pool.page_size, model_version=options.model_version)
    runner.pool = PromptPool(pool, cache)
    logger.info(
        "%d pages of %d tokens for prompts, %d MiB",
        pool.num_pages,
        pool.page_size,
        pool.num_bytes >> 20,
    )
    return True


@torch.inference_mode()
def layer_shapes(runner: SharedContextRunner) -> tuple[dict[int, LayerShape], torch.dtype]:
    """Shapes and type of the keys and values, as a prompt of one token shows them."""
    context = runner.context_of([[0]])
    shapes = {
        layer: LayerShape(key.shape[1], key.shape[3], context.values[layer].shape[3])
        for layer, key in context.keys.items()
    }
    if not shapes:
        raise ValueError("the model has no attention layers; there is nothing to keep")
    return shapes, next(iter(context.keys.values())).dtype


def _difference(
    runner: SharedContextRunner, shapes: Mapping[int, LayerShape], dtype: torch.dtype
) -> float:
    """Largest difference of logits between kept and new prompts, as a part of their range.

    Infinite where nothing was found again.
    """
    trial = KVPool(shapes, num_pages=6, page_size=PAGE_ALIGNMENT, device=runner.device, dtype=dtype)
    vocab = int(runner.embed.weight.shape[0])
    prompts = [[(7 * i + 3) % vocab for i in range(length)] for length in _TRIAL_LENGTHS]
    expected = _logits(runner, prompts)
    runner.pool = PromptPool(trial, PrefixCache(trial.num_pages, trial.page_size))
    try:
        _logits(runner, prompts)
        found = _logits(runner, prompts)
        if runner.pool.cache.counts.hit_tokens == 0:
            return float("inf")
    except MEMORY_ERRORS:
        raise
    except Exception:
        logger.warning("a kept prompt cannot be run by this model", exc_info=True)
        return float("inf")
    finally:
        runner.pool = None
    return logit_difference(expected, found)


def _logits(runner: SharedContextRunner, prompts: Prompts) -> Tensor:
    """Logits of level 0, and of level 1 where there is one, for two beams a prompt."""
    session = runner.session()
    try:
        logits = [session.prefill(prompts, with_vocab_norm=False).logits.flatten()]
        if runner.item_tokens.num_levels > 1:
            codes = torch.arange(2 * len(prompts), device=runner.device).view(len(prompts), 2)
            level = session.advance(
                torch.zeros_like(codes),
                codes % runner.item_tokens.codebook_size,
                1,
                with_vocab_norm=False,
            )
            logits.append(level.logits.flatten())
    finally:
        session.close([True] * len(prompts))
    return torch.cat(logits)
