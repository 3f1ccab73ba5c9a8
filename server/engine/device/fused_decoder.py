"""A decoder of the common shape, run with its elementwise work fused.

Layers of attention and a gated feed-forward block, each between root mean square norms; what Llama,
Mistral, Qwen and Gemma have in common. Nothing here knows a model's name: weights and numbers come
from :mod:`server.engine.device.recognition`, which reads them off a loaded model, and the result
is compared with that model before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from rectokens.ops.context_attention import ScoreRule
from rectokens.ops.decoder_pieces import (
    Norm,
    RotaryTable,
    add_norm_,
    gated_linear,
    rotate_store_,
)
from rectokens.ops.fp8 import Fp8Rows, add_norm_fp8_, fp8_linear, gate_fp8
from server.engine.device.passes import ForwardPass, PromptPass


def summed(x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """How ``add_norm_`` is told of ``residual + x``, or of a residual that nothing is added to."""
    return (residual, None) if x is None else (x, residual)


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer: (N, H) and (N,) or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """(R, H) to (R, N)."""
        return F.linear(x, self.weight, self.bias)

    def after_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
        """The projection of ``add_norm_(x, residual, norm)``."""
        return self(add_norm_(x, residual, norm))

    def onto(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """Add the projection of x (R, H) to the residual (R, N); None where all is in it.

        Returns:
            What the next norm has to add instead, where the product cannot.
        """
        if self.bias is not None:
            return self(x)
        residual.addmm_(x, self.weight.t())
        return None


@dataclass(frozen=True, slots=True)
class Fp8Projection:
    """A linear layer in FP8, of inputs that are rounded to it where they are made.

    Attributes:
        weight: (N, H), a scale an output channel.
        bias: (N,) or None.
    """

    weight: Fp8Rows
    bias: Tensor | None

    def after_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
        """See :class:`Projection`."""
        return fp8_linear(add_norm_fp8_(x, residual, norm), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The gated feed-forward block.

    Attributes:
        gate_up: (2 I, H), rows of the gate and the up projection in turns.
        down: (H, I).
        activation: of the gate.
    """

    gate_up: Projection
    down: Projection
    activation: str

    def gated(self, normed: Tensor) -> Tensor:
        """What ``down`` takes, (R, I)."""
        gate_up = self.gate_up
        return gated_linear(normed, gate_up.weight, gate_up.bias, self.activation)

    def after_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
        """The block's output (R, H) for ``add_norm_(x, residual, norm)``."""
        return self.down(self.gated(add_norm_(x, residual, norm)))

    def onto(self, residual: Tensor, x: Tensor | None, norm: Norm) -> Tensor | None:
        """Add the block's output to the residual, to which ``x`` is added first.

        Returns:
            See :meth:`Projection.onto`.
        """
        return self.down.onto(residual, self.gated(add_norm_(*summed(x, residual), norm)))


@dataclass(frozen=True, slots=True)
class Fp8FeedForward:
    """The gated feed-forward block in FP8; attributes as of :class:`FeedForward`."""

    gate_up: Fp8Projection
    down: Fp8Projection
    activation: str

    def after_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
        """See :class:`FeedForward`."""
        wide = self.gate_up.after_norm(x, residual, norm)
        return fp8_linear(gate_fp8(wide, self.activation), self.down.weight, self.down.bias)

    def onto(self, residual: Tensor, x: Tensor | None, norm: Norm) -> Tensor | None:
        """See :class:`FeedForward`; a product in FP8 cannot add to what is there."""
        return self.after_norm(*summed(x, residual), norm)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer.

    Attributes:
        index: by which keys and values are stored.
        query_heads: Hq.
        attention_in: norm before attention.
        qkv: queries, keys and values of all heads, side by side.
        head_norms: norms of queries and keys over D, or None.
        rotary: positions.
        rule: of attention scores.
        attention_out: projection after attention.
        attention_out_norm: norm of what it gives, or None.
        feed_in: norm before the feed-forward block.
        feed: the feed-forward block.
        feed_out_norm: norm of what it gives, or None.
    """

    index: int
    query_heads: int
    attention_in: Norm
    qkv: Projection | Fp8Projection
    head_norms: tuple[Norm, Norm] | None
    rotary: RotaryTable
    rule: ScoreRule
    attention_out: Projection
    attention_out_norm: Norm | None
    feed_in: Norm
    feed: FeedForward | Fp8FeedForward
    feed_out_norm: Norm | None


@dataclass(frozen=True, slots=True)
class FusedDecoder:
    """The decoder: embeddings in, normed hidden states out.

    Attributes:
        layers: in order.
        final_norm: after the last.
        embed_factor: that the model multiplies its embeddings by.
    """

    layers: tuple[LayerPlan, ...]
    final_norm: Norm
    embed_factor: float = 1.0

    def __call__(self, x: Tensor, rows: ForwardPass) -> Tensor:
        """Run a pass.

        Args:
            x: (R, H), embeddings; overwritten.
            rows: what they are.

        Returns:
            Hidden states (R, H); of a prompt pass those of its ``last_rows`` alone, (n, H).
        """
        if self.embed_factor != 1.0:
            x *= self.embed_factor
        residual = x
        # What the next norm has yet to add to it.
        added: Tensor | None = None
        for number, layer in enumerate(self.layers):
            is_last = number + 1 == len(self.layers)
            keys, values, slots = rows.target(layer.index)
            projected = layer.qkv.after_norm(*summed(added, residual), layer.attention_in)
            query = rotate_store_(
                projected,
                rows.positions,
                layer.rotary,
                layer.head_norms,
                keys,
                values,
                slots,
                layer.query_heads,
            )
            if is_last and isinstance(rows, PromptPass):
                # Nothing reads the last layer's output but at the ends of prompts.
                mixed = rows.attend_last(layer.index, query, layer.rule)
                residual = residual.index_select(0, rows.last_rows)
            else:
                mixed = rows.attend(layer.index, query, layer.rule)
            if layer.attention_out_norm is None:
                added = layer.attention_out.onto(residual, mixed.flatten(1))
            else:
                added = add_norm_(
                    layer.attention_out(mixed.flatten(1)), None, layer.attention_out_norm
                )
            if layer.feed_out_norm is None:
                added = layer.feed.onto(residual, added, layer.feed_in)
            else:
                fed = layer.feed.after_norm(*summed(added, residual), layer.feed_in)
                added = add_norm_(fed, None, layer.feed_out_norm)
        return add_norm_(*summed(added, residual), self.final_norm)
