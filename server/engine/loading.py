"""From a model folder to an engine, and the choice of how to run the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectokens.ops.fp8 import fp8_refusal
from rectokens.schemas.item_tokens import ItemTokens
from server.engine.device.build import build_device_engine
from server.engine.device.engine import DeviceEngine, DeviceOptions
from server.engine.device.fp8 import let_go_of_rounded
from server.engine.engine import Engine
from server.engine.head import LevelHead
from server.engine.pool_setup import PoolOptions, attach_pool, logit_difference
from server.engine.prompt_leases import Prompts
from server.engine.recompute_runner import RecomputeRunner
from server.engine.runners import PerBeamRunner, Runner, SharedContextRunner
from server.engine.types import MEMORY_ERRORS

logger = logging.getLogger(__name__)

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 4e-2}


def load_engine(
    model_dir: Path,
    item_tokens: ItemTokens,
    *,
    device: str = "auto",
    dtype: str = "auto",
    pool: PoolOptions | None = None,
    device_options: DeviceOptions | None = None,
) -> Engine | DeviceEngine:
    """Load a Hugging Face model folder and make an engine of it.

    Args:
        model_dir: a folder with ``config.json`` and safetensors weights.
        item_tokens: where the item tokens lie in its vocabulary.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (float32 on a CPU, as saved on CUDA), ``float32``, ``bfloat16`` or
            ``float16``.
        pool: of earlier prompts; None keeps none.
        device_options: of the engine for devices, which is tried first on CUDA; None for its
            defaults.

    Raises:
        ValueError: a folder that holds no causal LM, or one the item tokens do not fit, or FP8 is
            wanted and the device or the model cannot do it.
        MemoryError, torch.OutOfMemoryError: for want of memory nothing can be said of the model.
    """
    from transformers import AutoModelForCausalLM

    import rectokens.integrations.hf  # noqa: F401  registers ItemAwareCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wants_fp8 = device_options is not None and device_options.fp8
    if wants_fp8:
        # Before the weights are read.
        _refuse_fp8(fp8_refusal(torch.device(device), torch.bfloat16))
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{model_dir} holds no causal LM that can be loaded: {error}") from error
    on_cuda = torch.device(device).type == "cuda"
    model = model.to(device)
    engine = build_engine(model, item_tokens, pool, device_options if on_cuda else None)
    if wants_fp8:
        let_go_of_rounded(_unwrap(model))
    return engine


def _refuse_fp8(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def build_engine(
    model: Any,
    item_tokens: ItemTokens,
    pool: PoolOptions | None = None,
    device_options: DeviceOptions | None = None,
) -> Engine | DeviceEngine:
    """An engine around a model that is loaded and on its device.

    Args:
        model: the causal LM.
        item_tokens: where the item tokens lie in its vocabulary.
        pool: of earlier prompts; None keeps none.
        device_options: of the engine for devices, which is tried first on CUDA; given on a CPU,
            it is tried there too.

    Raises:
        ValueError: the vocabulary ends before the item tokens do, or the pool's memory holds not
            even one page, or FP8 is wanted and the device or the model cannot do it.
        MemoryError, torch.OutOfMemoryError: see :func:`load_engine`.
    """
    model = _unwrap(model).eval()
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    last = max(item_tokens.end - 1, item_tokens.start_token_id, item_tokens.end_token_id or 0)
    if last >= vocab_size:
        raise ValueError(
            f"item token ids reach {last}; the model's vocabulary has {vocab_size} entries"
        )
    if device_options is None and model.device.type == "cuda":
        device_options = DeviceOptions()
    if device_options is not None and device_options.fp8:
        _refuse_fp8(fp8_refusal(model.device, model.dtype))
    expected = _expected(model, item_tokens)
    if device_options is not None:
        engine = _device_engine(model, item_tokens, pool, device_options, expected)
        if engine is not None:
            return engine
        if device_options.fp8:
            raise ValueError(
                "the model's layers cannot be computed in FP8, the log says why; leave "
                "engine.fp8 out"
            )
    runner = _choose_runner(model, item_tokens, expected)
    if pool is not None and pool.keep and isinstance(runner, SharedContextRunner):
        attach_pool(runner, pool, _TOLERANCE[model.dtype])
    return Engine(model, item_tokens, runner)


def _device_engine(
    model: Any,
    item_tokens: ItemTokens,
    pool: PoolOptions | None,
    options: DeviceOptions,
    expected: Tensor,
) -> DeviceEngine | None:
    """The engine for devices where it gives the model's own logits, else None."""
    if not _layer_types(model) <= _ATTENTION_LAYERS or model.dtype not in _TOLERANCE:
        return None

    def probe(runner: Runner) -> Tensor:
        return _probe(runner, item_tokens, model)

    return build_device_engine(
        model, item_tokens, pool, options, probe, expected, _TOLERANCE[model.dtype]
    )


def choose_runner(model: Any, item_tokens: ItemTokens) -> Runner:
    """The fastest runner that gives the model's own logits.

    Laying beams side by side is wrong for layers that mix neighbouring positions by other means
    than attention, and attention variants keep appearing; nor can every model's cache be told
    which beams go on. So the choice is made by trying: two short prompts and three beams, against
    whole sequences without a cache.
    """
    return _choose_runner(model, item_tokens, _expected(model, item_tokens))


def _choose_runner(model: Any, item_tokens: ItemTokens, expected: Tensor) -> Runner:
    layer_types = _layer_types(model)
    plain_attention = model.config._attn_implementation
    if layer_types <= _ATTENTION_LAYERS:
        shared, reason = _tried(SharedContextRunner, model, item_tokens, expected)
        if shared is not None:
            return shared
        logger.warning("prompts are not shared between beams for this model: %s", reason)
        model.set_attn_implementation(plain_attention)
    else:
        names = ", ".join(sorted(layer_types - _ATTENTION_LAYERS))
        logger.info("the model has %s layers: every beam gets a cache of its own", names)
    for kind in (_per_beam_of_levels, PerBeamRunner):
        per_beam, reason = _tried(kind, model, item_tokens, expected)
        if per_beam is not None:
            return per_beam
    logger.warning(
        "beams have no caches for this model, and every level computes their prompts again, which "
        "is slow: %s",
        reason,
    )
    return RecomputeRunner(model, item_tokens)


def _per_beam_of_levels(model: Any, item_tokens: ItemTokens) -> Runner:
    return PerBeamRunner(model, item_tokens, LevelHead(model, item_tokens))


def _tried(
    kind: Callable[[Any, ItemTokens], Runner], model: Any, item_tokens: ItemTokens, expected: Tensor
) -> tuple[Runner | None, str]:
    """A runner if it gives the expected logits, else None and why not."""
    try:
        runner = kind(model, item_tokens)
        with torch.inference_mode():
            difference = logit_difference(expected, _probe(runner, item_tokens, model))
    except MEMORY_ERRORS:  # the slower one would be taken for as long as the model is loaded
        raise
    except Exception as why:  # any failure of a fast way means that a slower one is taken
        return None, f"{type(why).__name__}: {why}"
    if difference <= _TOLERANCE[model.dtype]:
        return runner, ""
    return None, f"its logits differ by {difference:.2g} of their range"


@torch.inference_mode()
def _expected(model: Any, item_tokens: ItemTokens) -> Tensor:
    """What the model itself makes of the probe."""
    return _probe(RecomputeRunner(model, item_tokens), item_tokens, model)


def _probe(runner: Runner, item_tokens: ItemTokens, model: Any) -> Tensor:
    """Logits of levels 0 and 1 for fixed prompts of unequal length and three beams."""
    vocab = int(model.get_input_embeddings().weight.shape[0])
    prompts: Prompts = [
        [(7 * i + 3) % vocab for i in range(5)],
        [(11 * i + 1) % vocab for i in range(8)],
    ]
    device = model.device
    session = runner.session()
    logits = [session.prefill(prompts, with_vocab_norm=True)]
    if item_tokens.num_levels > 1:
        codes = torch.arange(6, device=device).view(2, 3) % item_tokens.codebook_size
        parents = torch.zeros(2, 3, dtype=torch.long, device=device)
        logits.append(session.advance(parents, codes, 1, with_vocab_norm=True))
    if item_tokens.num_levels > 2:
        parents = torch.tensor([[2, 0, 1], [1, 1, 0]], device=device)
        logits.append(session.advance(parents, codes.flip(1), 2, with_vocab_norm=True))
    parts = []
    for level in logits:
        assert level.vocab_log_norm is not None
        parts += [level.logits.flatten(), level.vocab_log_norm.flatten()]
    return torch.cat(parts)


def _layer_types(model: Any) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _unwrap(model: Any) -> Any:
    """The language model inside an ``ItemAwareCausalLM``; any other model as it is."""
    return model.model if model.config.model_type == "item_aware_causal_lm" else model
