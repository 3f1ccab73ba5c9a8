"""Where rows are encoded and decoded: Triton kernels on CUDA, plain PyTorch everywhere else."""

import importlib.util
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from rectokens._turboquant.codec import Rotation
from rectokens._turboquant.rows import decode_rows, encode_rows, row_tables


class Backend(Protocol):
    """Both directions of one codec on one device; arguments are checked and not empty."""

    def encode(self, x: Tensor, packed: Tensor, norms: Tensor) -> None:
        """Rows `(n, dim)` of any float type into `packed` and float32 `norms`."""

    def decode(self, packed: Tensor, norms: Tensor, x_hat: Tensor) -> None:
        """`packed` and `norms` into float32 rows `(n, dim)`."""


class TorchBackend:
    """Plain PyTorch passes."""

    def __init__(
        self, dim: int, bits: int, rotation: Rotation | None, device: torch.device
    ) -> None:
        self._bits = bits
        self._rotation = rotation
        self._tables = row_tables(dim, bits, rotation, device)

    def encode(self, x: Tensor, packed: Tensor, norms: Tensor) -> None:
        """See `Backend`."""
        encode_rows(x, packed, norms, self._bits, self._rotation, self._tables)

    def decode(self, packed: Tensor, norms: Tensor, x_hat: Tensor) -> None:
        """See `Backend`."""
        decode_rows(packed, norms, x_hat, self._rotation, self._tables)


class TritonBackend:
    """One fused kernel each way."""

    def __init__(self, bits: int, rotation: Rotation, device: torch.device) -> None:
        from rectokens.kernels import turboquant_launch, turboquant_warp_launch

        self._launch = turboquant_launch
        self._warp_launch = turboquant_warp_launch
        self._bits = bits
        self._rotation = rotation
        self._tables = turboquant_launch.kernel_tables(rotation, bits, device)
        self._warp_tables = None
        if turboquant_warp_launch.supports(rotation, bits, device):
            self._warp_tables = turboquant_warp_launch.warp_tables(rotation, bits, device)

    def encode(self, x: Tensor, packed: Tensor, norms: Tensor) -> None:
        """See `Backend`."""
        if x.dtype == torch.float64:
            x = x.float()
        if x.stride(1) != 1:
            x = x.contiguous()
        words = packed.data_ptr() % 8 == 0
        if self._warp_tables is not None and words and self._warp_launch.takes(x):
            self._warp_launch.launch_encode(
                x, packed, norms, self._bits, self._rotation, self._warp_tables
            )
            return
        self._launch.launch_encode(x, packed, norms, self._bits, self._rotation, self._tables)

    def decode(self, packed: Tensor, norms: Tensor, x_hat: Tensor) -> None:
        """See `Backend`."""
        packed, norms = packed.contiguous(), norms.contiguous()
        # Codes are read up to a word at a time, numbers written 16 bytes at a time.
        aligned = packed.data_ptr() % 4 == 0 and x_hat.data_ptr() % 16 == 0
        if self._warp_tables is not None and aligned:
            self._warp_launch.launch_decode(
                packed, norms, x_hat, self._bits, self._rotation, self._warp_tables
            )
            return
        self._launch.launch_decode(packed, norms, x_hat, self._bits, self._rotation, self._tables)


@lru_cache(maxsize=1)
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def make_backend(dim: int, bits: int, rotation: Rotation | None, device: torch.device) -> Backend:
    """The fastest backend for this codec on `device`."""
    if device.type == "cuda" and rotation is not None and _triton_is_installed():
        from rectokens.kernels.turboquant_launch import supports

        if supports(rotation):
            return TritonBackend(bits, rotation, device)
    return TorchBackend(dim, bits, rotation, device)
