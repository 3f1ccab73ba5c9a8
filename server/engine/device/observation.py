"""One short run of a model, and what its layers and attention are given in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from server.engine.kv_pool import LayerShape

PROBE_TOKENS = 7
_NAME = "rectokens_noting"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asked of its attention.

    Attributes:
        shape: of its keys and values.
        arguments: keyword arguments.
    """

    shape: LayerShape
    arguments: dict[str, Any]


@dataclass(slots=True)
class Observed:
    """What the run showed.

    Attributes:
        first_input: hidden states the first layer was given, (1, PROBE_TOKENS, H).
        position_embeddings: rotary cosines and sines, by layer; None where there were none.
        rotary_calls: arguments and results of the decoder's rotary embedding.
        attention: by ``module.layer_idx``.
        mask_windows: sliding windows that the model's masks have.
    """

    first_input: Tensor | None = None
    position_embeddings: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    rotary_calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    attention: dict[int, AttentionCall] = field(default_factory=dict)
    mask_windows: set[int] = field(default_factory=set)

    @property
    def shapes(self) -> dict[int, LayerShape]:
        """Keys and values by attention layer."""
        return {layer: call.shape for layer, call in self.attention.items()}

    @property
    def untold_windows(self) -> set[int]:
        """Windows that are in a mask only: attention that makes its own masks would miss them."""
        told = {call.arguments.get("sliding_window") for call in self.attention.values()}
        return self.mask_windows - told


@torch.no_grad()
def observe(model: Any) -> Observed:
    """Run a few tokens through a causal LM of transformers and note what happens."""
    seen = Observed()
    decoder = model.get_decoder()

    def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if seen.first_input is None:
            given = args[0] if args else kwargs.get("hidden_states")
            seen.first_input = given.clone() if isinstance(given, Tensor) else None
        angles = kwargs.get("position_embeddings")
        is_pair = isinstance(angles, tuple) and len(angles) == 2
        seen.position_embeddings.append(angles if is_pair else None)

    def after_rotary(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen.rotary_calls.append((args, kwargs, out))

    handles = [
        layer.register_forward_pre_hook(before_layer, with_kwargs=True)
        for layer in getattr(decoder, "layers", ())
    ]
    rotary = getattr(decoder, "rotary_emb", None)
    if isinstance(rotary, nn.Module):
        handles.append(rotary.register_forward_hook(after_rotary, with_kwargs=True))
    try:
        with _noting_attention(model, seen):
            ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
            decoder(input_ids=ids % model.config.get_text_config().vocab_size, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def _noting_attention(model: Any, seen: Observed) -> Iterator[None]:
    """Attention calls within are noted, and computed, soft caps left out."""
    before = model.config._attn_implementation

    def noting(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        seen.attention[layer] = AttentionCall(shape, dict(kwargs))
        # sdpa knows no soft cap; only the arguments matter here, not the result.
        kwargs.pop("softcap", None)
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, **kwargs
        )
        return found

    def noting_mask(*args: Any, **kwargs: Any) -> Tensor | None:
        if kwargs.get("local_size"):  # a window of 0 is none
            seen.mask_windows.add(int(kwargs["local_size"]))
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask

    AttentionInterface.register(_NAME, noting)
    AttentionMaskInterface.register(_NAME, noting_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
