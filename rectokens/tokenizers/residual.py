"""What RQ-KMeans and RQ-VAE share: residual codes of a latent vector."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from rectokens.core.tokenizer import Tokenizer, TokenSequence
from rectokens.core.validation import checked_codes, checked_vectors
from rectokens.ops.nn_quantize import residual_quantize

# Rows encoded or decoded at a time: bounds the memory of latents and residuals.
_CHUNK_ROWS = 65_536


class ResidualTokenizer(nn.Module, Tokenizer):
    """A tokenizer that quantizes a latent vector by L codebooks of one size.

    Inputs move to the device of the codebooks and results stay there. Encoding and decoding
    are gradient-free and change no state.

    Attributes:
        num_levels: L.
        codebook_size: K.
    """

    num_levels: int
    codebook_size: int

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """D, the width of the vectors to encode."""

    @property
    @abstractmethod
    def codebooks(self) -> list[Tensor]:
        """L tensors (K, latent dimension), level 0 first: the very tensors, not copies."""

    @abstractmethod
    def to_latent(self, features: Tensor) -> Tensor:
        """What is quantized, (B, latent dimension), for vectors (B, D)."""

    @abstractmethod
    def from_latent(self, latent: Tensor) -> Tensor:
        """Vectors (B, D) of sums of code vectors (B, latent dimension)."""

    def _require_ready(self) -> None:
        """Raise RuntimeError where this tokenizer cannot encode or decode yet."""

    @torch.no_grad()
    def encode(self, features: Tensor) -> TokenSequence:
        """Semantic IDs: codes (B, L) of vectors (B, D), or (L,) of one vector (D,).

        Raises:
            RuntimeError: not fitted, where that is needed.
            TypeError: no tensor of real numbers.
            ValueError: another width or number of dimensions, NaN or infinite values.
        """
        self._require_ready()
        codebooks = self.codebooks
        features = checked_vectors(
            features,
            self.feature_dim,
            name="features",
            single=True,
            device=codebooks[0].device,
        )
        rows = features.reshape(-1, self.feature_dim)
        codes = torch.empty(
            rows.shape[0], self.num_levels, dtype=torch.long, device=codebooks[0].device
        )
        for start in range(0, rows.shape[0], _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            latent = self.to_latent(rows[chunk].to(codebooks[0].dtype))
            codes[chunk] = residual_quantize(latent, codebooks)
        return TokenSequence(codes if features.ndim == 2 else codes[0])

    @torch.no_grad()
    def decode(self, tokens: TokenSequence) -> Tensor:
        """Approximate vectors: float32 (B, D) of codes (B, L), or (D,) of (L,).

        Raises:
            RuntimeError: not fitted, where that is needed.
            ValueError: another number of levels, or codes outside [0, K).
        """
        self._require_ready()
        codebooks = self.codebooks
        codes = checked_codes(tokens.codes, self.num_levels, self.codebook_size)
        rows = codes.reshape(-1, self.num_levels).to(codebooks[0].device)
        vectors = torch.empty(rows.shape[0], self.feature_dim, device=codebooks[0].device)
        for start in range(0, rows.shape[0], _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            latent = codebooks[0][rows[chunk, 0]]
            for level in range(1, self.num_levels):
                latent = latent + codebooks[level][rows[chunk, level]]
            vectors[chunk] = self.from_latent(latent).float()
        return vectors if codes.ndim == 2 else vectors[0]
