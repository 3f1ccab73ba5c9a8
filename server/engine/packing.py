"""Prompts of unequal length laid end to end, so that no padding is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from server.engine.prompt_leases import Prompts


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Where the rows of a packed batch lie: row b takes S_b of the S packed positions.

    Attributes:
        starts: first position of each row that is in the pack; those before are cached, (B,).
        lengths: T of each row, cached positions included, (B,).
        offsets: packed position at which each row begins, and S at the end, (B + 1,).
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], starts: Sequence[int]) -> PackedRows:
        """Rows of ``lengths`` tokens whose positions from ``starts`` on are packed."""
        sizes = [length - start for length, start in zip(lengths, starts, strict=True)]
        if min(sizes) < 1:
            raise ValueError("every row needs at least one position that is not cached")
        return cls(tuple(starts), tuple(lengths), (0, *accumulate(sizes)))

    def positions(self, device: torch.device) -> Tensor:
        """Position of each packed token in its prompt, int64 (1, S)."""
        ranges = [
            torch.arange(start, length)
            for start, length in zip(self.starts, self.lengths, strict=True)
        ]
        return torch.cat(ranges)[None].to(device)

    def last(self, device: torch.device) -> Tensor:
        """Packed position of each row's last token, int64 (B,)."""
        return torch.tensor(self.offsets[1:], device=device) - 1


def model_inputs(prompts: Prompts, embed: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The prompts end to end, as a model takes them.

    ``input_ids`` (1, S) where all prompts are token ids. Where one is embeddings, the others are
    embedded by the model's own layer, so that a prompt means the same in either form:
    ``inputs_embeds`` (1, S, H).
    """
    if not any(isinstance(prompt, Tensor) for prompt in prompts):
        tokens = [token for prompt in prompts for token in prompt]
        return {"input_ids": torch.tensor([tokens], device=device)}
    dtype = next(embed.parameters()).dtype
    rows = [
        prompt.to(device, dtype)
        if isinstance(prompt, Tensor)
        else embed(torch.tensor(list(prompt), device=device))
        for prompt in prompts
    ]
    return {"inputs_embeds": torch.cat(rows)[None]}
