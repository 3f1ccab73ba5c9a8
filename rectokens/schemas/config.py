"""How the library's constrained generation searches."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

CSRKernel = Literal["default", "sample", "topk"]
CSR_KERNELS: tuple[CSRKernel, ...] = get_args(CSRKernel)


class GenerationConfig(NamedTuple):
    """Settings of one constrained generation.

    Attributes:
        steps: tokens to generate, at most the trie's depth.
        k: beam width: beams kept, and sequences returned.
        beam_size: candidates per beam: successors each beam proposes; at least ``k``.
        temperature: 0 proposes each beam's best successors; above 0 draws them without
            replacement from softmax(logits / temperature), and scores are of that softmax.
        csr_kernel: how a ``SparseLinear`` output layer proposes below the dense layers; without
            such a layer it has no meaning. "default": masked logits, proposals as
            ``temperature`` says. "topk": the fused top-k, always the best successors. "sample":
            the fused draw, as ``temperature`` says. All three report the same score. For a
            model that transforms logits after its output layer (soft-capping, scaling) the
            last two propose by masked logits, as "default" does.
    """

    steps: int
    k: int = 1
    beam_size: int = 1
    temperature: float = 1.0
    csr_kernel: CSRKernel = "default"


def check_generation_config(config: GenerationConfig) -> None:
    """Refuse a configuration that no search can follow.

    Raises:
        ValueError: names the field, the value found and the values allowed.
    """
    for name in ("steps", "k", "beam_size"):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_temperature(config.temperature)
    if config.csr_kernel not in CSR_KERNELS:
        raise ValueError(
            f"csr_kernel is {config.csr_kernel!r}; allowed are {', '.join(CSR_KERNELS)}"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is negative, NaN or infinite.

    Raises:
        ValueError: names the value found.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be finite and at least 0")
