"""The loader that takes the place of vLLM's: compressed payloads are decoded, the rest is vLLM's.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from rectokens.prompt_embeds import load_payload

# Plain embeddings have up to eight bytes an element; the container adds little.
_MAX_ITEM_BYTES = 8
_CONTAINER_BYTES = 1 << 16


class ModelConfig(Protocol):
    """What is read of vLLM's model configuration."""

    enable_prompt_embeds: bool
    max_model_len: int
    dtype: torch.dtype

    def get_hidden_size(self) -> int:
        """H."""


Loader = Callable[[Any, bytes], Tensor]


def decoding_loader(original: Loader) -> Loader:
    """vLLM's loader of a ``prompt_embeds`` field, taught to decode TurboQuant payloads.

    A plain tensor in a sound container goes on to ``original`` as it came. A payload becomes what
    ``original`` would return for the decoded embeddings: ``(num_tokens, hidden_size)`` of the
    model's dtype, on the CPU.

    Args:
        original: vLLM's ``safe_load_prompt_embeds(model_config, embed)``.
    """

    def safe_load_prompt_embeds(model_config: ModelConfig, embed: bytes) -> Tensor:
        if not model_config.enable_prompt_embeds:
            return original(model_config, embed)  # It has the right words for that.
        hidden_size, max_tokens = model_config.get_hidden_size(), model_config.max_model_len
        # Its errors are ValueErrors, which vLLM answers with 400.
        embeds = load_payload(
            embed,
            hidden_size=hidden_size,
            max_tokens=max_tokens,
            max_bytes=max_tokens * hidden_size * _MAX_ITEM_BYTES + _CONTAINER_BYTES,
        )
        if embeds is None:
            return original(model_config, embed)
        return embeds.to(model_config.dtype)

    return safe_load_prompt_embeds
