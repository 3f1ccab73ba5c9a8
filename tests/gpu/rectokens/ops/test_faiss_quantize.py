import pytest
import torch

from rectokens.ops.faiss_quantize import faiss_quantize
from rectokens.ops.nn_quantize import nearest_neighbor_quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_same_codes_as_the_exact_search():
    pytest.importorskip("faiss", reason="needs FAISS with CUDA")
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(1000, 64, device="cuda", generator=generator)
    codebook = torch.randn(100, 64, device="cuda", generator=generator)
    agree = faiss_quantize(x, codebook) == nearest_neighbor_quantize(x, codebook)
    assert agree.float().mean() > 0.99
