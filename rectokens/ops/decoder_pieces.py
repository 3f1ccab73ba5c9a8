"""The elementwise work of a decoder layer: definitions in plain PyTorch, kernels on CUDA.

Shapes: R rows (positions), H hidden, Hq query heads, Hkv key heads, D head dimension, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rectokens.ops.dispatch import triton_is_installed

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm.

    Attributes:
        weight: (size,).
        eps: added to the mean square.
        offset: the factor is ``1 + weight``, applied before rounding, as in Gemma; else
            ``weight``, applied after rounding, as in Llama.
    """

    weight: Tensor
    eps: float
    offset: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Norm over the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            wide = wide * (1.0 + self.weight.float())
            return wide.to(x.dtype)
        return self.weight * wide.to(x.dtype)


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Rotary positions: the first half of a head turns against the second.

    Attributes:
        cos: (positions, D / 2).
        sin: likewise.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate (R, heads, D) to ``positions`` (R,)."""
        cos = self.cos[positions.long()][:, None].float()
        sin = self.sin[positions.long()][:, None].float()
        low, high = x.float().chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


def add_norm_(x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
    """``residual += x`` in place, and its norm; without a residual the norm of ``x``.

    Args:
        x: (R, H).
        residual: (R, H), changed, or None.
        norm: over H.

    Returns:
        (R, H).
    """
    if x.is_cuda and triton_is_installed():
        from rectokens.kernels import decoder_launch as kernels

        if x.dtype in kernels.KERNEL_DTYPES and x.shape[1] <= kernels.MAX_NORM_SIZE:
            return kernels.launch_add_norm(x, residual, norm.weight, norm.eps, offset=norm.offset)
    if residual is None:
        return norm(x)
    residual += x
    return norm(residual)


def rotate_store_(
    rows: Tensor,
    positions: Tensor,
    rotary: RotaryTable,
    norms: tuple[Norm, Norm] | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query_heads: int,
) -> Tensor:
    """Norm and rotate queries and keys of fused projections; store keys and values.

    Args:
        rows: (R, (Hq + 2 Hkv) D), queries, keys and values side by side; the queries are changed.
        positions: integer (R,).
        rotary: over D.
        norms: of queries and of keys, over D, alike but for the weights; or None.
        keys: (P, Hkv, page size, D), contiguous pages.
        values: likewise.
        slots: int32 (R,), ``page * page size + place`` of each row; -1 for nowhere.
        query_heads: Hq.

    Returns:
        The queries, (R, Hq, D), a view of ``rows``.
    """
    kv_heads, dim = keys.shape[1], keys.shape[3]
    queries: Tensor = rows[:, : query_heads * dim].unflatten(1, (query_heads, dim))
    if rows.is_cuda and triton_is_installed():
        from rectokens.kernels import decoder_launch as kernels

        if rows.dtype in kernels.KERNEL_DTYPES:
            kernels.launch_rotate_store(
                rows,
                rotary.cos,
                rotary.sin,
                positions,
                None if norms is None else (norms[0].weight, norms[1].weight),
                0.0 if norms is None else norms[0].eps,
                keys,
                values,
                slots,
                query_heads,
                offset=norms is not None and norms[0].offset,
            )
            return queries
    new_keys, new_values = (
        part.unflatten(1, (kv_heads, dim))
        for part in rows[:, query_heads * dim :].split(kv_heads * dim, 1)
    )
    turned = queries if norms is None else norms[0](queries)
    queries.copy_(rotary(turned, positions))
    new_keys = rotary(new_keys if norms is None else norms[1](new_keys), positions)
    store_(new_keys, new_values, keys, values, slots)
    return queries


def store_(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    """Store keys and values in pages.

    Args:
        new_keys: (R, Hkv, D), D contiguous.
        new_values: likewise.
        keys: (P, Hkv, page size, D), contiguous pages.
        values: likewise.
        slots: int32 (R,), ``page * page size + place`` of each row; -1 for nowhere.
    """
    if new_keys.is_cuda and triton_is_installed():
        from rectokens.kernels import decoder_launch as kernels

        if new_keys.dtype in kernels.KERNEL_DTYPES:
            kernels.launch_store(new_keys, new_values, keys, values, slots)
            return
    page_size = keys.shape[2]
    kept = (slots >= 0).nonzero().squeeze(1)
    page, place = slots[kept].long() // page_size, slots[kept].long() % page_size
    keys[page, :, place] = new_keys[kept]
    values[page, :, place] = new_values[kept]


def gate(x: Tensor, activation: str) -> Tensor:
    """``activation(gates) * ups`` of (R, 2 I): (R, I).

    Args:
        x: gates and ups in turns: column 2 i is the gate of output i, column 2 i + 1 its up.
        activation: one of ``ACTIVATIONS``.
    """
    if x.is_cuda and triton_is_installed():
        from rectokens.kernels import decoder_launch as kernels

        if x.dtype in kernels.KERNEL_DTYPES:
            return kernels.launch_gate(x, activation)
    gates, ups = x[:, 0::2], x[:, 1::2]
    if activation == "silu":
        return F.silu(gates) * ups
    return F.gelu(gates, approximate="tanh" if activation == "gelu_tanh" else "none") * ups


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """:func:`gate` of a linear layer's outputs: (R, I).

    Args:
        x: (R, H).
        weight: (2 I, H), rows of gates and ups in turns.
        bias: (2 I,) likewise, or None.
        activation: one of ``ACTIVATIONS``.
    """
    if x.is_cuda and bias is None and triton_is_installed():
        from rectokens.kernels import gated_linear_launch as kernels

        if kernels.takes(x, weight) and kernels.pays_on(x.shape[0], weight.shape[0], x.device):
            return kernels.launch_gated_linear(x, weight, activation)
    return gate(F.linear(x, weight, bias), activation)
