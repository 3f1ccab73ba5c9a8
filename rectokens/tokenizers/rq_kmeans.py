"""RQ-KMeans: residual quantization by k-means codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Self

from torch import Tensor

from rectokens.core.validation import check_at_least_one, checked_vectors
from rectokens.quantizers.kmeans import KMeansQuantizer
from rectokens.quantizers.residual import ResidualQuantizer
from rectokens.tokenizers.checkpoint import cpu_state, read_checkpoint, write_checkpoint
from rectokens.tokenizers.residual import ResidualTokenizer


class RQKMeansTokenizer(ResidualTokenizer):
    """L levels of k-means, each on the residuals of the one before.

    Args:
        num_levels: L.
        codebook_size: K.
        dim: D, the width of the vectors.
        seed: level i seeds its codebook with ``seed + i``.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        num_levels: int = 3,
        codebook_size: int = 256,
        dim: int = 64,
        *,
        seed: int = 42,
    ) -> None:
        super().__init__()
        check_at_least_one(num_levels=num_levels, codebook_size=codebook_size, dim=dim)
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.dim = dim
        self.seed = seed
        self._rq = ResidualQuantizer(
            [KMeansQuantizer(codebook_size, dim, seed=seed + level) for level in range(num_levels)]
        )
        self._fitted = False
        self.register_load_state_dict_post_hook(_fitted_as_its_levels)  # type: ignore[no-untyped-call]

    @classmethod
    def from_codebooks(
        cls, codebooks: Sequence[Tensor], counts: Sequence[Tensor], *, seed: int = 42
    ) -> Self:
        """A fitted tokenizer of given centroids, on their device.

        Args:
            codebooks: L tensors (K, D), level 0 first.
            counts: L tensors (K,): how many points each centroid stands for, which is how much
                it resists further :meth:`fit_step` calls.
            seed: as of the class.

        Raises:
            ValueError: no codebooks, or shapes that do not match.
        """
        shapes = {tuple(codebook.shape) for codebook in codebooks}
        if len(shapes) != 1 or codebooks[0].ndim != 2 or len(counts) != len(codebooks):
            raise ValueError(
                f"{len(codebooks)} codebooks of shapes {sorted(shapes)} and {len(counts)} counts; "
                "expected as many of each, at least one, and codebooks of one shape (K, D)"
            )
        size, dim = codebooks[0].shape
        tokenizer = cls(len(codebooks), size, dim, seed=seed).to(codebooks[0].device)
        for level, centroids, hits in zip(tokenizer._levels, codebooks, counts, strict=True):
            level.set_fitted(centroids, hits)
        tokenizer._fitted = True
        return tokenizer

    @property
    def feature_dim(self) -> int:
        """D; the same as ``dim``."""
        return self.dim

    @property
    def codebooks(self) -> list[Tensor]:
        """L tensors (K, D), level 0 first."""
        return [level.codebook.embeddings for level in self._levels]

    @property
    def _levels(self) -> list[KMeansQuantizer]:
        return [level for level in self._rq.levels if isinstance(level, KMeansQuantizer)]

    def to_latent(self, features: Tensor) -> Tensor:
        """The vectors themselves."""
        return features

    def from_latent(self, latent: Tensor) -> Tensor:
        """The sums themselves."""
        return latent

    def fit_step(self, batch: Tensor) -> Self:
        """One mini-batch k-means step a level, each on the residuals of the one before.

        Args:
            batch: (B, D), B >= 1.

        Raises:
            TypeError: no tensor of real numbers.
            ValueError: an empty batch, another width, NaN or infinite values.
        """
        device = self.codebooks[0].device
        self._rq.fit_step(checked_vectors(batch, self.dim, name="batch", device=device))
        self._fitted = True
        return self

    def _require_ready(self) -> None:
        if not self._fitted:
            raise RuntimeError("RQKMeansTokenizer is not fitted: call fit_step or load first")

    def save(self, path: str | PathLike[str]) -> None:
        """Write codebooks, counts and configuration to one file; parents are created."""
        write_checkpoint(
            path,
            {
                "config": {
                    "num_levels": self.num_levels,
                    "codebook_size": self.codebook_size,
                    "dim": self.dim,
                    "seed": self.seed,
                },
                "fitted": self._fitted,
                "state_dict": cpu_state(self),
            },
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what :meth:`save` wrote: same codes for same features, and fitting can go on.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no RQ-KMeans file, or a damaged one.
        """
        payload = read_checkpoint(path, ("config", "fitted", "state_dict"))
        try:
            tokenizer = cls(**payload["config"])
            tokenizer.load_state_dict(payload["state_dict"])
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no RQ-KMeans tokenizer: {error}") from error
        tokenizer._fitted = bool(payload["fitted"])
        return tokenizer


def _fitted_as_its_levels(tokenizer: RQKMeansTokenizer, _: object) -> None:
    """A loaded state is fitted if every level's is; the attribute itself is not part of it."""
    tokenizer._fitted = all(
        isinstance(level, KMeansQuantizer) and level._fitted for level in tokenizer._rq.levels
    )
