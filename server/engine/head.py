"""The LM head, computed only for the codes of one level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rectokens.schemas.item_tokens import ItemTokens

_MAX_VOCAB_LOGITS = 1 << 26  # 256 MB in float32: bound on what the vocabulary normaliser holds


@dataclass(frozen=True, slots=True)
class LevelLogits:
    """Next-code logits of every beam.

    Attributes:
        logits: float32 (B, W, K).
        vocab_log_norm: float32 (B, W), log-sum-exp over the vocabulary; None unless asked for.
    """

    logits: Tensor
    vocab_log_norm: Tensor | None


def read_head(model: Any) -> tuple[nn.Linear, float, float | None]:
    """The LM head of a causal LM, and what its configuration makes of the logits.

    Returns:
        The layer, the constant factor and the soft cap; None where there is no cap.

    Raises:
        ValueError: a head that is no Linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the model's head is {type(head).__name__}; expected a Linear layer")
    config = model.config.get_text_config()
    factor = float(getattr(config, "logit_scale", None) or 1.0)
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)
    return head, factor, getattr(config, "final_logit_softcapping", None)


class LevelHead:
    """Logits of a level's K codes from hidden states.

    Args:
        model: the causal LM; see :func:`read_head`.
        item_tokens: where the item tokens lie.

    Raises:
        ValueError: a head that is no Linear layer.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        head, self._factor, self._softcap = read_head(model)
        self._weight, self._bias = head.weight, head.bias
        self._item_tokens = item_tokens

    def __call__(self, hidden: Tensor, level: int, *, with_vocab_norm: bool) -> LevelLogits:
        """Logits after hidden states (B, W, H) at ``level``."""
        return LevelLogits(
            self._logits(hidden, self._item_tokens.level_slice(level)),
            self._vocab_log_norm(hidden) if with_vocab_norm else None,
        )

    def _logits(self, hidden: Tensor, rows: slice) -> Tensor:
        bias = None if self._bias is None else self._bias[rows]
        logits = F.linear(hidden, self._weight[rows], bias).float() * self._factor
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def _vocab_log_norm(self, hidden: Tensor) -> Tensor:
        vocab = self._weight.shape[0]
        flat = hidden.flatten(0, -2)
        rows = max(_MAX_VOCAB_LOGITS // vocab, 1)
        parts = [self._logits(part, slice(0, vocab)).logsumexp(-1) for part in flat.split(rows)]
        return torch.cat(parts).view(hidden.shape[:-1])


def level_of_vocab_logits(
    logits: Tensor, item_tokens: ItemTokens, level: int, *, with_vocab_norm: bool
) -> LevelLogits:
    """The same from a model's own logits (B, W, V)."""
    logits = logits.float()
    return LevelLogits(
        logits[..., item_tokens.level_slice(level)],
        logits.logsumexp(-1) if with_vocab_norm else None,
    )
