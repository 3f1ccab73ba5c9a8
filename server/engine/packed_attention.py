"""Causal attention of packed prompts, row by row, the cached beginning of each row included.

Rows lie end to end in the sequence dimension, as :class:`server.engine.packing.PackedRows` says.
Position t of a row attends to positions 0 to t of that row only; those that are cached come from
the row's context, the others from the pack. Shapes: S packed positions, S_b of row b, T_b
positions of row b in all, Hq query heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from server.engine.packing import PackedRows

_MAX_KEPT_MASK = 1 << 20  # masks up to so many entries are kept for the next layer
_MAX_SCORES = 1 << 26  # 256 MB in float32: most that exist at once where they are computed here


class CausalMasks:
    """Which positions the packed ones of a row see. Kept from layer to layer where small."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(
        self, start: int, length: int, window: int | None, device: torch.device
    ) -> Tensor | None:
        """Boolean (1, 1, length - start, length); None where plain causal attention says it all.

        Args:
            start: first position that asks.
            length: T of the row.
            window: positions seen, the asking one included; None for all.
            device: of the mask.
        """
        if window is not None and window >= length:
            window = None
        if window is None and (start == 0 or start == length - 1):
            return None
        key = (start, length, window)
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        asking = torch.arange(start, length, device=device)[:, None]
        seen = torch.arange(length, device=device)
        mask = seen <= asking
        if window is not None:
            mask &= seen > asking - window
        mask = mask[None, None]
        if mask.numel() <= _MAX_KEPT_MASK:
            self._kept[key] = mask
        return mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PackedRows,
    masks: CausalMasks,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of every row over its own positions.

    Args:
        module: the layer's attention module.
        query: (1, Hq, S, D), packed.
        keys: (B, Hkv, T, D), all positions of each row, those it does not have at the end.
        values: likewise.
        rows: where they lie.
        masks: of this batch.
        sliding_window: of the layer.
        kwargs: further arguments of transformers' attention functions.

    Returns:
        (1, S, Hq, D).
    """
    outputs = []
    for row, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
        asking = query[:, :, rows.offsets[row] : rows.offsets[row + 1]]
        mask = masks.mask(start, length, sliding_window, query.device)
        row_keys, row_values = keys[row : row + 1, :, :length], values[row : row + 1, :, :length]
        outputs.append(causal_attention(module, asking, row_keys, row_values, mask, **kwargs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention, and what it leaves out: soft-capped scores and sinks.

    Args:
        module: the layer's attention module.
        query: (B, Hq, S, D).
        key: (B, Hkv, T, D).
        value: likewise.
        attention_mask: boolean (B, 1, S, T); None for causal attention of S = T positions, or of
            one position over all.
        kwargs: further arguments of transformers' attention functions.

    Returns:
        (B, S, Hq, D) and None, as transformers expects.
    """
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if softcap is None and sinks is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    length, total = query.shape[2], key.shape[2]
    if attention_mask is None:
        ones = torch.ones(length, total, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(total - length)[None, None]
    query = query * scale_of(query, kwargs.get("scaling"))
    column = None if sinks is None else sinks.view(1, -1, 1, 1)
    rows = max(_MAX_SCORES // (query.shape[0] * query.shape[1] * total), 1)
    parts = []
    for first in range(0, length, rows):
        scores = soft_cap(query[:, :, first : first + rows] @ key.transpose(-1, -2), softcap)
        scores = scores.masked_fill(~attention_mask[:, :, first : first + rows], -torch.inf)
        parts.append(softmax(scores, column).to(value.dtype) @ value)
    return torch.cat(parts, dim=2).transpose(1, 2), None


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Float32 weights (..., T) of scores (..., T).

    Args:
        scores: masked ones are -inf.
        sinks: of each head, or None: a score (..., 1) that takes its share of the weight and gives
            nothing.
    """
    scores = scores.float()
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


def scale_of(query: Tensor, scaling: float | None) -> float:
    """Factor of the scores, D^-0.5 unless the model says otherwise."""
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling


def soft_cap(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores squeezed into (-softcap, softcap)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
