"""Nearest-codeword search by a FAISS index on the GPU, for comparison. Needs FAISS with CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_gpu_index(codebook: Tensor) -> Any:
    """A flat (exhaustive) L2 index on the codebook's GPU, holding its rows in order.

    Args:
        codebook: float32 (N, D) on a CUDA device.

    Returns:
        A ``faiss.GpuIndexFlatL2`` that searches torch tensors.

    Raises:
        ValueError: another dtype, device or number of dimensions.
        ImportError: FAISS is missing, or built without CUDA.
    """
    _check(codebook, "codebook")
    faiss = _faiss_with_gpu()
    config = faiss.GpuIndexFlatConfig()
    config.device = codebook.device.index or 0
    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), codebook.shape[1], config)
    index.add(codebook.detach().contiguous())
    return index


def faiss_quantize(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook row, by an index built for this call.

    Args:
        x: float32 (B, D) on a CUDA device.
        codebook: float32 (N, D) on the same device.

    Returns:
        long (B,).

    Raises:
        ValueError, ImportError: as :func:`make_gpu_index`; or widths that differ.
    """
    _check(x, "x")
    _check(codebook, "codebook")
    if x.shape[1] != codebook.shape[1]:
        raise ValueError(f"x has D = {x.shape[1]}; codebook has D = {codebook.shape[1]}")
    _, neighbours = make_gpu_index(codebook).search(x.detach().contiguous(), 1)
    nearest: Tensor = neighbours.squeeze(1)
    return nearest


def _check(tensor: Tensor, name: str) -> None:
    if tensor.ndim != 2 or tensor.dtype != torch.float32 or tensor.device.type != "cuda":
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
            f"expected torch.float32 with 2 dimensions on a CUDA device"
        )


def _faiss_with_gpu() -> Any:
    try:
        import faiss
        import faiss.contrib.torch_utils  # teaches the indexes to take torch tensors
    except ImportError as error:
        raise ImportError("faiss_quantize needs the package faiss, built with CUDA") from error
    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("the installed faiss has no GPU support; install a CUDA build of it")
    return faiss
