"""What a tokenizer is, and the semantic IDs it makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from os import PathLike
from typing import Self

import torch
from torch import Tensor

_INT64_LIMIT = 2**63


@dataclass(eq=False)
class TokenSequence:
    """The semantic IDs of a batch of items, or of one item.

    Attributes:
        codes: long (B, L), or (L,) for a single item; level 0 first.

    Raises:
        ValueError: ``codes`` has another number of dimensions.
        TypeError: ``codes`` is no integer tensor.
    """

    codes: Tensor

    def __post_init__(self) -> None:
        if self.codes.ndim not in (1, 2):
            raise ValueError(f"codes have shape {tuple(self.codes.shape)}; expected (B, L) or (L,)")
        if self.codes.dtype.is_floating_point or self.codes.dtype == torch.bool:
            raise TypeError(f"codes have dtype {self.codes.dtype}; expected an integer dtype")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenSequence):
            return NotImplemented
        return torch.equal(self.codes, other.codes)

    __hash__ = None  # type: ignore[assignment]  # mutable tensors make no good keys

    @property
    def num_levels(self) -> int:
        """L, codes per semantic ID."""
        return self.codes.shape[-1]

    @property
    def batch_size(self) -> int | None:
        """B, or None for a single item's 1-D codes."""
        return self.codes.shape[0] if self.codes.ndim == 2 else None

    def to_tuple_ids(self) -> list[tuple[int, ...]]:
        """One tuple of L codes per item; a 1-D sequence gives a list of one."""
        rows: list[list[int]] = self.codes.reshape(-1, self.num_levels).tolist()
        return [tuple(row) for row in rows]

    def to_flat_ids(self, base: int | None = None) -> Tensor:
        """Every semantic ID as one number: its codes are digits, level 0 most significant.

        Args:
            base: of the number system. None takes the largest code present + 1, which depends on
                the batch: pass the codebook size K for ids that can be compared between batches.

        Returns:
            long (B,), or 0-d for 1-D codes.

        Raises:
            ValueError: a code that is no digit of ``base``, or ids that do not fit 63 bits.
        """
        codes = self.codes.long()
        low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
        if base is None:
            base = high + 1
        if low < 0 or high >= base:
            raise ValueError(f"codes span {low} to {high}; allowed are 0 to {base - 1}")
        if base**self.num_levels > _INT64_LIMIT:
            raise ValueError(
                f"{self.num_levels} levels in base {base} do not fit a 64-bit id; "
                f"base ** num_levels may be at most 2 ** 63"
            )
        flat = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        for digit in codes.unbind(-1):
            flat = flat * base + digit
        return flat


class Tokenizer(ABC):
    """From item vectors to semantic IDs and back."""

    @abstractmethod
    def fit_step(self, batch: Tensor) -> Self:
        """Learn from one batch (B, D); returns self.

        Raises:
            ValueError: a batch of another width, or with NaN or infinite values.
            NotImplementedError: this tokenizer is trained by gradient descent instead.
        """

    @abstractmethod
    def encode(self, features: Tensor) -> TokenSequence:
        """Semantic IDs of vectors (B, D) as codes (B, L), of one vector (D,) as (L,)."""

    @abstractmethod
    def decode(self, tokens: TokenSequence) -> Tensor:
        """Approximate vectors (B, D) of codes (B, L), or (D,) of (L,)."""

    @abstractmethod
    def save(self, path: str | PathLike[str]) -> None:
        """Write the tokenizer to one file, creating missing parent folders."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a tokenizer that :meth:`save` wrote."""
