"""RQ-VAE: residual quantization of a learned latent vector.

Zeghidour et al., "SoundStream", 2021; for semantic IDs Rajput et al., 2023.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from rectokens.core.validation import check_at_least_one
from rectokens.quantizers.residual import ResidualQuantizer
from rectokens.quantizers.vq import VQQuantizer
from rectokens.tokenizers.checkpoint import cpu_state, read_checkpoint, write_checkpoint
from rectokens.tokenizers.residual import ResidualTokenizer

__all__ = ["MLP", "RQVAEConfig", "RQVAEOutput", "RQVAETokenizer", "VQQuantizer"]


class RQVAEConfig(NamedTuple):
    """Shape and training constants of an RQ-VAE; fields as the tokenizer's arguments."""

    input_dim: int
    latent_dim: int = 64
    hidden_dim: int = 256
    num_levels: int = 3
    codebook_size: int = 256
    learnable_codebook: bool = False
    num_encoder_layers: int = 3
    num_decoder_layers: int = 3
    commitment_weight: float = 0.25
    ema_decay: float = 0.99


class RQVAEOutput(NamedTuple):
    """One forward pass.

    Attributes:
        recon: (B, input_dim), the decoded code vectors.
        commitment_loss: 0-d, summed over the levels.
        codes: long (B, L).
        p_unique_ids: float, 0-d, distinct semantic IDs of the batch / B.
    """

    recon: Tensor
    commitment_loss: Tensor
    codes: Tensor
    p_unique_ids: Tensor


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        in_dim: width of the input.
        hidden_dim: width between layers.
        out_dim: width of the output.
        num_layers: linear layers, at least 1.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int = 3) -> None:
        super().__init__()
        check_at_least_one(
            in_dim=in_dim, hidden_dim=hidden_dim, out_dim=out_dim, num_layers=num_layers
        )
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for index in range(num_layers):
            layers += [nn.Linear(widths[index], widths[index + 1]), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) to (..., out_dim)."""
        out: Tensor = self.net(x)
        return out


class RQVAETokenizer(ResidualTokenizer):
    """Encoder, L residual codebooks, decoder; trained by the caller's gradient descent.

    Train on ``mse_loss(out.recon, x) + out.commitment_loss``, then set ``_fitted = True``.

    Args:
        input_dim: D, the width of the vectors.
        latent_dim: width of what is quantized.
        hidden_dim: width of the MLPs' inner layers.
        num_levels: L.
        codebook_size: K.
        num_encoder_layers: linear layers of the encoder.
        num_decoder_layers: linear layers of the decoder.
        commitment_weight: as of :class:`VQQuantizer`.
        ema_decay: as of :class:`VQQuantizer`.
        learnable_codebook: as of :class:`VQQuantizer`.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        input_dim: int,
        latent_dim: int = 64,
        hidden_dim: int = 256,
        num_levels: int = 3,
        codebook_size: int = 256,
        num_encoder_layers: int = 3,
        num_decoder_layers: int = 3,
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        learnable_codebook: bool = False,
    ) -> None:
        super().__init__()
        check_at_least_one(num_levels=num_levels, codebook_size=codebook_size)
        self.config = RQVAEConfig(
            input_dim=input_dim,
            latent_dim=latent_dim,
            hidden_dim=hidden_dim,
            num_levels=num_levels,
            codebook_size=codebook_size,
            learnable_codebook=learnable_codebook,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            commitment_weight=commitment_weight,
            ema_decay=ema_decay,
        )
        self.input_dim = input_dim
        self.latent_dim = latent_dim
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.learnable_codebook = learnable_codebook
        self.encoder = MLP(input_dim, hidden_dim, latent_dim, num_encoder_layers)
        self.decoder = MLP(latent_dim, hidden_dim, input_dim, num_decoder_layers)
        self.rq = ResidualQuantizer(
            [
                VQQuantizer(
                    codebook_size,
                    latent_dim,
                    commitment_weight=commitment_weight,
                    ema_decay=ema_decay,
                    learnable_codebook=learnable_codebook,
                )
                for _ in range(num_levels)
            ]
        )
        self._fitted = False

    @classmethod
    def from_config(cls, config: RQVAEConfig) -> Self:
        """A fresh model of this configuration."""
        return cls(**config._asdict())

    @property
    def feature_dim(self) -> int:
        """D; the same as ``input_dim``."""
        return self.input_dim

    @property
    def codebooks(self) -> list[Tensor]:
        """L tensors (K, latent_dim), level 0 first, detached."""
        return [level.codebook.embeddings.detach() for level in self._levels]

    @property
    def _levels(self) -> list[VQQuantizer]:
        return [level for level in self.rq.levels if isinstance(level, VQQuantizer)]

    def to_latent(self, features: Tensor) -> Tensor:
        """The encoder's output, (B, latent_dim)."""
        latent: Tensor = self.encoder(features)
        return latent

    def from_latent(self, latent: Tensor) -> Tensor:
        """The decoder's output, (B, input_dim)."""
        recon: Tensor = self.decoder(latent)
        return recon

    def forward(self, x: Tensor) -> RQVAEOutput:
        """Reconstruct vectors (B, input_dim); in training mode the codebooks learn too.

        Raises:
            ValueError: another width or number of dimensions, or no rows.
        """
        if x.ndim != 2 or x.shape[1] != self.input_dim or x.shape[0] < 1:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (B, {self.input_dim}) with B >= 1"
            )
        quantized = self.rq(self.encoder(x))
        distinct = torch.unique(quantized.codes, dim=0).shape[0]
        return RQVAEOutput(
            recon=self.decoder(quantized.quantized),
            commitment_loss=quantized.commitment_loss,
            codes=quantized.codes,
            p_unique_ids=torch.tensor(distinct / x.shape[0], device=x.device),
        )

    def fit_step(self, batch: Tensor) -> Self:
        """Always raises: an RQ-VAE learns by gradient descent on its forward pass.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "an RQ-VAE has no fit_step: minimise mse_loss(out.recon, x) + out.commitment_loss "
            "of its forward pass, or use rectokens.tokenizers.fitting"
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write weights, codebooks and configuration to one file; parents are created."""
        write_checkpoint(path, {"state_dict": cpu_state(self), "config": self.config._asdict()})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what :meth:`save` wrote: same codes for same features; in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no RQ-VAE file, or a damaged one.
        """
        payload: dict[str, Any] = read_checkpoint(path, ("config", "state_dict"))
        try:
            tokenizer = cls(**payload["config"])
            tokenizer.load_state_dict(payload["state_dict"])
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no RQ-VAE tokenizer: {error}") from error
        tokenizer._fitted = True
        return tokenizer.eval()
