"""Residual quantization: a stack of quantizers, each on what the one before left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from rectokens.core.quantizer import Quantizer, QuantizerOutput, ResidualQuantizerOutput


class ResidualQuantizer(nn.Module):
    """L quantizers in order; level l sees the residuals of level l - 1.

    Attributes:
        levels: the quantizers.

    Raises:
        ValueError: no quantizers.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        super().__init__()
        if not quantizers:
            raise ValueError("quantizers is empty; expected at least one level")
        self.levels: list[Quantizer] = list(quantizers)
        # Registers the levels that hold tensors; a level need not be a Module.
        self._module_levels = nn.ModuleList(
            level for level in self.levels if isinstance(level, nn.Module)
        )

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.levels)

    @torch.no_grad()
    def fit_step(self, batch: Tensor) -> Self:
        """Fit level by level on the residuals of one batch (B, D), without gradients."""
        residual = batch
        for index, level in enumerate(self.levels):
            level.fit_step(residual)
            if index + 1 < len(self.levels):
                residual = level.quantize(residual).residuals
        return self

    def quantize(self, x: Tensor) -> ResidualQuantizerOutput:
        """Quantize vectors (B, D); codes (B, L), ``quantized`` the sum over the levels."""
        outputs: list[QuantizerOutput] = []
        residual = x
        for level in self.levels:
            outputs.append(level.quantize(residual))
            residual = outputs[-1].residuals
        quantized = outputs[0].quantized
        for output in outputs[1:]:
            quantized = quantized + output.quantized
        codes = torch.stack([output.codes for output in outputs], dim=1)
        return ResidualQuantizerOutput(codes, quantized, outputs)

    def forward(self, x: Tensor) -> ResidualQuantizerOutput:
        """Same as :meth:`quantize`."""
        return self.quantize(x)
