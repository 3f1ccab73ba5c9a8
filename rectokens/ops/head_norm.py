"""Log-sum-exp of a linear layer's outputs without the outputs: what full normalization costs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rectokens.ops.dispatch import triton_is_installed

_MAX_LOGITS = 1 << 24  # 64 MB in float32: bound on what the plain form holds at once


def linear_logsumexp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kinds: Tensor,
    wanted: int,
    *,
    factor: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``logsumexp`` over N of ``softcap * tanh((x @ weight.T + bias) * factor / softcap)``.

    Args:
        x: (R, H), the rows of B requests, equally many each.
        weight: (N, H), of the same dtype.
        bias: (N,) or None.
        kinds: int32 (B,).
        wanted: only requests of this kind are computed, so that a captured graph pays for the
            work that a batch needs.
        factor: of the outputs.
        softcap: bound of the outputs; None for none.

    Returns:
        float32 (R,); any finite or infinite value in the rows of other requests.
    """
    if x.is_cuda and triton_is_installed():
        from rectokens.kernels import head_norm_launch as kernels

        if x.dtype in kernels.KERNEL_DTYPES and x.dtype == weight.dtype:
            return kernels.launch_linear_logsumexp(
                x, weight, bias, kinds, wanted, factor=factor, softcap=softcap
            )
    if x.device.type == "cpu" and not bool((kinds == wanted).any()):
        return x.new_zeros(x.shape[0], dtype=torch.float32)
    rows = max(_MAX_LOGITS // weight.shape[0], 1)
    parts = [
        head_logits(part, weight, bias, factor=factor, softcap=softcap).logsumexp(-1)
        for part in x.split(rows)
    ]
    return torch.cat(parts)


def head_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, factor: float, softcap: float | None
) -> Tensor:
    """Outputs of the head in float32, not rounded to 16 bits on the way where that is possible.

    Args:
        x: (R, H).
        weight: (N, H).
        bias: (N,) or None.
        factor: of the outputs.
        softcap: bound of the outputs; None for none.

    Returns:
        float32 (R, N).
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        if bias is not None:
            logits += bias.float()
    else:
        logits = F.linear(x, weight, bias).float()
    if factor != 1.0:
        logits *= factor
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
