import sys
import types

import pytest
import torch

from rectokens.ops.faiss_quantize import faiss_quantize, make_gpu_index


@pytest.mark.parametrize(
    "codebook", [torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 2, dtype=torch.float64)]
)
def test_only_float32_on_cuda(codebook):
    with pytest.raises(ValueError, match="CUDA"):
        make_gpu_index(codebook)
    with pytest.raises(ValueError, match="x is"):
        faiss_quantize(codebook, codebook)


def test_a_build_without_gpu_is_named(monkeypatch):
    from rectokens.ops import faiss_quantize as module

    faiss = types.ModuleType("faiss")
    faiss.contrib = types.ModuleType("faiss.contrib")
    faiss.contrib.torch_utils = types.ModuleType("faiss.contrib.torch_utils")
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    monkeypatch.setitem(sys.modules, "faiss.contrib", faiss.contrib)
    monkeypatch.setitem(sys.modules, "faiss.contrib.torch_utils", faiss.contrib.torch_utils)
    with pytest.raises(ImportError, match="no GPU support"):
        module._faiss_with_gpu()
