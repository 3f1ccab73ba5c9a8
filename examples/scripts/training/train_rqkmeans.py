"""Fits an RQ-KMeans tokenizer to the items of a data set; takes a gin file.

Writes ``epoch_{n}.pt``, ``final.pt`` and a tokenizer artifact that ``python -m rectokens inspect``
shows. ``python -m examples.scripts.training.train_rqkmeans
examples/configs/pretraining/train_rqkmeans_beauty.gin``
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import gin
import torch

from examples.data.amazon import AmazonReviews, ItemData, SeqBatch
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
from rectokens.tokenizers.fitting import (
    CODEBOOK_STYLES,
    CodebookStyle,
    FitProgress,
    RQKMeansSettings,
    fit_rq_kmeans,
)
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer

Style = Literal["minibatch"] | CodebookStyle
STYLES = ("minibatch", *CODEBOOK_STYLES)
_log = logging.getLogger(__name__)


@gin.configurable
def train(
    root: str = "data/amazon",
    split: str = "beauty",
    train_test_split: ItemSplit = "train",
    num_levels: int = 3,
    codebook_size: int = 256,
    num_epochs: int = 20,
    batch_size: int = 640,
    log_every: int = 1,
    save_every: int = 5,
    eval_every_n: int = 0,
    output_dir: str = gin.REQUIRED,
    wandb_project: str | None = None,
    style: Style = "separating",
    separation_dims: int = 2,
    seed: int = 42,
    features: Features = "text",
    behaviour_weight: float = 1.0,
    behaviour_dims: int = 128,
) -> Path:
    """Fit a tokenizer.

    Args:
        root: folder of the data.
        split: ``beauty``, ``sports`` or ``toys``.
        train_test_split: items to fit to, see :class:`~examples.data.items.ItemData`.
        num_levels: L.
        codebook_size: K.
        num_epochs: passes over the items; the styles fitted level by level take so many a level
            at most, and fewer once they stop helping.
        batch_size: items of a step of style ``minibatch``, and of an evaluation.
        log_every: epochs between logged figures; 0 logs none.
        save_every: epochs between ``epoch_{n}.pt``; 0 writes none.
        eval_every_n: epochs between evaluations on the items left out; 0 for none.
        output_dir: where to.
        wandb_project: log to Weights & Biases too; None does not.
        style: ``minibatch``, one k-means step a batch and level, or one of
            :data:`~rectokens.tokenizers.fitting.CodebookStyle`, of which ``separating`` has the
            fewest collisions.
        separation_dims: of the last level, style ``separating`` only.
        seed: of every draw.
        features: of the item vectors; this and the next two as of
            :meth:`~examples.data.reviews.AmazonReviews.vectors`.
        behaviour_weight: norm of the behaviour vectors.
        behaviour_dims: of the behaviour vectors.

    Returns:
        The tokenizer artifact.

    Raises:
        ValueError: a parameter outside its range.
        DataFolderError, OSError: data that cannot be read; a full disk.
    """
    settings = dict(locals())
    check_at_least_one(num_levels=num_levels, codebook_size=codebook_size, batch_size=batch_size)
    check_epochs(
        num_epochs=num_epochs, log_every=log_every, save_every=save_every, eval_every_n=eval_every_n
    )
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; allowed are {', '.join(map(repr, STYLES))}")
    items = item_parts(
        AmazonReviews(root, split),
        train_test_split,
        features=features,
        behaviour_weight=behaviour_weight,
        behaviour_dims=behaviour_dims,
    )
    fitted_to = items[train_test_split]
    folder = Path(output_dir)

    def figures_of(part: ItemData, tokenizer: RQKMeansTokenizer) -> dict[str, float]:
        batches = batches_in_order(part, batch_size)
        return run_eval(batches, _step(tokenizer), num_levels, codebook_size)

    tokenizer: RQKMeansTokenizer | None = None
    with MetricLog(folder, wandb_project, settings) as log:
        if style == "minibatch":
            epochs = _minibatch_epochs(
                RQKMeansTokenizer(num_levels, codebook_size, fitted_to.x.shape[1], seed=seed),
                fitted_to,
                num_epochs,
                batch_size,
            )
        else:
            wanted = [
                epoch
                for epoch in range(1, num_epochs + 1)
                if epoch == num_epochs or is_due(epoch, save_every) or is_due(epoch, eval_every_n)
            ]
            how = RQKMeansSettings(
                num_levels, codebook_size, style, separation_dims=separation_dims, seed=seed
            )
            epochs = _level_epochs(fitted_to, how, wanted)
        for epoch, tokenizer in epochs:
            if is_due(epoch, log_every):
                figures = figures_of(fitted_to, tokenizer)
                log.write(epoch, {f"train/{name}": value for name, value in figures.items()})
                _log.info(
                    "epoch %d: error %.3g, %.4f of semantic IDs distinct",
                    *(epoch, figures["avg_recon"], figures["p_unique"]),
                )
            if is_due(epoch, eval_every_n) and len(items["eval"]):
                figures = figures_of(items["eval"], tokenizer)
                log.write(epoch, {f"eval/{name}": value for name, value in figures.items()})
                _log.info("epoch %d, items left out: error %.3g", epoch, figures["avg_recon"])
            if is_due(epoch, save_every):
                tokenizer.save(folder / f"epoch_{epoch}.pt")
    if tokenizer is None:
        raise ValueError("there were no epochs")
    return finish(tokenizer, items["all"], folder, settings)


def _minibatch_epochs(
    tokenizer: RQKMeansTokenizer, items: ItemData, num_epochs: int, batch_size: int
) -> Iterator[tuple[int, RQKMeansTokenizer]]:
    """One k-means step a batch and level, over all items in a new order every epoch."""
    generator = torch.Generator().manual_seed(tokenizer.seed)
    with progress_bar("fitting", num_epochs) as show:
        for epoch in range(1, num_epochs + 1):
            for batch in shuffled_batches(items, batch_size, generator):
                tokenizer.fit_step(batch.x)
            show(epoch)
            yield epoch, tokenizer


def _level_epochs(
    items: ItemData, settings: RQKMeansSettings, epochs: list[int]
) -> Iterator[tuple[int, RQKMeansTokenizer]]:
    """What so many passes a level make; each number of passes begins anew from the same seeds."""
    with progress_bar("fitting", sum(epochs)) as show:
        for at, epoch in enumerate(epochs):
            before = sum(epochs[:at])

            def tell(progress: FitProgress, before: int = before, epoch: int = epoch) -> None:
                show(before + progress.fraction * epoch, f"{epoch} passes, {progress.stage}")

            how = replace(settings, epochs=epoch)
            yield epoch, fit_rq_kmeans([items.x], how, on_progress=tell)


def _step(tokenizer: RQKMeansTokenizer) -> StepFn:
    def step(batch: SeqBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = tokenizer.encode(batch.x)
        return recon_loss(tokenizer.decode(tokens), batch.x), torch.zeros(()), tokens.codes

    return step


if __name__ == "__main__":
    run(train)
