"""Linear layers in FP8 (E4M3): weights scaled by output channel, activations by row.

The plain PyTorch here defines what is stored; products go through ``torch._scaled_mm``, which
multiplies on FP8 tensor cores, accumulates in float32 and applies both scales at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens.ops.decoder_pieces import Norm, add_norm_, gate
from rectokens.ops.dispatch import triton_is_installed

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_MULTIPLE = 16  # of both sides of a weight
_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows in FP8: ``values * scale`` is what they stand for.

    Attributes:
        values: float8_e4m3fn (R, N), contiguous.
        scale: float32 (R, 1).
    """

    values: Tensor
    scale: Tensor


def fp8_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model of this type cannot be computed in FP8 on a device; None where it can."""
    needed = "FP8 products need a GPU of compute capability 8.9 or higher"
    if device.type != "cuda":
        return f"{needed}; this is a {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        return f"{needed}; {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
    if dtype != torch.bfloat16:
        return f"FP8 products give bfloat16; the model is {str(dtype).removeprefix('torch.')}"
    return None


def fp8_rows(x: Tensor) -> Fp8Rows:
    """Round rows (R, N) to FP8, the largest magnitude of each to FP8's largest.

    A row with a NaN or an infinity has NaNs afterwards.
    """
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    return Fp8Rows((wide / scale).to(FP8), scale)


def check_fp8_weight(weight: Tensor) -> None:
    """Raise ValueError for a weight (N, K) whose sides are no multiples of 16."""
    if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
        raise ValueError(
            f"a weight is {tuple(weight.shape)}; in FP8 both sides must be multiples of {_MULTIPLE}"
        )


def fp8_linear(x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None) -> Tensor:
    """Rows (R, K) times weights (N, K), transposed: bfloat16 (R, N).

    Args:
        x: activations.
        weight: one row an output channel.
        bias: bfloat16 (N,) or None.
    """
    out: Tensor = torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scale,
        scale_b=weight.scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=x.values.is_cuda,
    )
    return out


def add_norm_fp8_(x: Tensor, residual: Tensor | None, norm: Norm) -> Fp8Rows:
    """As :func:`rectokens.ops.decoder_pieces.add_norm_`, its result rounded to FP8."""
    if x.is_cuda and triton_is_installed():
        from rectokens.kernels import decoder_launch as kernels

        if x.dtype in kernels.KERNEL_DTYPES and x.shape[1] <= kernels.MAX_NORM_SIZE:
            weight, eps = norm.weight, norm.eps
            return Fp8Rows(
                *kernels.launch_add_norm_fp8(x, residual, weight, eps, offset=norm.offset)
            )
    return fp8_rows(add_norm_(x, residual, norm))


def gate_fp8(x: Tensor, activation: str) -> Fp8Rows:
    """As :func:`rectokens.ops.decoder_pieces.gate`, its result rounded to FP8."""
    if x.is_cuda and triton_is_installed():
        from rectokens.kernels import decoder_launch as kernels

        if x.dtype in kernels.KERNEL_DTYPES and x.shape[1] // 2 <= kernels.MAX_FP8_GATE:
            return Fp8Rows(*kernels.launch_gate_fp8(x, activation))
    return fp8_rows(gate(x, activation))
