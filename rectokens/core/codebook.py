"""What a codebook is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class SearchResult:
    """Nearest codes of a batch of queries.

    Attributes:
        codes: long (B,).
    """

    codes: Tensor


class Codebook(nn.Module, ABC):
    """K code vectors and the search among them."""

    @property
    @abstractmethod
    def size(self) -> int:
        """K, the number of code vectors."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (..., D) of codes (...)."""

    @abstractmethod
    def find_nearest(self, query: Tensor) -> SearchResult:
        """Nearest code of each query (B, D)."""

    @abstractmethod
    def update(self, codes: Tensor, embeddings: Tensor) -> None:
        """Overwrite the vectors of ``codes`` (n,) with ``embeddings`` (n, D)."""
