"""A fused decoder with its large products in FP8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rectokens.ops.fp8 import check_fp8_weight, fp8_rows
from server.engine.device.fused_decoder import (
    FeedForward,
    Fp8FeedForward,
    Fp8Projection,
    FusedDecoder,
    Projection,
)

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def in_fp8(decoder: FusedDecoder) -> FusedDecoder:
    """The decoder with queries, keys, values, gate, up and down projections in FP8.

    Their inputs come out of a norm or a gate, which round them in passing. The projection after
    attention, a tenth of the weights, the embeddings and the head stay as they are.

    Raises:
        ValueError: a projection whose sides are no multiples of 16.
    """
    layers = (
        replace(
            layer,
            qkv=_in_fp8(layer.qkv),
            feed=_feed_in_fp8(layer.feed),
        )
        for layer in decoder.layers
    )
    return replace(decoder, layers=tuple(layers))


def let_go_of_rounded(model: Any) -> None:
    """Free a model's own weights of the projections that :func:`in_fp8` rounds.

    Only for a model that nothing but an engine in FP8 uses: its layers do not run afterwards.
    """
    for layer in model.get_decoder().layers:
        for part, names in ((layer.self_attn, _ATTENTION), (layer.mlp, _FEED_FORWARD)):
            for name in names:
                weight = getattr(part, name).weight
                weight.data = weight.data.new_empty(0)


def _feed_in_fp8(feed: FeedForward | Fp8FeedForward) -> Fp8FeedForward:
    if isinstance(feed, Fp8FeedForward):
        return feed
    return Fp8FeedForward(_in_fp8(feed.gate_up), _in_fp8(feed.down), feed.activation)


def _in_fp8(projection: Projection | Fp8Projection) -> Fp8Projection:
    if isinstance(projection, Fp8Projection):
        return projection
    check_fp8_weight(projection.weight)
    return Fp8Projection(fp8_rows(projection.weight), projection.bias)
