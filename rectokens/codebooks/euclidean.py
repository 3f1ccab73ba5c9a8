"""A codebook searched by Euclidean distance."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rectokens.core.codebook import Codebook, SearchResult
from rectokens.core.validation import check_at_least_one
from rectokens.ops.nn_quantize import nearest_neighbor_quantize


class EuclideanCodebook(Codebook):
    """K vectors of dimension D, all zero at first.

    Attributes:
        embeddings: float32 (size, dim); a Parameter if ``learnable``, else a buffer.

    Raises:
        ValueError: ``size`` or ``dim`` below 1.
    """

    embeddings: Tensor

    def __init__(self, size: int, dim: int, *, learnable: bool = False) -> None:
        super().__init__()
        check_at_least_one(size=size, dim=dim)
        embeddings = torch.zeros(size, dim, dtype=torch.float32)
        if learnable:
            self.embeddings = nn.Parameter(embeddings)
        else:
            self.register_buffer("embeddings", embeddings)

    @classmethod
    def from_tensor(cls, embeddings: Tensor, *, learnable: bool = False) -> Self:
        """A codebook that holds a float32 copy of ``embeddings`` (size, dim), on its device.

        Raises:
            ValueError: ``embeddings`` is not two-dimensional or is empty.
        """
        if embeddings.ndim != 2:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}; expected (size, dim)"
            )
        size, dim = embeddings.shape
        codebook = cls(size, dim, learnable=learnable).to(embeddings.device)
        with torch.no_grad():
            codebook.embeddings.copy_(embeddings)
        return codebook

    @property
    def size(self) -> int:
        """K, the number of vectors."""
        return self.embeddings.shape[0]

    @property
    def dim(self) -> int:
        """D, the dimension of every vector."""
        return self.embeddings.shape[1]

    def extra_repr(self) -> str:
        """Size and dimension, for ``print``."""
        return f"size={self.size}, dim={self.dim}"

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors (..., D) of codes (...); gradients flow to a learnable codebook.

        Raises:
            IndexError: a code outside [0, K), on a CPU.
        """
        return F.embedding(codes, self.embeddings)

    def find_nearest(self, query: Tensor) -> SearchResult:
        """Code of the vector nearest in L2 distance to each query; the lowest one on ties.

        Args:
            query: (B, D), cast to the codebook's dtype; on the codebook's device.
        """
        vectors = self.embeddings.detach()
        return SearchResult(nearest_neighbor_quantize(query.detach().to(vectors.dtype), vectors))

    @torch.no_grad()
    def update(self, codes: Tensor, embeddings: Tensor) -> None:
        """Overwrite the vectors of ``codes`` (n,) with ``embeddings`` (n, D), without autograd."""
        self.embeddings[codes] = embeddings.to(self.embeddings)
