"""Codebooks fitted by Lloyd's iterations over data that need not fit in memory.

A pass shows every row to :meth:`LloydFit.observe`, in batches; :meth:`LloydFit.finish_pass` then
moves the vectors. Three kinds of codebook, all searched by plain nearest neighbour:

- :class:`MeansFit`: k-means (Lloyd, 1982), each vector the mean of its rows.
- :class:`EqualNormFit`: spherical k-means (Dhillon and Modha, 2001), all vectors of one length.
  What is left after a first level has its mean at the origin and many weak directions, where
  k-means lets one short vector attract most rows; with equal lengths the nearest vector is the
  one of the closest direction, so rows spread over the codes and the error falls as well.
- :class:`SeparatingFit`: equal norms in the few dimensions along which rows that share all codes
  so far differ most, compared with all rows (a linear discriminant, Fisher, 1936, turned round).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rectokens.ops.nn_quantize import nearest_neighbor_quantize
from rectokens.quantizers.seeding import kmeans_plus_plus

_GRAM_ROWS = 16_384
# Added to the covariance of all rows, relative to its mean variance: directions without variance
# are rounding noise, not structure.
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class PassSummary:
    """One finished pass.

    Attributes:
        error: mean squared distance of a row to its vector, before the vectors moved.
        codes_used: codes with at least one row.
        restarted: codes without a row that were put elsewhere.
    """

    error: float
    codes_used: int
    restarted: int


class LloydFit(ABC):
    """One codebook being fitted.

    Args:
        sample: float32 (n, D), n >= 1: rows to seed from and to restart unused codes on.
        codebook_size: K.
        generator: on the CPU.

    Attributes:
        counts: long (K,), rows of each code in the last finished pass.
    """

    def __init__(self, sample: Tensor, codebook_size: int, generator: torch.Generator) -> None:
        self._sample = sample
        self._generator = generator
        self._points = self._seed_points(sample)
        self._vectors = self._points[
            kmeans_plus_plus(self._points, codebook_size, generator)
        ].clone()
        self.counts = torch.zeros(codebook_size, dtype=torch.long, device=sample.device)
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros_like(self._vectors, dtype=torch.float64)
        self._hits = torch.zeros_like(self.counts)
        self._error = 0.0

    @property
    def codebook(self) -> Tensor:
        """The vectors as they are now: float32 (K, D)."""
        return self._expand(self._vectors)

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Take one batch of a pass into account: float32 (B, D)."""
        points = self._project(rows)
        codes = nearest_neighbor_quantize(points, self._vectors)
        sums = torch.zeros_like(self._vectors).index_add_(0, codes, points)
        self._sums += sums.double()
        self._hits += torch.bincount(codes, minlength=self._hits.numel())
        self._error += float((rows - self._expand(self._vectors)[codes]).square().sum())

    @torch.no_grad()
    def finish_pass(self) -> PassSummary:
        """Move the vectors to what the pass saw, and restart unused codes.

        A restarted code goes to a row of the sample, drawn by squared distance to its vector.

        Raises:
            ValueError: the pass saw no rows.
        """
        num_rows = int(self._hits.sum())
        if num_rows < 1:
            raise ValueError("the pass saw 0 rows; at least 1 is needed")
        hit = self._hits > 0
        summary_error = self._error / num_rows
        self._move(self._sums, self._hits, hit)
        restarted = self._restart((~hit).nonzero().squeeze(1))
        self.counts = self._hits
        self._reset()
        return PassSummary(summary_error, int(hit.sum()), restarted)

    def _restart(self, unused: Tensor) -> int:
        if unused.numel() == 0:
            return 0
        points = self._project(self._sample)
        codes = nearest_neighbor_quantize(points, self._vectors)
        error = (points - self._vectors[codes]).square().sum(dim=1)
        cumulative = error.double().cpu().cumsum(0)
        if cumulative[-1] <= 0:
            return 0
        draws = torch.rand(unused.numel(), generator=self._generator, dtype=torch.float64)
        rows = torch.searchsorted(cumulative, draws * cumulative[-1], right=True)
        rows = rows.clamp_(max=error.numel() - 1).to(error.device)
        self._place(unused, self._points[rows])
        return unused.numel()

    def _project(self, rows: Tensor) -> Tensor:
        """Rows (B, D) in the space of the vectors, (B, d)."""
        return rows

    def _expand(self, vectors: Tensor) -> Tensor:
        """Vectors (K, d) in the space of the rows, (K, D)."""
        return vectors

    @abstractmethod
    def _seed_points(self, sample: Tensor) -> Tensor:
        """Where codes may start: (n, d)."""

    @abstractmethod
    def _move(self, sums: Tensor, hits: Tensor, hit: Tensor) -> None:
        """Set the vectors from float64 sums (K, d) and numbers (K,) of their rows."""

    @abstractmethod
    def _place(self, codes: Tensor, points: Tensor) -> None:
        """Put codes (n,) on seed points (n, d)."""


class MeansFit(LloydFit):
    """k-means."""

    def _seed_points(self, sample: Tensor) -> Tensor:
        return sample

    def _move(self, sums: Tensor, hits: Tensor, hit: Tensor) -> None:
        self._vectors[hit] = (sums[hit] / hits[hit].unsqueeze(1)).to(self._vectors.dtype)

    def _place(self, codes: Tensor, points: Tensor) -> None:
        self._vectors[codes] = points


class EqualNormFit(LloydFit):
    """Spherical k-means: directions from the sums, one length for all.

    The length that makes the error smallest is the mean of x·u over all rows x and the direction
    u of their code, which is the sum of the lengths of the codes' sums over the number of rows.
    """

    _radius = 1.0

    def _seed_points(self, sample: Tensor) -> Tensor:
        return F.normalize(self._project(sample), dim=1)

    def _move(self, sums: Tensor, hits: Tensor, hit: Tensor) -> None:
        self._radius = float(sums.norm(dim=1).sum() / hits.sum())
        directions = F.normalize(self._vectors, dim=1)
        directions[hit] = F.normalize(sums[hit], dim=1).to(directions.dtype)
        self._vectors = directions * self._radius

    def _place(self, codes: Tensor, points: Tensor) -> None:
        self._vectors[codes] = points * self._radius


class SeparatingFit(EqualNormFit):
    """Spherical k-means within a subspace, see :func:`separating_basis`.

    Args:
        sample, codebook_size, generator: as of :class:`LloydFit`.
        basis: float32 (D, d), orthonormal columns.
    """

    def __init__(
        self, sample: Tensor, codebook_size: int, generator: torch.Generator, basis: Tensor
    ) -> None:
        self._basis = basis
        super().__init__(sample, codebook_size, generator)

    def _project(self, rows: Tensor) -> Tensor:
        return rows @ self._basis

    def _expand(self, vectors: Tensor) -> Tensor:
        return vectors @ self._basis.T


def separating_basis(rows: Tensor, codes: Tensor, num_dims: int) -> Tensor | None:
    """Directions along which rows that share their codes differ most, relative to all rows.

    Top generalised eigenvectors of (covariance within groups of equal codes, covariance of all
    rows), made orthonormal.

    Args:
        rows: (n, D), what the levels so far left over.
        codes: integer (n, l), the codes so far.
        num_dims: d, at most D are returned.

    Returns:
        float32 (D, d), or None where no two different rows share their codes.
    """
    _, group, sizes = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    dim = rows.shape[1]
    means = rows.new_zeros(sizes.numel(), dim).index_add_(0, group, rows)
    means /= sizes.unsqueeze(1)
    crowded = sizes[group] > 1
    within = _gram((rows - means[group])[crowded])
    if float(within.diagonal().sum()) <= 0:
        return None
    total = _gram(rows) / rows.shape[0]
    total += torch.eye(dim, dtype=total.dtype, device=total.device) * (
        _RIDGE * total.diagonal().mean()
    )
    factor = torch.linalg.cholesky(total)
    half = torch.linalg.solve_triangular(factor, within, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    _, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    top = vectors[:, -min(num_dims, dim) :]
    directions = torch.linalg.solve_triangular(factor.T, top, upper=True)
    basis: Tensor = torch.linalg.qr(directions).Q
    return basis.float()


def _gram(rows: Tensor) -> Tensor:
    """``rows.T @ rows`` in float64, (D, D), a chunk of rows at a time."""
    dim = rows.shape[1]
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=rows.device)
    for chunk in rows.split(_GRAM_ROWS):
        wide = chunk.double()
        gram.addmm_(wide.T, wide)
    return gram
