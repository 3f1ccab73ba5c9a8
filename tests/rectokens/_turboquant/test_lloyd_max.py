"""The codebooks against what defines them, by another road: plain sums on a fine grid."""

import math

import numpy as np
import pytest

from rectokens._turboquant.lloyd_max import codebook

DIMS = [2, 3, 4, 5, 8, 16, 33, 64, 128, 1024, 2560, 4096, 16384, 65536]


def source(dim, points=400_001):
    """Midpoints and probabilities of the coordinate times sqrt(dim), by angle."""
    top = math.asin(min(1.0, 12 / math.sqrt(dim)))
    theta = np.linspace(-top, top, points)
    theta = 0.5 * (theta[1:] + theta[:-1])
    weight = np.exp((dim - 2) * np.log(np.cos(theta)))
    return np.sin(theta) * math.sqrt(dim), weight / weight.sum()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_centroid_is_the_mean_of_its_cell(dim, bits):
    centroids, positive = (np.array(part) for part in codebook(dim, bits))
    edges = np.concatenate((-positive[::-1], [0.0], positive))
    np.testing.assert_allclose(edges, 0.5 * (centroids[1:] + centroids[:-1]), atol=1e-12)
    u, p = source(dim)
    cell = np.searchsorted(edges, u)
    mass = np.bincount(cell, p, minlength=centroids.size)
    means = np.bincount(cell, p * u, minlength=centroids.size) / np.maximum(mass, 1e-300)
    # The grid cuts a cell's edge by up to one step: compare where the cell spans many steps.
    wide = np.bincount(cell, minlength=centroids.size) > 150
    assert wide.sum() >= min(centroids.size, 100) // 2
    np.testing.assert_allclose(centroids[wide], means[wide], atol=2e-4)


@pytest.mark.parametrize(
    ("bits", "dim", "mse"),
    [
        (1, 128, 0.3608), (2, 128, 0.1160), (4, 128, 0.00933), (8, 128, 4.03e-5),
        (1, 1024, 0.3632), (2, 1024, 0.1173), (4, 1024, 0.00949), (8, 1024, 4.13e-5),
        (1, 4096, 0.3633), (2, 4096, 0.1174), (4, 4096, 0.00950), (8, 4096, 4.11e-5),
    ],
)  # fmt: skip
def test_error_of_the_codebook_is_the_optimum(bits, dim, mse):
    centroids, _ = codebook(dim, bits)
    u, p = source(dim)
    c = np.array(centroids)
    nearest = c[np.searchsorted(0.5 * (c[1:] + c[:-1]), u)]
    assert (p * (u - nearest) ** 2).sum() == pytest.approx(mse, rel=0.01)


def test_known_gaussian_codebook_is_the_limit():
    # Max (1960), table I: four levels for a unit Gaussian.
    centroids, boundaries = codebook(1 << 16, 2)
    assert centroids == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)
    assert boundaries == pytest.approx([0.9816], abs=1e-3)


def test_uniform_source_at_dim_three():
    # A coordinate of a point on the sphere in three dimensions is uniform (Archimedes).
    centroids, _ = codebook(3, 4)
    expected = (np.arange(16) + 0.5) / 8 - 1
    np.testing.assert_allclose(np.array(centroids) / math.sqrt(3), expected, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_one_dimension_is_kept_exactly(bits):
    centroids, _ = codebook(1, bits)
    assert centroids[0] == -1.0
    assert centroids[-1] == 1.0


@pytest.mark.parametrize("dim", DIMS)
def test_codebooks_are_symmetric_and_ascending(dim):
    for bits in (1, 2, 4, 8):
        centroids, _ = codebook(dim, bits)
        assert len(centroids) == 2**bits
        assert list(centroids) == sorted(set(centroids))
        assert [-c for c in reversed(centroids)] == list(centroids)
