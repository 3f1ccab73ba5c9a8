"""The trainable codebook of an RQ-VAE level."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rectokens.codebooks.euclidean import EuclideanCodebook
from rectokens.core.quantizer import Quantizer, QuantizerOutput
from rectokens.quantizers.seeding import kmeans_plus_plus


class VQQuantizer(nn.Module, Quantizer):
    """Vector quantization with straight-through gradients (van den Oord et al., 2017).

    The codebook follows its inputs by exponential moving averages (Razavi et al., 2019), or by
    gradient descent if ``learnable_codebook``. In training mode the first batch seeds it by
    k-means++; with averages, a code that stays unused is put on a random row of a batch.

    Args:
        codebook_size: K.
        dim: D.
        commitment_weight: beta, weight of the pull of the input towards its code, >= 0.
        ema_decay: of the averages, in [0, 1).
        restart_after_steps: training steps without a hit after which a code is restarted.
        learnable_codebook: train the codebook by gradients: no averages, no restarts.

    Raises:
        ValueError: a value outside its range.
    """

    _ema_cluster_size: Tensor
    _ema_embed_sum: Tensor
    _initialized: Tensor
    _steps_since_active: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        restart_after_steps: int = 20,
        learnable_codebook: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= commitment_weight < float("inf"):
            raise ValueError(f"commitment_weight is {commitment_weight}; it must be finite, >= 0")
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay is {ema_decay}; allowed are 0 to below 1")
        if restart_after_steps < 1:
            raise ValueError(f"restart_after_steps is {restart_after_steps}; it must be at least 1")
        self.commitment_weight = commitment_weight
        self.ema_decay = ema_decay
        self.restart_after_steps = restart_after_steps
        self.learnable_codebook = learnable_codebook
        self._codebook = EuclideanCodebook(codebook_size, dim, learnable=learnable_codebook)
        nn.init.normal_(self._codebook.embeddings)
        self.register_buffer("_ema_cluster_size", torch.zeros(codebook_size))
        self.register_buffer("_ema_embed_sum", torch.zeros(codebook_size, dim))
        self.register_buffer("_initialized", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("_steps_since_active", torch.zeros(codebook_size, dtype=torch.long))

    @property
    def codebook(self) -> EuclideanCodebook:
        """The code vectors."""
        return self._codebook

    def quantize(self, x: Tensor) -> QuantizerOutput:
        """Quantize vectors (B, D); in training mode also learn from them.

        The codes and the loss come from the codebook as it was before this batch moved it.

        Returns:
            ``quantized`` passes gradients straight through to ``x``; ``residuals`` are detached;
            ``commitment_loss`` is 0-d.

        Raises:
            ValueError: an empty batch in training mode.
        """
        if self.training:
            if x.shape[0] < 1:
                raise ValueError("batch has 0 rows; training needs at least 1")
            self._seed_once(x.detach())
        codes = self._codebook.find_nearest(x).codes
        vectors = self._codebook.lookup(codes)
        fixed = vectors.detach()
        if self.learnable_codebook:
            to_codebook = (x.detach() - vectors).square().sum(dim=1).mean()
            to_code = (x - fixed).square().sum(dim=1).mean()
            loss = to_codebook + self.commitment_weight * to_code
        else:
            loss = self.commitment_weight * F.mse_loss(x, fixed)
        output = QuantizerOutput(
            codes=codes,
            quantized=x + (fixed - x).detach(),
            residuals=x.detach() - fixed,
            commitment_loss=loss,
        )
        if self.training and not self.learnable_codebook:
            self._follow(x.detach(), codes)
        return output

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Same as :meth:`quantize`."""
        return self.quantize(x)

    @torch.no_grad()
    def _seed_once(self, batch: Tensor) -> None:
        """Put the codebook on k-means++ seeds of the first batch (B, D)."""
        if bool(self._initialized):
            return
        vectors = self._codebook.embeddings
        points = batch.to(vectors.dtype)
        # The seed comes from torch's generator, so manual_seed decides this draw too.
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        vectors.copy_(points[kmeans_plus_plus(points, vectors.shape[0], generator)])
        self._initialized.fill_(True)

    @torch.no_grad()
    def _follow(self, batch: Tensor, codes: Tensor) -> None:
        """Move hit codes to their averages; restart those unhit for too long."""
        vectors = self._codebook.embeddings
        points = batch.to(vectors.dtype)
        counts = torch.bincount(codes, minlength=vectors.shape[0])
        hit = counts > 0
        sums = torch.zeros_like(vectors).index_add_(0, codes, points)

        decay = self.ema_decay
        size = self._ema_cluster_size * decay + counts * (1 - decay)
        total = self._ema_embed_sum * decay + sums * (1 - decay)
        self._ema_cluster_size.copy_(torch.where(hit, size, self._ema_cluster_size))
        self._ema_embed_sum.copy_(torch.where(hit.unsqueeze(1), total, self._ema_embed_sum))
        # Unhit codes have size >= 0, perhaps 0: their quotient is computed but not used.
        means = total / torch.where(hit, size, 1.0).unsqueeze(1)
        vectors.copy_(torch.where(hit.unsqueeze(1), means, vectors))

        self._steps_since_active.copy_(torch.where(hit, 0, self._steps_since_active + 1))
        dead = (self._steps_since_active >= self.restart_after_steps).nonzero().squeeze(1)
        if dead.numel():
            self._restart(dead, points)

    def _restart(self, dead: Tensor, points: Tensor) -> None:
        """Put dead codes (n,) on random rows, different ones while the batch has enough."""
        num_points = points.shape[0]
        if dead.numel() <= num_points:
            rows = torch.randperm(num_points)[: dead.numel()]
        else:
            rows = torch.randint(num_points, (dead.numel(),))
        self._codebook.update(dead, points[rows.to(points.device)])
        self._ema_cluster_size[dead] = 0
        self._ema_embed_sum[dead] = 0
        self._steps_since_active[dead] = 0
