import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens._turboquant import rotation as passes
from rectokens._turboquant.codec import Rotation, block_rotation, hadamard_rotation
from rectokens._turboquant.reference import hadamard_matrix, rotation_matrix
from rectokens._turboquant.rotation import rotation_tables

CPU = torch.device("cpu")


def walsh_hadamard(x, block):
    return passes.walsh_hadamard(x.clone(), block, torch.empty_like(x))[0]


def rotate(x, *codec):
    return passes.rotate(x.clone(), *codec, torch.empty_like(x))[0]


def rotate_back(y, *codec):
    return passes.rotate_back(y.clone(), *codec, torch.empty_like(y))[0]


@pytest.fixture(params=["highest", "medium"])
def product_precision(request):
    """The two butterflies: small products, and additions where products might be rounded."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("block", [1, 2, 8, 64, 128, 512, 1024])
def test_butterfly_equals_the_matrix(block, product_precision):
    x = torch.randn(3, 2 * block, generator=torch.Generator().manual_seed(block))
    expected = (x.double().view(3, 2, block) @ hadamard_matrix(block)).view(3, -1) * block**0.5
    error = (walsh_hadamard(x, block).double() - expected).norm() / expected.norm()
    assert error < 1e-6


@pytest.mark.parametrize("block", [4096, 16384])
def test_large_butterflies_undo_themselves(block, product_precision):
    x = torch.randn(2, block, generator=torch.Generator().manual_seed(block))
    twice = walsh_hadamard(walsh_hadamard(x, block), block) / block
    torch.testing.assert_close(twice, x, rtol=1e-5, atol=1e-5)
    spike = torch.zeros(1, block)
    spike[0, 5] = 1.0
    index = torch.arange(block)
    expected = 1.0 - 2.0 * ((index & 1) ^ (index >> 2 & 1))
    assert torch.equal(walsh_hadamard(spike, block)[0], expected)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(1, 1), (2, 1), (64, 1), (256, 1), (128, 3), (128, 5), (32, 7), (16, 3)]),
    st.integers(0, 2**64 - 1),
)
def test_passes_equal_the_matrix(shape, seed):
    block, count = shape
    rotation = Rotation(block * count, block, seed)
    matrix = rotation_matrix(rotation)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(rotation.dim, dtype=torch.float64))
    x = torch.randn(4, rotation.dim, generator=torch.Generator().manual_seed(1))
    tables = rotation_tables(rotation, CPU)
    y = rotate(x, rotation, tables) / block
    torch.testing.assert_close(y.double(), x.double() @ matrix.T, rtol=1e-5, atol=1e-5)
    back = rotate_back(y, rotation, tables) / block
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [0, -4, 3, 12, 2560, True, 4.0])
def test_hadamard_needs_a_power_of_two(dim):
    with pytest.raises(ValueError, match="power of two"):
        hadamard_rotation(dim, 42)


@pytest.mark.parametrize("dim", [1024, 6, 2880, 11008, 0, True])
def test_blocks_need_a_large_power_of_two_part(dim):
    with pytest.raises(ValueError, match=str(dim)):
        block_rotation(dim, 42)


def test_permutation_gives_every_block_a_share_of_every_other():
    rotation = block_rotation(2560, 42)
    forward = rotation_tables(rotation, CPU).forward_gather
    source = (forward // 512).view(5, 512)
    counts = torch.stack([torch.bincount(row, minlength=5) for row in source])
    assert counts.min() == 102
    assert counts.max() == 103


def test_matrices_are_kept_in_the_type_that_is_meant():
    """Another thread may have changed torch's default while they were made: a model is loaded."""
    passes._hadamard_factor.cache_clear()
    x = torch.randn(3, 128)
    torch.set_default_dtype(torch.bfloat16)
    try:
        first = walsh_hadamard(x, 128)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, walsh_hadamard(x, 128))
    passes._hadamard_factor.cache_clear()
    assert torch.equal(first, walsh_hadamard(x, 128))
