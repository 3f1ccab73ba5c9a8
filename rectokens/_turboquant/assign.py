"""Nearest centroid of each coordinate: exact, and vectorised for CPUs.

The codebook is symmetric, so a magnitude is compared with the positive boundaries and the sign
mirrors the answer. A value on a boundary goes to the centroid nearer zero; zero itself to the
lower of the two middle centroids.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rectokens._turboquant.lloyd_max import codebook

_MAX_COMPARED_BOUNDARIES = 7


@dataclass(frozen=True)
class _CellTable:
    """A uniform grid over magnitudes so fine that no cell holds two boundaries.

    `below`: boundaries under the cell. `boundary`: the one inside it, infinity if none.
    """

    cells_per_unit: np.float32
    below: Tensor
    boundary: Tensor


def float32_boundaries(dim: int, bits: int) -> npt.NDArray[np.float32]:
    """Positive boundaries, `(2**(bits - 1) - 1,)` float32, ascending; they define the indices."""
    return np.array(codebook(dim, bits)[1], dtype=np.float32)


def float32_centroids(dim: int, bits: int) -> npt.NDArray[np.float32]:
    """Centroids, `(2**bits,)` float32, ascending, in units of `1 / sqrt(dim)`."""
    return np.array(codebook(dim, bits)[0], dtype=np.float32)


@lru_cache(maxsize=64)
def _cell_table(dim: int, bits: int) -> _CellTable:
    boundaries = float32_boundaries(dim, bits)
    cells_per_unit = np.float32(2.0 / np.diff(boundaries, prepend=0).min())
    # The same float32 product finds the cell of a boundary and of a value, so order is kept.
    cells = (boundaries * cells_per_unit).astype(np.int32)
    if np.unique(cells).size != cells.size:
        raise RuntimeError(f"two boundaries in one cell at dim {dim}, {bits} bits")
    num_cells = int(cells[-1]) + 2
    below = np.searchsorted(cells, np.arange(num_cells)).astype(np.uint8)
    inside = np.full(num_cells, np.inf, dtype=np.float32)
    inside[cells] = boundaries
    return _CellTable(cells_per_unit, torch.from_numpy(below), torch.from_numpy(inside))


def _magnitude_by_comparison(
    magnitudes: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.float32],
    count: npt.NDArray[np.uint8],
    above: npt.NDArray[np.uint8],
) -> None:
    np.greater(magnitudes, boundaries[0], out=count.view(np.bool_))
    for boundary in boundaries[1:]:
        np.greater(magnitudes, boundary, out=above.view(np.bool_))
        np.add(count, above, out=count)


def _magnitude_by_cell(magnitudes: Tensor, table: _CellTable) -> Tensor:
    last = table.below.shape[0] - 1
    # Clamped before the conversion: NaN and huge values have no integer.
    scaled = (magnitudes * float(table.cells_per_unit)).nan_to_num_(nan=0.0).clamp_(max=last)
    cell = scaled.to(torch.int32).flatten()
    count = table.below.index_select(0, cell).view(magnitudes.shape)
    inside = table.boundary.index_select(0, cell).view(magnitudes.shape)
    return count + (magnitudes > inside)


@dataclass(frozen=True)
class Scratch:
    """Memory that `assign` and `pack` overwrite: float32 `(n, k)`, and three uint8 `(n, k)`.

    Small arrays made anew for every group of rows would cost as much as the work on them.
    """

    floats: Tensor
    bytes: Tensor

    @classmethod
    def like(cls, y: Tensor) -> "Scratch":
        """Of the size of `y`, `(n, k)`."""
        return cls(torch.empty_like(y), y.new_empty((3, *y.shape), dtype=torch.uint8))

    def first(self, rows: int) -> "Scratch":
        """The part for the first `rows`."""
        return Scratch(self.floats[:rows], self.bytes[:, :rows])


def assign(y: Tensor, dim: int, bits: int, scratch: Scratch | None = None) -> Tensor:
    """Index of the nearest centroid.

    Args:
        y: float32 `(n, k)`, in units of `1 / sqrt(dim)`.
        scratch: where to work on a CPU; the answer then lies there.

    Returns:
        uint8 `(n, k)`.
    """
    half = 1 << (bits - 1)
    boundaries = float32_boundaries(dim, bits)
    if y.device.type != "cpu":
        count = torch.bucketize(y.abs(), torch.from_numpy(boundaries).to(y.device), out_int32=True)
        return (count.to(torch.uint8)) ^ torch.where(y > 0, half, half - 1).to(torch.uint8)
    scratch = scratch or Scratch.like(y)
    index, count, above = scratch.bytes.numpy()
    # half - 1 has all magnitude bits set: for a negative value the exclusive-or mirrors them.
    np.greater(y.numpy(), 0, out=index.view(np.bool_))
    np.add(index, np.uint8(half - 1), out=index)
    if boundaries.size:
        magnitudes = torch.abs(y, out=scratch.floats)
        if boundaries.size <= _MAX_COMPARED_BOUNDARIES:
            _magnitude_by_comparison(magnitudes.numpy(), boundaries, count, above)
        else:
            count[...] = _magnitude_by_cell(magnitudes, _cell_table(dim, bits)).numpy()
        np.bitwise_xor(index, count, out=index)
    return scratch.bytes[0]
