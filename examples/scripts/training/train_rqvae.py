"""Trains an RQ-VAE tokenizer on the items of a data set; takes a gin file.

Writes ``epoch_{n}.pt``, ``final.pt`` and a tokenizer artifact that ``python -m rectokens inspect``
shows. ``python -m examples.scripts.training.train_rqvae
examples/configs/pretraining/train_rqvae_beauty.gin``
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gin
import torch
from torch import Tensor

from examples.data.amazon import AmazonReviews, SeqBatch
from examples.data.items import ItemSplit
from examples.data.reviews import Features
from examples.scripts.training.utils import (
    MetricLog,
    StepFn,
    batches_in_order,
    check_epochs,
    finish,
    is_due,
    item_parts,
    recon_loss,
    run_eval,
    shuffled_batches,
)
from examples.utils import run
from rectokens.cli.progress import progress_bar
from rectokens.core.validation import check_at_least_one
from rectokens.tokenizers.rqvae import RQVAETokenizer

_PROFILED_EPOCHS = 3
_log = logging.getLogger(__name__)


@gin.configurable
def train(
    root: str = "data/amazon",
    split: str = "beauty",
    train_test_split: ItemSplit = "train",
    num_levels: int = 3,
    codebook_size: int = 256,
    latent_dim: int = 64,
    hidden_dim: int = 512,
    num_epochs: int = 100,
    batch_size: int = 640,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    log_every: int = 1,
    save_every: int = 10,
    eval_every_n: int = 0,
    output_dir: str = gin.REQUIRED,
    learnable_codebook: bool = False,
    profile: bool = False,
    wandb_project: str | None = None,
    seed: int = 42,
    features: Features = "text",
    behaviour_weight: float = 1.0,
    behaviour_dims: int = 128,
) -> Path:
    """Train a tokenizer by AdamW, on a GPU where there is one.

    Args:
        root: folder of the data.
        split: ``beauty``, ``sports`` or ``toys``.
        train_test_split: items to train on, see :class:`~examples.data.items.ItemData`.
        num_levels: L.
        codebook_size: K.
        latent_dim: width of what is quantized.
        hidden_dim: width of inner layers.
        num_epochs: passes over the items.
        batch_size: items of a step.
        lr: of AdamW.
        weight_decay: of AdamW.
        log_every: epochs between logged figures; 0 logs none.
        save_every: epochs between ``epoch_{n}.pt``; 0 writes none.
        eval_every_n: epochs between evaluations on the items left out; 0 for none.
        output_dir: where to.
        learnable_codebook: train the codebooks by gradients, not by moving averages.
        profile: write a trace of three epochs to ``profile`` in ``output_dir``, for TensorBoard
            or a browser's trace viewer.
        wandb_project: log to Weights & Biases too; None does not.
        seed: of the weights and every draw.
        features: of the item vectors; this and the next two as of
            :meth:`~examples.data.reviews.AmazonReviews.vectors`.
        behaviour_weight: norm of the behaviour vectors.
        behaviour_dims: of the behaviour vectors.

    Returns:
        The tokenizer artifact.

    Raises:
        ValueError: a parameter outside its range; the loss became NaN or infinite.
        DataFolderError, OSError: data that cannot be read; a full disk.
    """
    settings = dict(locals())
    check_at_least_one(
        num_levels=num_levels,
        codebook_size=codebook_size,
        latent_dim=latent_dim,
        hidden_dim=hidden_dim,
        batch_size=batch_size,
    )
    check_epochs(
        num_epochs=num_epochs, log_every=log_every, save_every=save_every, eval_every_n=eval_every_n
    )
    if not 0.0 < lr < float("inf") or not 0.0 <= weight_decay < float("inf"):
        raise ValueError(
            f"lr is {lr} and weight_decay {weight_decay}; they must be finite, lr > 0, "
            "weight_decay >= 0"
        )
    items = item_parts(
        AmazonReviews(root, split),
        train_test_split,
        features=features,
        behaviour_weight=behaviour_weight,
        behaviour_dims=behaviour_dims,
    )
    trained_on = items[train_test_split]
    folder = Path(output_dir)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = RQVAETokenizer(
        trained_on.x.shape[1],
        latent_dim,
        hidden_dim,
        num_levels,
        codebook_size,
        learnable_codebook=learnable_codebook,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    with (
        MetricLog(folder, wandb_project, settings) as log,
        progress_bar("training", num_epochs) as show,
        _profiler(folder if profile else None) as profiled,
    ):
        for epoch in range(1, num_epochs + 1):
            model.train()
            loss = _epoch(model, optimizer, shuffled_batches(trained_on, batch_size, generator))
            profiled.step()
            if not math.isfinite(loss):
                raise ValueError(f"the loss became {loss} in epoch {epoch}; lower lr, now {lr}")
            show(epoch, f"training: loss {loss:.4g}")
            model.eval()
            if is_due(epoch, log_every):
                log.write(epoch, {"train/loss": loss})
                _log.info("epoch %d: loss %.4g", epoch, loss)
            if is_due(epoch, eval_every_n) and len(items["eval"]):
                figures = run_eval(
                    batches_in_order(items["eval"], batch_size),
                    _step(model),
                    num_levels,
                    codebook_size,
                )
                log.write(epoch, {f"eval/{name}": value for name, value in figures.items()})
                _log.info(
                    "epoch %d, items left out: error %.3g, %.4f of semantic IDs distinct",
                    *(epoch, figures["avg_recon"], figures["p_unique"]),
                )
            if is_due(epoch, save_every):
                model.save(folder / f"epoch_{epoch}.pt")
    model._fitted = True
    return finish(model, items["all"], folder, settings)


def _epoch(
    model: RQVAETokenizer,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[SeqBatch] | torch.utils.data.DataLoader[SeqBatch],
) -> float:
    """Mean loss over the steps of a pass."""
    device = next(model.parameters()).device
    losses = []
    for batch in batches:
        x = batch.x.to(device)
        out = model(x)
        loss = recon_loss(out.recon, x) + out.commitment_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def _step(model: RQVAETokenizer) -> StepFn:
    device = next(model.parameters()).device

    def step(batch: SeqBatch) -> tuple[Tensor, Tensor, Tensor]:
        x = batch.x.to(device)
        out = model(x)
        return recon_loss(out.recon, x), out.commitment_loss, out.codes

    return step


class _NoProfiler:
    """Stands in where nothing is profiled."""

    def step(self) -> None:
        """Do nothing."""


@contextmanager
def _profiler(folder: Path | None) -> Iterator[_NoProfiler | torch.profiler.profile]:
    """A trace of the epochs after the first, which warms up."""
    if folder is None:
        yield _NoProfiler()
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=_PROFILED_EPOCHS, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "profile")),
    ) as profiled:
        yield profiled


if __name__ == "__main__":
    run(train)
