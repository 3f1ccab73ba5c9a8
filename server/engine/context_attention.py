"""Attention that stores a prompt once, however many beams read it.

Registered with transformers as an attention function, so any model that looks its attention up
in the registry is served without a fork of its code. The engine tells the function what to do
through a context variable:

* prefill: causal attention of prompts that lie end to end (``packed_attention.py``); the keys and
  values of every layer are kept as the requests' **context KV**;
* decode: the W beams of a request lie side by side in the sequence dimension. Each attends to
  the request's context and to its own few generated positions, never to its neighbours. Both
  sets of scores share one softmax, which is what merging two attentions by log-sum-exp gives.

Shapes: B requests, W beams, T padded prompt length, t generated positions before this one,
Hq query heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from server.engine.packed_attention import (
    CausalMasks,
    causal_attention,
    packed_attention,
    scale_of,
    soft_cap,
    softmax,
)
from server.engine.packing import PackedRows

ATTENTION_NAME = "rectokens_shared_context"

# Arguments of transformers' attention calls that change the result and that are implemented; a
# model that passes any other value but None is refused.
_UNDERSTOOD = frozenset({"scaling", "sliding_window", "softcap", "dropout"})
_SINKS = "s_aux"  # of each head; by this attention only
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "is_causal", "position_embeddings"}
)


@dataclass(slots=True)
class ContextKV:
    """Keys and values of the prompts, stored once a request.

    Attributes:
        lengths: int64 (B,), prompt lengths; positions from there on are padding.
        keys: by layer index, (B, Hkv, T, D).
        values: by layer index, (B, Hkv, T, D).
    """

    lengths: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class BeamKV:
    """Keys and values of the generated positions, in the slots that produced them.

    Beams are never copied when they are reordered: ``paths`` says in which slot of each earlier
    step a beam's ancestor stood.

    Attributes:
        paths: one int64 (B, W) per earlier step: ancestor slot of each current beam.
        keys: by layer index, one (B, Hkv, W_s, D) per earlier step s.
        values: likewise.
    """

    paths: list[Tensor] = field(default_factory=list)
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    values: dict[int, list[Tensor]] = field(default_factory=dict)

    def reorder(self, parents: Tensor) -> None:
        """Follow the surviving beams: ``parents`` int64 (B, W') names each one's old slot."""
        self.paths = [path.gather(1, parents) for path in self.paths]

    def append_step(self, width: int, batch_size: int, device: torch.device) -> None:
        """Register the step just run: every beam's own position is in its own slot."""
        own = torch.arange(width, device=device).expand(batch_size, width)
        self.paths.append(own)


# Keys and values (Hkv, start, D) of a layer and a row that are cached.
CachedPrefix = Callable[[int, int], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class _Prefill:
    context: ContextKV
    rows: PackedRows
    cached: CachedPrefix | None
    masks: CausalMasks
    windows_masked: set[int] = field(default_factory=set)
    windows_applied: set[int | None] = field(default_factory=set)


@dataclass(slots=True)
class _Decode:
    context: ContextKV
    beams: BeamKV


_mode: ContextVar[_Prefill | _Decode | None] = ContextVar("rectokens_attention_mode", default=None)


@contextmanager
def prefilling(
    context: ContextKV, rows: PackedRows, cached: CachedPrefix | None = None
) -> Iterator[None]:
    """The model call inside runs packed prompts; their keys and values go into ``context``.

    Args:
        context: empty but for its lengths.
        rows: where the prompts lie.
        cached: keys and values of the positions before ``rows.starts``; None where that is 0.

    Raises:
        UnsupportedAttentionError: the model has a sliding window in its mask that its layers do
            not tell of.
    """
    mode = _Prefill(context, rows, cached, CausalMasks())
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)
    unknown = mode.windows_masked - mode.windows_applied
    if unknown:
        raise UnsupportedAttentionError(
            f"a sliding window of {min(unknown)} is in the model's mask only; its layers do not "
            "pass it on"
        )


@contextmanager
def decoding(context: ContextKV, beams: BeamKV) -> Iterator[None]:
    """Model calls inside run one step of the beams over ``context``."""
    token = _mode.set(_Decode(context, beams))
    try:
        yield
    finally:
        _mode.reset(token)


class UnsupportedAttentionError(RuntimeError):
    """The model's attention takes an argument that is not implemented."""


def check_arguments(
    name: str, given: Mapping[str, Any], understood: Collection[str] = _UNDERSTOOD
) -> None:
    """Refuse an attention call that asks for what is not implemented.

    Args:
        name: of the module, for the message.
        given: keyword arguments of the call.
        understood: names of those that are implemented.

    Raises:
        UnsupportedAttentionError: names the argument.
    """
    for key, value in given.items():
        if value is not None and key not in understood and key not in _HARMLESS:
            raise UnsupportedAttentionError(
                f"attention argument {key!r} of {name} is not implemented"
            )


def shared_context_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers attention function. query (B, Hq, S, D), key and value (B, Hkv, S, D).

    Returns:
        (B, S, Hq, D) and None, as transformers expects.

    Raises:
        UnsupportedAttentionError: an attention variant the decode path does not implement.
    """
    mode = _mode.get()
    if mode is None:
        return causal_attention(module, query, key, value, attention_mask, **kwargs)
    understood = _UNDERSTOOD | {_SINKS}
    check_arguments(type(module).__name__, kwargs, understood)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(mode, _Prefill):
        mode.windows_applied.add(kwargs.get("sliding_window"))
        _keep(mode, layer, key, value)
        context = mode.context
        output = packed_attention(
            module,
            query,
            context.keys[layer],
            context.values[layer],
            mode.rows,
            mode.masks,
            **{name: given for name, given in kwargs.items() if name in understood},
        )
        return output, None
    return _decode_attention(mode, layer, query, key, value, **kwargs), None


def _keep(mode: _Prefill, layer: int, key: Tensor, value: Tensor) -> None:
    """Put a layer's packed keys and values, and those cached before them, into the context."""
    rows, context = mode.rows, mode.context
    context.keys[layer] = _unpacked(key, rows)
    context.values[layer] = _unpacked(value, rows)
    for row, start in enumerate(rows.starts):
        if start:
            if mode.cached is None:
                raise RuntimeError("some positions are not in the pack and not cached either")
            cached_keys, cached_values = mode.cached(layer, row)
            context.keys[layer][row, :, :start] = cached_keys
            context.values[layer][row, :, :start] = cached_values


def _unpacked(packed: Tensor, rows: PackedRows) -> Tensor:
    """(1, Hkv, S, D) to (B, Hkv, T, D), with room for the positions that are cached."""
    if len(rows.lengths) == 1 and rows.starts[0] == 0:
        return packed
    longest = max(rows.lengths)
    padded = packed.new_empty(len(rows.lengths), packed.shape[1], longest, packed.shape[3])
    for row, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
        padded[row, :, start:length] = packed[0, :, rows.offsets[row] : rows.offsets[row + 1]]
        # Decoding masks what is past the length, but a masked NaN times zero is NaN all the same.
        padded[row, :, length:] = 0
    return padded


def _decode_attention(
    mode: _Decode,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    context = mode.context
    batch_size, query_heads, width, dim = query.shape
    kv_heads = key.shape[1]
    group = query_heads // kv_heads
    query = query * scale_of(query, scaling)
    grouped = query.reshape(batch_size, kv_heads, group * width, dim)

    # All beams of a request against its one context: (B, Hkv, G * W, T).
    context_keys, context_values = context.keys[layer], context.values[layer]
    context_scores = grouped @ context_keys.transpose(-1, -2)
    steps_before = len(mode.beams.paths)
    positions = torch.arange(context_keys.shape[2], device=query.device)
    visible = positions < context.lengths[:, None]
    if sliding_window is not None:
        query_position = context.lengths[:, None] + steps_before
        visible &= positions > query_position - sliding_window
    # Each beam against its own positions, found along its path: (B, Hkv, W, t + 1, D).
    own_keys = _along_path(mode.beams, mode.beams.keys.setdefault(layer, []), key, sliding_window)
    own_values = _along_path(
        mode.beams, mode.beams.values.setdefault(layer, []), value, sliding_window
    )
    per_beam = grouped.reshape(batch_size, kv_heads, group, width, dim)
    own_scores = torch.einsum("bhgwd,bhwtd->bhgwt", per_beam, own_keys)

    context_scores = soft_cap(context_scores, softcap)
    own_scores = soft_cap(own_scores, softcap)
    context_scores = context_scores.masked_fill(~visible[:, None, None, :], -torch.inf)
    own_scores = own_scores.reshape(batch_size, kv_heads, group * width, -1)
    sinks = None
    if s_aux is not None:
        sinks = s_aux.view(kv_heads, group).repeat_interleave(width, 1)[None, :, :, None]
    weights = softmax(torch.cat([context_scores, own_scores], dim=-1), sinks).to(value.dtype)
    context_length = context_keys.shape[2]
    output = weights[..., :context_length] @ context_values
    own_weights = weights[..., context_length:].reshape(batch_size, kv_heads, group, width, -1)
    output = output.reshape(batch_size, kv_heads, group, width, dim)
    output = output + torch.einsum("bhgwt,bhwtd->bhgwd", own_weights, own_values)
    return output.reshape(batch_size, query_heads, width, dim).transpose(1, 2)


def _along_path(
    beams: BeamKV, earlier: list[Tensor], current: Tensor, sliding_window: int | None
) -> Tensor:
    """Own positions of each beam, oldest first, the current one last; stores the current one.

    Returns:
        (B, Hkv, W, t + 1, D).
    """
    steps = []
    for path, stored in zip(beams.paths, earlier, strict=True):
        index = path[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
        steps.append(stored.gather(2, index))
    earlier.append(current)
    steps.append(current)
    if sliding_window is not None:
        steps = steps[-sliding_window:]
    return torch.stack(steps, dim=3)


def _shared_context_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function: none within a session, which masks by itself; sdpa's own elsewhere."""
    mode = _mode.get()
    if mode is not None:
        window = kwargs.get("local_size")
        if isinstance(mode, _Prefill) and window:  # one of 0 is none
            mode.windows_masked.add(int(window))
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def register() -> None:
    """Make the attention known to transformers. Repeating it changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, shared_context_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _shared_context_mask)
