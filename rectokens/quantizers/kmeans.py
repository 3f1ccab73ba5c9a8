"""Mini-batch k-means."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from rectokens.codebooks.euclidean import EuclideanCodebook
from rectokens.core.quantizer import Quantizer, QuantizerOutput
from rectokens.core.validation import checked_vectors
from rectokens.quantizers.seeding import kmeans_plus_plus


class KMeansQuantizer(nn.Module, Quantizer):
    """One codebook fitted by mini-batch k-means (Sculley, 2010) from k-means++ seeds.

    Args:
        codebook_size: K.
        dim: D.
        seed: of the generator that seeds the codebook.

    Raises:
        ValueError: ``codebook_size`` or ``dim`` below 1.
    """

    _counts: Tensor | None

    def __init__(self, codebook_size: int, dim: int, *, seed: int = 42) -> None:
        super().__init__()
        self._codebook = EuclideanCodebook(codebook_size, dim)
        self._seed = seed
        self._fitted = False
        # long (K,): points each centroid is the mean of; None before fitting.
        self.register_buffer("_counts", None)

    @property
    def codebook(self) -> EuclideanCodebook:
        """The centroids."""
        return self._codebook

    @torch.no_grad()
    def set_fitted(self, centroids: Tensor, counts: Tensor) -> None:
        """Take over centroids (K, D) fitted elsewhere, each the mean of ``counts`` (K,) points."""
        self._codebook.embeddings.copy_(centroids)
        self._counts = counts.to(self._codebook.embeddings.device, torch.long, copy=True)
        self._fitted = True

    @torch.no_grad()
    def fit_step(self, batch: Tensor) -> Self:
        """Assign a batch to its nearest centroids and move those to their running means.

        The first call seeds the centroids by k-means++ on its batch; with fewer rows than K the
        rest are random repeats. A centroid that gets no point stays.

        Args:
            batch: (B, D), B >= 1, cast to float32.

        Raises:
            ValueError: an empty batch, another width, or NaN or infinite values.
        """
        centroids = self._codebook.embeddings
        points = checked_vectors(batch, centroids.shape[1], name="batch", device=centroids.device)
        if points.shape[0] < 1:
            raise ValueError("batch has 0 rows; fitting needs at least 1")
        if not self._fitted or self._counts is None:
            generator = torch.Generator().manual_seed(self._seed)
            centroids.copy_(points[kmeans_plus_plus(points, centroids.shape[0], generator)])
            self._counts = torch.zeros(
                centroids.shape[0], dtype=torch.long, device=centroids.device
            )
            self._fitted = True

        codes = self._codebook.find_nearest(points).codes
        sums = torch.zeros_like(centroids).index_add_(0, codes, points)
        hits = torch.bincount(codes, minlength=centroids.shape[0])
        self._counts += hits
        # (n c + Σx) / (n + m) = c + (Σx - m c) / (n + m), without the large product n c.
        shift = sums - hits.unsqueeze(1) * centroids
        centroids += shift / self._counts.clamp(min=1).unsqueeze(1)
        return self

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizerOutput:
        """Quantize vectors (B, D), without gradients; ``commitment_loss`` is None.

        Raises:
            RuntimeError: not fitted yet.
        """
        if not self._fitted:
            raise RuntimeError("KMeansQuantizer is not fitted: call fit_step first")
        codes = self._codebook.find_nearest(x).codes
        quantized = self._codebook.lookup(codes)
        return QuantizerOutput(codes, quantized, x.detach() - quantized)

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Same as :meth:`quantize`."""
        return self.quantize(x)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The counts are part of the state only once fitted, so make room for them.
        if f"{prefix}_counts" in state_dict:
            self._counts = torch.zeros_like(state_dict[f"{prefix}_counts"])
            self._fitted = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
