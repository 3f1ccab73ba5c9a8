"""What a quantizer is, and what quantizing a batch gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from rectokens.core.codebook import Codebook


@dataclass
class QuantizerOutput:
    """A batch quantized by one codebook.

    Attributes:
        codes: long (B,).
        quantized: (B, D), the code vectors (straight-through where gradients matter).
        residuals: (B, D), input minus code vector.
        commitment_loss: 0-d, or None for a quantizer without one.
    """

    codes: Tensor
    quantized: Tensor
    residuals: Tensor
    commitment_loss: Tensor | None = None


@dataclass
class ResidualQuantizerOutput:
    """A batch quantized by several codebooks, each on the residuals of the one before.

    Attributes:
        codes: long (B, L).
        quantized: (B, D), sum of the levels' code vectors.
        level_outputs: one :class:`QuantizerOutput` a level.
    """

    codes: Tensor
    quantized: Tensor
    level_outputs: list[QuantizerOutput] = field(default_factory=list)

    @property
    def commitment_loss(self) -> Tensor:
        """Sum of the levels' losses, 0-d; zero where no level has one."""
        losses = [
            out.commitment_loss for out in self.level_outputs if out.commitment_loss is not None
        ]
        return torch.stack(losses).sum() if losses else torch.tensor(0.0)


class Quantizer(ABC):
    """Maps vectors to the codes of one codebook.

    Not a Module by itself: a quantizer that holds tensors adds ``nn.Module``.
    """

    @property
    @abstractmethod
    def codebook(self) -> Codebook:
        """The code vectors."""

    @abstractmethod
    def quantize(self, x: Tensor) -> QuantizerOutput:
        """Quantize vectors (B, D)."""

    def fit_step(self, batch: Tensor) -> Self:
        """Learn from one batch (B, D); does nothing by default. Returns self."""
        return self
