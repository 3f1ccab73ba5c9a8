import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.ops.nearest_reference import nearest_direct
from rectokens.ops.nn_quantize import nearest_neighbor_quantize, residual_quantize


def test_nearest_neighbor():
    codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    codes = nearest_neighbor_quantize(torch.tensor([[0.1, 0.2], [2.0, 2.0]]), codebook)
    assert codes.dtype == torch.long
    assert codes.tolist() == [0, 1]


def test_one_device():
    with pytest.raises(AssertionError, match="meta"):
        nearest_neighbor_quantize(torch.zeros(1, 2), torch.zeros(3, 2, device="meta"))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 20),
    dim=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_residual_codes_level_by_level(rows, dim, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    codebooks = [torch.randn(size, dim, generator=generator) for size in sizes]
    codes = residual_quantize(x, codebooks)
    assert codes.shape == (rows, len(sizes))
    residual = x
    for level, codebook in enumerate(codebooks):
        expected = nearest_direct(residual, codebook)
        assert torch.equal(codes[:, level], expected)
        residual = residual - codebook[expected]


def test_residual_needs_a_codebook():
    with pytest.raises(ValueError, match="empty"):
        residual_quantize(torch.zeros(1, 2), [])
