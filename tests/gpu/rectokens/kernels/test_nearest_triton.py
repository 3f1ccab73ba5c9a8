"""The nearest-codeword kernel on a CUDA device agrees with float64."""

import pytest
import torch

from rectokens.kernels.nn_quantize import quantize_fwd, quantize_fwd_mm
from rectokens.ops.nearest_reference import nearest_exact
from rectokens.ops.nn_quantize import residual_quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def sample(rows, dim, codes, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows + dim + codes)
    x = torch.randn(rows, dim, generator=g).to(dtype)
    return x, torch.randn(codes, dim, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 63, 1000, 20_000])
@pytest.mark.parametrize(("dim", "codes"), [(64, 64), (256, 512), (100, 300), (1, 2), (1000, 17)])
def test_equal_to_the_definition(dtype, rows, dim, codes):
    x, book = sample(rows, dim, codes, dtype)
    wanted = nearest_exact(x, book)
    found, distances = quantize_fwd_mm(x.cuda(), book.cuda())
    assert torch.equal(found.cpu(), wanted)
    assert torch.equal(quantize_fwd(x.cuda(), book.cuda()).cpu(), wanted)
    right = (x.double() - book.double()[wanted]).square().sum(1).float()
    torch.testing.assert_close(distances.cpu(), right, rtol=1e-5, atol=1e-6)


def test_copies_and_lattices_go_to_the_lowest_index():
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-1, 2, (5000, 4), generator=g).float()
    book = torch.randint(-1, 2, (300, 4), generator=g).float()
    assert torch.equal(quantize_fwd(x.cuda(), book.cuda()).cpu(), nearest_exact(x, book))


@pytest.mark.parametrize("rows", [3, 20_000])
@pytest.mark.parametrize(("dim", "codes", "levels"), [(64, 256, 3), (256, 256, 4), (33, 7, 5)])
def test_residual_levels(rows, dim, codes, levels):
    x, _ = sample(rows, dim, codes)
    g = torch.Generator().manual_seed(9)
    books = [torch.randn(codes, dim, generator=g) * 0.7**level for level in range(levels)]
    wanted = residual_quantize(x, books)
    assert torch.equal(residual_quantize(x.cuda(), [book.cuda() for book in books]).cpu(), wanted)


def test_the_rounding_form_is_close():
    x, book = sample(4096, 64, 256)
    found = quantize_fwd(x.cuda(), book.cuda(), precision="tf32").cpu()
    assert (found == nearest_exact(x, book)).double().mean() > 0.8
