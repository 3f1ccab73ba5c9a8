"""A fused decoder with its large products in FP8."""

from __future__ import annotations

from dataclasses import replace

from rectokens.ops.fp8 import check_fp8_weight, fp8_rows
from server.engine.device.fused_decoder import Fp8Projection, FusedDecoder, Projection


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
            gate_up=_in_fp8(layer.gate_up),
            down=_in_fp8(layer.down),
        )
        for layer in decoder.layers
    )
    return replace(decoder, layers=tuple(layers))


def _in_fp8(projection: Projection | Fp8Projection) -> Fp8Projection:
    if isinstance(projection, Fp8Projection):
        return projection
    check_fp8_weight(projection.weight)
    return Fp8Projection(fp8_rows(projection.weight), projection.bias)
