"""Configuration of the item-aware causal language model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class ItemAwareCausalLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """What :class:`~rectokens.integrations.hf.model.ItemAwareCausalLM` needs to be rebuilt.

    Attributes:
        num_levels: L, codes per semantic ID.
        codebook_size: K, codes per level.
        base_model_config: the wrapped model's configuration as a dict, or None where it has none.

    Raises:
        ValueError: ``num_levels`` or ``codebook_size`` below 1.
    """

    model_type = "item_aware_causal_lm"

    def __init__(
        self,
        num_levels: int = 4,
        codebook_size: int = 256,
        base_model_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("num_levels", num_levels), ("codebook_size", codebook_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.base_model_config = base_model_config
        super().__init__(**kwargs)
