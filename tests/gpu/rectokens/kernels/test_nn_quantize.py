import pytest
import torch

from rectokens.kernels.nn_quantize import quantize_fwd, quantize_fwd_mm
from rectokens.ops.nearest_reference import nearest_direct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("shape", [(1024, 256, 512), (4096, 64, 256), (33, 7, 5), (0, 8, 3)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_exact_on_cuda(shape, offset):
    rows, dim, codes = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=generator) + offset
    codebook = torch.randn(codes, dim, generator=generator) + offset
    expected = torch.cat([nearest_direct(part, codebook) for part in x.split(64)])
    assert torch.equal(quantize_fwd(x.cuda(), codebook.cuda()).cpu(), expected)
    found, _ = quantize_fwd_mm(x.cuda(), codebook.cuda())
    assert torch.equal(found.cpu(), expected)
