"""Fit a tokenizer to vectors that need not fit in memory; see also :mod:`.quality`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rectokens.core.validation import check_at_least_one
from rectokens.ops.nn_quantize import residual_quantize
from rectokens.quantizers.lloyd import (
    EqualNormFit,
    LloydFit,
    MeansFit,
    SeparatingFit,
    separating_basis,
)
from rectokens.tokenizers.batches import (
    Batch,
    checked_batches,
    reservoir_sample,
    shuffled_batches,
)
from rectokens.tokenizers.quality import quality_report
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from rectokens.tokenizers.rqvae import RQVAEConfig, RQVAETokenizer

__all__ = [
    "CODEBOOK_STYLES",
    "CodebookStyle",
    "FitProgress",
    "ProgressCallback",
    "RQKMeansSettings",
    "RQVAETraining",
    "fit_rq_kmeans",
    "fit_rqvae",
    "quality_report",
]

CodebookStyle = Literal["kmeans", "balanced", "separating"]
"""How RQ-KMeans codebooks are fitted. ``kmeans``: every level by k-means. ``balanced``: the levels
after the first have vectors of equal length, which uses the codes evenly and reconstructs best.
``separating``: as balanced, but the last level tells apart items that share all codes before it:
fewest collisions, and a last level that hardly improves the reconstruction."""

CODEBOOK_STYLES: tuple[CodebookStyle, ...] = get_args(CodebookStyle)

_SAMPLE_ROWS = 131_072
_SAMPLE_ROWS_PER_CODE = 32
_OBSERVED_ROWS = 8192


@dataclass(frozen=True, slots=True)
class FitProgress:
    """How far fitting has come.

    Attributes:
        stage: what is going on: ``sampling``, ``level 2 of 3``, ``epoch 4 of 20``.
        fraction: of the whole work, from 0 to 1; never falls.
        rows: rows read from the batches so far in this stage.
        loss: mean squared error of the last pass or step, None before the first.
    """

    stage: str
    fraction: float
    rows: int
    loss: float | None = None


ProgressCallback = Callable[[FitProgress], None]
"""Called every now and then; an exception it raises ends the fitting, which is how to cancel."""


@dataclass(frozen=True, slots=True)
class RQKMeansSettings:
    """How to fit an RQ-KMeans tokenizer.

    Attributes:
        num_levels: L.
        codebook_size: K.
        style: see :data:`CodebookStyle`.
        epochs: most Lloyd passes a level over the sample; fewer once they stop helping.
        full_passes: passes a level over all rows, where the sample does not hold them all.
        sample_rows: rows in memory; None for 131,072 or 32 a code, whichever is more.
        tolerance: a level is done when a pass lowers its error by less than this share.
        separation_dims: dimensions of the last level, style ``separating`` only. Fewer leave
            fewer collisions, more keep more of the vectors' structure in the last code.
        seed: of every draw.

    Raises:
        ValueError: a value outside its range.
    """

    num_levels: int = 3
    codebook_size: int = 256
    style: CodebookStyle = "separating"
    epochs: int = 20
    full_passes: int = 1
    sample_rows: int | None = None
    tolerance: float = 1e-4
    separation_dims: int = 2
    seed: int = 42

    def __post_init__(self) -> None:
        check_at_least_one(
            num_levels=self.num_levels,
            codebook_size=self.codebook_size,
            epochs=self.epochs,
            sample_rows=self.resolved_sample_rows,
            separation_dims=self.separation_dims,
        )
        if self.full_passes < 0:
            raise ValueError(f"full_passes is {self.full_passes}; it must be at least 0")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"tolerance is {self.tolerance}; allowed are 0 to below 1")
        if self.style not in CODEBOOK_STYLES:
            raise ValueError(f"style is {self.style!r}; allowed are {', '.join(CODEBOOK_STYLES)}")

    @property
    def resolved_sample_rows(self) -> int:
        """Rows held in memory at most."""
        if self.sample_rows is not None:
            return self.sample_rows
        return max(_SAMPLE_ROWS, _SAMPLE_ROWS_PER_CODE * self.codebook_size)


@dataclass(frozen=True, slots=True)
class RQVAETraining:
    """How to train an RQ-VAE.

    Attributes:
        epochs: passes over all rows.
        batch_size: rows of a step.
        learning_rate: of Adam (Kingma and Ba, 2015).
        weight_decay: decoupled, as in AdamW (Loshchilov and Hutter, 2019).
        shuffle_rows: rows in memory, shuffled among themselves.
        seed: of the weights and every draw.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int = 50
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    shuffle_rows: int = 131_072
    seed: int = 42

    def __post_init__(self) -> None:
        check_at_least_one(
            epochs=self.epochs, batch_size=self.batch_size, shuffle_rows=self.shuffle_rows
        )
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be finite and > 0")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be finite and >= 0")


def fit_rq_kmeans(
    batches: Iterable[Batch],
    settings: RQKMeansSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> RQKMeansTokenizer:
    """Fit an RQ-KMeans tokenizer, level by level.

    One pass over the rows draws a uniform sample; each level is seeded by k-means++ and fitted by
    Lloyd passes on the sample, then refined by passes over all rows if the sample is not all of
    them already. Codes without a row are restarted after every pass.

    Args:
        batches: (B, D) each, tensors or arrays; read 1 + L * full_passes times at most.
        settings: default :class:`RQKMeansSettings`.
        device: where to compute; the tokenizer stays there.
        on_progress: see :data:`ProgressCallback`.

    Raises:
        TypeError, ValueError: batches that are unreadable, empty, of different widths, or hold
            NaN or infinite values; batches whose number of rows changes between passes.
    """
    settings = RQKMeansSettings() if settings is None else settings
    report = on_progress or _no_progress
    generator = torch.Generator().manual_seed(settings.seed)

    def sampled() -> Iterator[Tensor]:
        rows = 0
        for batch in checked_batches(batches):
            yield batch
            rows += batch.shape[0]
            report(FitProgress("sampling", 0.0, rows))

    sample, num_rows = reservoir_sample(
        sampled(), settings.resolved_sample_rows, np.random.default_rng(settings.seed)
    )
    sample = sample.to(device)
    dim = sample.shape[1]
    full_passes = settings.full_passes if num_rows > sample.shape[0] else 0
    # What a pass costs, in rows: the unit of progress.
    level_work = settings.epochs * sample.shape[0] + full_passes * num_rows
    codebooks: list[Tensor] = []
    counts: list[Tensor] = []
    residual = sample
    sample_codes = torch.empty(sample.shape[0], 0, dtype=torch.long, device=sample.device)

    loss: float | None = None

    def tell(level: int, work: int, rows: int, loss: float | None) -> None:
        stage = f"level {level + 1} of {settings.num_levels}"
        fraction = (level + work / level_work) / settings.num_levels
        report(FitProgress(stage, min(fraction, 1.0), rows, loss))

    for level in range(settings.num_levels):
        fit = _level_fit(settings, level, residual, sample_codes, generator)
        loss = None
        for epoch in range(settings.epochs):
            for rows in residual.split(_OBSERVED_ROWS):
                fit.observe(rows)
            previous: float | None = loss
            summary = fit.finish_pass()
            loss = summary.error
            tell(level, (epoch + 1) * residual.shape[0], 0, loss)
            settled = previous is not None and previous - loss <= settings.tolerance * previous
            if settled and not summary.restarted:
                break

        for full_pass in range(full_passes):
            done = settings.epochs * residual.shape[0] + full_pass * num_rows
            read = 0
            for batch in checked_batches(batches, dim):
                fit.observe(_left_over(batch.to(device), codebooks))
                read += batch.shape[0]
                tell(level, done + read, read, loss)
            if read != num_rows:
                raise ValueError(f"batches had {num_rows} rows at first and {read} rows later")
            loss = fit.finish_pass().error

        codebooks.append(fit.codebook)
        counts.append(fit.counts)
        nearest = residual_quantize(residual, [codebooks[-1]])
        residual = residual - codebooks[-1][nearest.squeeze(1)]
        sample_codes = torch.cat([sample_codes, nearest], dim=1)

    report(FitProgress("done", 1.0, num_rows, loss))
    return RQKMeansTokenizer.from_codebooks(codebooks, counts, seed=settings.seed)


def _level_fit(
    settings: RQKMeansSettings,
    level: int,
    residual: Tensor,
    codes: Tensor,
    generator: torch.Generator,
) -> LloydFit:
    """The kind of codebook that this level gets, seeded."""
    size = settings.codebook_size
    if level == 0 or settings.style == "kmeans":
        return MeansFit(residual, size, generator)
    if settings.style == "separating" and level == settings.num_levels - 1:
        basis = separating_basis(residual, codes, settings.separation_dims)
        if basis is not None:
            return SeparatingFit(residual, size, generator, basis)
    return EqualNormFit(residual, size, generator)


def _left_over(rows: Tensor, codebooks: list[Tensor]) -> Tensor:
    """What the given levels leave of rows (B, D)."""
    if codebooks:
        codes = residual_quantize(rows, codebooks)
        for level, codebook in enumerate(codebooks):
            rows = rows - codebook[codes[:, level]]
    return rows


def fit_rqvae(
    batches: Iterable[Batch],
    config: RQVAEConfig,
    training: RQVAETraining | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> RQVAETokenizer:
    """Train an RQ-VAE by AdamW on ``mse_loss(recon, x) + commitment_loss``.

    Args:
        batches: (B, input_dim) each, tensors or arrays; read once an epoch.
        config: of the model.
        training: default :class:`RQVAETraining`.
        device: where to compute; the tokenizer stays there, in evaluation mode.
        on_progress: see :data:`ProgressCallback`.

    Raises:
        TypeError, ValueError: batches that are unreadable, empty, of another width, or hold NaN
            or infinite values.
        RuntimeError: training diverged: the loss became NaN or infinite.
    """
    training = RQVAETraining() if training is None else training
    report = on_progress or _no_progress
    generator = torch.Generator().manual_seed(training.seed)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    # Weights, seeds and restarts draw from torch's own generator; the caller's state is kept.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(training.seed)
        model = RQVAETokenizer.from_config(config).to(device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        num_rows: int | None = None
        for epoch in range(training.epochs):
            stage = f"epoch {epoch + 1} of {training.epochs}"
            rows, loss = 0, float("nan")
            for batch in shuffled_batches(
                checked_batches(batches, config.input_dim),
                training.batch_size,
                training.shuffle_rows,
                generator,
            ):
                loss = _train_step(model, optimizer, batch.to(device))
                rows += batch.shape[0]
                share = rows / num_rows if num_rows else 0.0
                fraction = (epoch + min(share, 1.0)) / training.epochs
                report(FitProgress(stage, fraction, rows, loss))
            if not rows:
                raise ValueError("batches have no rows; fitting needs at least 1")
            num_rows = rows
        report(FitProgress("done", 1.0, rows, loss))
    model._fitted = True
    return model.eval()


def _train_step(model: RQVAETokenizer, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    out = model(batch)
    loss = F.mse_loss(out.recon, batch) + out.commitment_loss
    value = float(loss.detach())
    if not np.isfinite(value):
        raise RuntimeError(f"the loss became {value}; lower the learning rate or scale the vectors")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value


def _no_progress(progress: FitProgress) -> None:
    """For callers that do not ask."""
