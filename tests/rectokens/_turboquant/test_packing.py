import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rectokens._turboquant.packing import pack, unpack


@pytest.mark.parametrize(
    ("bits", "indices", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0], [0b00000001]),
        (1, [0, 0, 0, 0, 0, 0, 0, 1], [0b10000000]),
        (1, [1, 1, 0, 1, 0, 0, 0, 0, 1], [0b00001011, 0b00000001]),
        (2, [1, 2, 3, 0], [0b00_11_10_01]),
        (2, [0, 0, 0, 3, 2], [0b11_00_00_00, 0b10]),
        (4, [0xA, 0x5], [0x5A]),
        (4, [0x1, 0x2, 0xF], [0x21, 0x0F]),
        (8, [0, 127, 255], [0, 127, 255]),
    ],
)
def test_bytes_one_by_one(bits, indices, expected):
    row = torch.tensor([indices], dtype=torch.uint8)
    packed = pack(row, bits)
    assert packed.tolist() == [expected]
    assert torch.equal(unpack(packed, bits, len(indices)), row)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 5), st.integers(1, 67), st.integers(0, 2**31))
def test_round_trip_and_place_of_every_element(bits, rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(1 << bits, (rows, dim), generator=generator).to(torch.uint8)
    packed = pack(indices, bits)
    assert packed.shape == (rows, -(-dim * bits // 8))
    assert torch.equal(unpack(packed, bits, dim), indices)
    for i in range(dim):
        at = packed[:, i * bits // 8].long() >> (i * bits % 8) & ((1 << bits) - 1)
        assert torch.equal(at, indices[:, i].long())
