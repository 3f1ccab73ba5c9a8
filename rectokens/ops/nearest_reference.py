"""Nearest-codeword search in plain PyTorch: the definition, and a fast form that is as exact.

The fast form is a matrix product, ||c||² - 2x·c (||x||² is the same for every code), followed by
a second look where rounding could have decided. The product alone loses small differences between
large numbers, so every score comes with a bound on its rounding error (Higham, "Accuracy and
Stability of Numerical Algorithms", 3.1: a computed x·c is off by at most about D·u·||x||·||c||
for unit roundoff u). Rows where another code's lower bound reaches below the best code's upper
bound are searched again in float64, and those still undecided by summing squared differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

# Largest temporary, in elements. On a CPU it should stay in a core's cache between passes.
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_CHUNK_ELEMENTS_DEVICE = 1 << 26
# Relative rounding of a float32 product's inputs, where the process allows one.
_INPUT_ROUNDING = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-10}
_INPUT_ROUNDING_COARSEST = 2.0**-7


def nearest_direct(x: Tensor, codebook: Tensor) -> Tensor:
    """The definition: the lowest index among the smallest ``sum((x - c) ** 2)``, in float64.

    Args:
        x: (B, D).
        codebook: (N, D).

    Returns:
        long (B,). Needs memory for B x N x D numbers.
    """
    differences = x.double().unsqueeze(1) - codebook.double().unsqueeze(0)
    return differences.square().sum(dim=-1).argmin(dim=1)


def nearest_exact(x: Tensor, codebook: Tensor) -> Tensor:
    """Same result as :func:`nearest_direct`, at about the cost of one matrix product.

    Memory beyond the inputs is bounded, whatever B is.

    Args:
        x: (B, D), any real dtype.
        codebook: (N, D), N >= 1, on the device of ``x``.

    Returns:
        long (B,). A row of ``x`` with NaN or infinite values gets some code in [0, N).
    """
    x, codebook = _in_common_dtype(x, codebook)
    table = _Table(codebook)
    codes = torch.empty(x.shape[0], dtype=torch.long, device=x.device)
    for rows in _row_chunks(x.shape[0], max(codebook.shape), x.device):
        codes[rows] = _decide(x[rows], table)
    return codes


def nearest_expanded(x: Tensor, codebook: Tensor) -> Tensor:
    """The matrix product alone: no second look, so near ties may go to the wrong code.

    Args and result as :func:`nearest_exact`.
    """
    x, codebook = _in_common_dtype(x, codebook)
    squares = codebook.square().sum(dim=1)
    codes = torch.empty(x.shape[0], dtype=torch.long, device=x.device)
    for rows in _row_chunks(x.shape[0], max(codebook.shape), x.device):
        codes[rows] = torch.addmm(squares, x[rows], codebook.T, alpha=-2).argmin(dim=1)
    return codes


def squared_distances(x: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Squared L2 distance of each row of ``x`` (B, D) to the vector of its code: float32 (B,)."""
    x, codebook = _in_common_dtype(x, codebook)
    distances = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    for rows in _row_chunks(x.shape[0], x.shape[1], x.device):
        distances[rows] = (x[rows] - codebook[codes[rows]]).square().sum(dim=1).float()
    return distances


class _Table:
    """A codebook (N, D) in float32 or float64, with what the bounds need.

    ``relative`` and ``slack`` bound a score's error:
    ``relative * (3 ||x|| ||c|| + 2 ||c||²) + slack``. The factors leave room for the roundings
    of the bound itself; the slack covers values lost to underflow.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self.squares = vectors.square().sum(dim=1)
        self.norms = self.squares.sqrt()
        precision = torch.finfo(vectors.dtype)
        dim = vectors.shape[1]
        self.relative = (dim + 16) * precision.eps / 2 + _product_input_rounding(vectors)
        self.slack = 16 * dim * precision.tiny
        self.lowered_squares = self.squares * (1 - 2 * self.relative) - self.slack

    def bounds(self, x: Tensor, norms: Tensor) -> Tensor:
        """Lower bounds of the scores ``||c||² - 2x·c``: (b, N) for ``x`` (b, D)."""
        lower = torch.addmm(self.lowered_squares, x, self.vectors.T, alpha=-2)
        return lower.addr_(norms, self.norms, alpha=-3 * self.relative)

    def uncertainty(self, norms: Tensor, codes: Tensor) -> Tensor:
        """How far the upper bound of a score lies above its lower bound: (b,)."""
        error = self.relative * (3 * norms * self.norms[codes] + 2 * self.squares[codes])
        return 2 * (error + self.slack)

    @cached_property
    def in_float64(self) -> _Table:
        return _Table(self.vectors.double())

    @cached_property
    def first_of_kind(self) -> Tensor:
        """bool (N,): no earlier row is equal. Later copies can never win, so they are skipped."""
        _, kind = torch.unique(self.vectors, dim=0, return_inverse=True)
        index = torch.arange(kind.numel(), device=kind.device)
        first = torch.full_like(index, kind.numel()).scatter_reduce_(0, kind, index, "amin")
        return first[kind] == index


def _decide(x: Tensor, table: _Table) -> Tensor:
    """Codes of one chunk of rows (b, D)."""
    norms = torch.linalg.vector_norm(x, dim=1)
    lower = table.bounds(x, norms)
    best, codes = lower.min(dim=1)
    limit = best + table.uncertainty(norms, codes)
    # With the best one out of the way, does any other code's bound reach it? "not >" rather than
    # "<=": a row whose scores overflowed or became NaN is undecided too.
    others = lower.scatter_(1, codes.unsqueeze(1), torch.inf)
    undecided = ~(others.amin(dim=1) > limit)
    if x.dtype == torch.float64:
        undecided &= norms.isfinite()
    rows = undecided.nonzero().squeeze(1)
    if rows.numel() == 0 or others.shape[1] == 1:
        return codes
    if x.dtype == torch.float64:
        candidates = ~(others[rows] > limit[rows].unsqueeze(1))
        candidates.scatter_(1, codes[rows].unsqueeze(1), True)
        codes[rows] = _by_differences(x[rows], table.vectors, candidates & table.first_of_kind)
    else:
        codes[rows] = _decide(x[rows].double(), table.in_float64)
    return codes


def _by_differences(x: Tensor, vectors: Tensor, candidates: Tensor) -> Tensor:
    """Nearest of each row's candidates, bool (b, N), from the differences themselves."""
    distances = torch.full(candidates.shape, torch.inf, dtype=x.dtype, device=x.device)
    row, code = candidates.nonzero(as_tuple=True)
    for pairs in _row_chunks(row.numel(), x.shape[1], x.device):
        gaps = x[row[pairs]] - vectors[code[pairs]]
        distances[row[pairs], code[pairs]] = gaps.square().sum(dim=1)
    return distances.argmin(dim=1)


def _in_common_dtype(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 if either is, else in float32."""
    dtype = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    return x.detach().to(dtype), codebook.detach().to(dtype)


def _product_input_rounding(vectors: Tensor) -> float:
    """Relative rounding of a product's inputs that the process's settings allow, 0 if none."""
    if vectors.dtype == torch.float64:
        return 0.0
    backend = torch.backends.mkldnn if vectors.device.type == "cpu" else torch.backends.cuda
    precision = str(backend.matmul.fp32_precision)
    return 2 * _INPUT_ROUNDING.get(precision, _INPUT_ROUNDING_COARSEST)


def _row_chunks(num_rows: int, row_elements: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose temporaries, ``row_elements`` wide, stay bounded."""
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_DEVICE)
    step = max(1, elements // max(1, row_elements))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
