import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rectokens._turboquant.assign import assign, float32_boundaries, float32_centroids


def by_distance(y: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Boundaries counted one by one on the magnitude, then mirrored."""
    half = 1 << (bits - 1)
    out = torch.empty(y.shape, dtype=torch.uint8)
    for position, value in enumerate(y.flatten().tolist()):
        count = sum(abs(value) > boundary for boundary in float32_boundaries(dim, bits).tolist())
        out.view(-1)[position] = half + count if value > 0 else half - 1 - count
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 4, 64, 1024, 4096]),
    st.sampled_from([1, 2, 4, 8]),
    hnp.arrays(np.float32, (2, 9), elements=st.floats(-8, 8, width=32)),
)
def test_equals_counting(dim, bits, values):
    y = torch.from_numpy(values)
    assert torch.equal(assign(y, dim, bits), by_distance(y, dim, bits))


@pytest.mark.parametrize("dim", [2, 16, 4096])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_boundaries_and_their_neighbours_are_decided_exactly(dim, bits):
    edges = float32_boundaries(dim, bits)
    around = np.concatenate((edges, np.nextafter(edges, 0), np.nextafter(edges, 100)))
    y = torch.from_numpy(np.concatenate((around, -around)).astype(np.float32))[None]
    assert torch.equal(assign(y, dim, bits), by_distance(y, dim, bits))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zero_goes_down_and_extremes_go_to_the_ends(bits):
    top = (1 << bits) - 1
    y = torch.tensor([[0.0, -0.0, 1e30, -1e30, 3.4e38]])
    lower_middle = (1 << (bits - 1)) - 1
    assert assign(y, 1024, bits).tolist() == [[lower_middle, lower_middle, top, 0, top]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_centroids_are_their_own_nearest(bits):
    y = torch.from_numpy(float32_centroids(4096, bits))[None]
    assert assign(y, 4096, bits).tolist() == [list(range(1 << bits))]
