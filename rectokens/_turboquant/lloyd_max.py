"""Lloyd-Max codebooks for one coordinate of a random unit vector (Lloyd, 1982; Max, 1960).

A coordinate x of a uniformly random point of the unit sphere in `dim` dimensions has the density
proportional to `(1 - x**2)**((dim - 3) / 2)`. Everything here is in units of its standard
deviation `1 / sqrt(dim)`, that is for `u = x * sqrt(dim)`, which tends to a standard Gaussian.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_TAIL_STEPS = 12
# Beyond 12 standard deviations a Gaussian holds 1e-33 of its mass.
_TAIL_SIGMAS = 12.0
_MAX_NEWTON_STEPS = 60


def _log_density(u: Floats, dim: int) -> Floats:
    """Log of the unnormalised density of `u`; `dim >= 3`."""
    return 0.5 * (dim - 3) * np.log1p(-np.minimum(u * u / dim, 1 - 1e-16))


def _moments(edges: Floats, dim: int) -> tuple[Floats, Floats]:
    """Unnormalised mass and first moment of each interval between ascending `edges`.

    The integral runs over the angle, `u = sqrt(dim) * sin(theta)`, which has the smooth weight
    `cos(theta)**(dim - 2)` at every `dim >= 2` (the density itself is singular at dim 2).
    """
    theta = np.arcsin(np.clip(edges / np.sqrt(dim), -1.0, 1.0))
    half = 0.5 * np.diff(theta)[:, None]
    middle = 0.5 * (theta[1:] + theta[:-1])[:, None]
    points = middle + half * _NODES
    weight = (
        np.exp(0.5 * (dim - 2) * np.log1p(-np.minimum(np.sin(points) ** 2, 1 - 1e-16)))
        * _WEIGHTS
        * half
    )
    return weight.sum(1), (weight * np.sqrt(dim) * np.sin(points)).sum(1)


def _cell_moments(boundaries: Floats, dim: int) -> tuple[Floats, Floats]:
    """Mass and first moment of the cells `[0, b1), [b1, b2), ..., [bn, end)`."""
    end = min(np.sqrt(dim), float(boundaries[-1]) + _TAIL_SIGMAS if boundaries.size else 13.0)
    inner = np.concatenate(([0.0], boundaries))
    # The last cell is wide: cut it up, finest where the mass is.
    tail = inner[-1] + (end - inner[-1]) * np.linspace(0.0, 1.0, _TAIL_STEPS + 1) ** 2
    mass, moment = _moments(np.concatenate((inner[:-1], tail)), dim)
    cut = inner.size - 1
    return (
        np.append(mass[:cut], mass[cut:].sum()),
        np.append(moment[:cut], moment[cut:].sum()),
    )


def _companding_start(half: int, dim: int) -> Floats:
    """Centroids whose density is the cube root of the source's (Panter and Dite, 1951)."""
    end = min(np.sqrt(dim), 7.0)
    grid = np.linspace(0.0, end, 8193)
    density = np.exp(_log_density(0.5 * (grid[1:] + grid[:-1]), max(dim, 3)) / 3.0)
    cumulative = np.concatenate(([0.0], np.cumsum(density)))
    levels = (np.arange(half) + 0.5) / half * cumulative[-1]
    start: Floats = np.interp(levels, cumulative, grid)
    return start


def _solve_positive(half: int, dim: int) -> Floats:
    """The positive half of the optimal symmetric codebook, ascending, `(half,)`.

    Newton's method on `centroid = mean of its cell`; a cell's mean depends on its two boundaries
    only, so the Jacobian is tridiagonal. Plain Lloyd iterations need tens of thousands of steps
    at 256 levels and are commonly stopped far from the optimum.
    """
    centroids = _companding_start(half, dim)
    for _ in range(_MAX_NEWTON_STEPS):
        boundaries = 0.5 * (centroids[1:] + centroids[:-1])
        mass, moment = _cell_moments(boundaries, dim)
        means = moment / mass
        residual = centroids - means
        # d(mean)/d(upper edge) = f(edge) * (edge - mean) / mass, and the mirror for the lower.
        density = (
            np.exp(_log_density(boundaries, dim)) / np.sqrt(dim)
            if dim > 2
            else (1.0 / np.sqrt(np.maximum(dim - boundaries**2, 1e-12)))
        )
        upper = np.append(density * (boundaries - means[:-1]) / mass[:-1], 0.0)
        lower = np.append(0.0, density * (means[1:] - boundaries) / mass[1:])
        jacobian = np.diag(1.0 - 0.5 * (upper + lower))
        jacobian -= np.diag(0.5 * upper[:-1], 1) + np.diag(0.5 * lower[1:], -1)
        step = np.linalg.solve(jacobian, residual)
        # Halve the step while it would break the order of the centroids.
        scale = 1.0
        while scale > 1e-6:
            trial = centroids - scale * step
            if trial[0] > 0 and np.all(np.diff(trial) > 0) and trial[-1] < np.sqrt(dim):
                break
            scale *= 0.5
        centroids = trial
        if np.abs(step).max() < 1e-11:
            return centroids
    raise RuntimeError(f"no Lloyd-Max codebook found for dim {dim}, {2 * half} levels")


@lru_cache(maxsize=256)
def codebook(dim: int, bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Optimal codebook of a coordinate in units of `1 / sqrt(dim)`.

    Args:
        dim: dimension of the unit vector, at least 1.
        bits: bits a coordinate.

    Returns:
        `centroids`, `2**bits` ascending values symmetric about 0, and `boundaries`, the
        `2**(bits - 1) - 1` positive midpoints between positive centroids. The boundary 0 is
        implied, the negative ones are mirrored.
    """
    half = 1 << (bits - 1)
    if dim == 1:  # The coordinate is +1 or -1: any codebook that ends there is optimal.
        positive = (2.0 * np.arange(half) + 1.0) / (2.0 * half - 1.0)
    else:
        positive = _solve_positive(half, dim)
    boundaries = 0.5 * (positive[1:] + positive[:-1])
    return tuple((-positive[::-1]).tolist() + positive.tolist()), tuple(boundaries.tolist())
