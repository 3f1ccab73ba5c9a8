"""Where the item tokens lie in a language model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ItemTokens:
    """Affine map between (level, code) and the LM's token ids.

    The token id of (level, code) is ``offset + level * level_stride + code``: one contiguous
    block of ``codebook_size`` ids a level, so a level's logits are a slice of the head.

    Attributes:
        offset: token id of (level 0, code 0).
        level_stride: distance between the first ids of neighbouring levels, >= codebook_size.
        num_levels: L, codes per semantic ID.
        codebook_size: K, codes per level.
        start_token_id: opens an item; the last prompt token before constrained decoding.
        end_token_id: closes an item, or None where the prompt format has none.
    """

    offset: int
    level_stride: int
    num_levels: int
    codebook_size: int
    start_token_id: int
    end_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_levels", "codebook_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.offset < 0:
            raise ValueError(f"offset is {self.offset}; it must be at least 0")
        if self.level_stride < self.codebook_size:
            raise ValueError(
                f"level_stride is {self.level_stride}; it must be at least "
                f"codebook_size {self.codebook_size}, or levels would share token ids"
            )

    @property
    def end(self) -> int:
        """One past the largest item token id."""
        return self.offset + (self.num_levels - 1) * self.level_stride + self.codebook_size

    def token_id(self, level: int, code: int) -> int:
        """Token id of one code.

        Raises:
            ValueError: level outside [0, L) or code outside [0, K).
        """
        if not 0 <= level < self.num_levels:
            raise ValueError(f"level is {level}; allowed are 0 to {self.num_levels - 1}")
        if not 0 <= code < self.codebook_size:
            raise ValueError(f"code is {code}; allowed are 0 to {self.codebook_size - 1}")
        return self.offset + level * self.level_stride + code

    def level_slice(self, level: int) -> slice:
        """The token ids of a level, as a slice of the vocabulary."""
        first = self.token_id(level, 0)
        return slice(first, first + self.codebook_size)

    def encode(self, codes: Sequence[int]) -> list[int]:
        """Token ids of one semantic ID, codes (L,)."""
        if len(codes) != self.num_levels:
            raise ValueError(f"semantic ID has {len(codes)} codes; expected {self.num_levels}")
        return [self.token_id(level, code) for level, code in enumerate(codes)]

    def encode_rows(self, codes: NDArray[np.integer]) -> NDArray[np.int64]:
        """Token ids of n semantic IDs at once, as :meth:`encode` gives them for each.

        Args:
            codes: integers (n, L).

        Returns:
            int64 (n, L).

        Raises:
            ValueError: rows of another length, or a code outside [0, K).
        """
        if codes.ndim != 2 or codes.shape[1] != self.num_levels:
            raise ValueError(f"codes have shape {codes.shape}; expected (n, {self.num_levels})")
        low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"code is {low if low < 0 else high}; allowed are 0 to {self.codebook_size - 1}"
            )
        first = self.offset + self.level_stride * np.arange(self.num_levels, dtype=np.int64)
        return codes + first

    def decode(self, token_ids: Iterable[int]) -> tuple[int, ...]:
        """Codes of the token ids of one (possibly partial) semantic ID, from level 0.

        Raises:
            ValueError: an id that is no code of its level.
        """
        codes = []
        for level, token in enumerate(token_ids):
            code = token - self.offset - level * self.level_stride
            if level >= self.num_levels or not 0 <= code < self.codebook_size:
                raise ValueError(f"token id {token} is no code of level {level}")
            codes.append(code)
        return tuple(codes)
