"""What both tokenizer scripts do: measure, log, and leave an artifact behind."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from examples.data.amazon import AmazonReviews, ItemData, SeqBatch
from examples.data.items import ItemSplit
from rectokens.artifacts.tokenizer import save_tokenizer
from rectokens.cli.inspect import render
from rectokens.cli.summary import summarize
from rectokens.core.atomic_file import atomic_file
from rectokens.tokenizers.quality import quality_report
from rectokens.tokenizers.residual import ResidualTokenizer
from server.demo.data import item_counts

StepFn = Callable[[SeqBatch], tuple[Tensor, Tensor, Tensor]]
"""A batch to its reconstruction and commitment loss, 0-d, and its codes (B, L)."""

_NOT_DECISIVE = (
    "root",
    "output_dir",
    "log_every",
    "save_every",
    "eval_every_n",
    "wandb_project",
    "profile",
)


def recon_loss(recon: Tensor, x: Tensor) -> Tensor:
    """Mean squared error, 0-d, of vectors (B, D)."""
    return F.mse_loss(recon, x)


@torch.no_grad()
def run_eval(
    loader: Iterable[SeqBatch], step_fn: StepFn, num_levels: int, codebook_size: int
) -> dict[str, Any]:
    """Figures over all batches of a loader.

    Args:
        loader: batches of items.
        step_fn: see :data:`StepFn`; a tokenizer that learns must be in evaluation mode.
        num_levels: L.
        codebook_size: K.

    Returns:
        ``avg_recon`` and ``avg_commit``, means over rows; ``p_unique``, distinct semantic IDs
        over rows; ``entropies``, L entropies of the codes' shares in bits, at most log2 K.

    Raises:
        ValueError: no batches, or codes that are not L of K.
    """
    recon_sum = commit_sum = 0.0
    parts: list[Tensor] = []
    for batch in loader:
        recon, commit, codes = step_fn(batch)
        rows = codes.shape[0]
        recon_sum += float(recon) * rows
        commit_sum += float(commit) * rows
        parts.append(codes.cpu())
    if not parts:
        raise ValueError("the loader has no batches; figures need at least one")
    codes = torch.cat(parts)
    if (
        codes.shape[1] != num_levels
        or not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size
    ):
        raise ValueError(
            f"codes have shape {tuple(codes.shape)} and reach {int(codes.max())}; expected "
            f"{num_levels} levels of codes below {codebook_size}"
        )
    counts = torch.stack([column.bincount(minlength=codebook_size) for column in codes.unbind(1)])
    shares = counts.double() / len(codes)
    return {
        "avg_recon": recon_sum / len(codes),
        "avg_commit": commit_sum / len(codes),
        "p_unique": len(torch.unique(codes, dim=0)) / len(codes),
        "entropies": (
            -torch.special.xlogy(shares, shares).sum(dim=1) / torch.log(torch.tensor(2.0))
        )
        .clamp(min=0.0)
        .tolist(),
    }


def check_epochs(**epochs: int) -> None:
    """Refuse intervals and numbers of epochs that make no sense; 0 turns an interval off.

    Raises:
        ValueError: ``num_epochs`` below 1 or another one below 0.
    """
    for name, value in epochs.items():
        least = 1 if name == "num_epochs" else 0
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def item_parts(
    reviews: AmazonReviews, train_test_split: ItemSplit, **features: Any
) -> dict[ItemSplit, ItemData]:
    """All items, those to learn from by this split, and those left out for evaluation.

    Args:
        reviews: the data.
        train_test_split: what to learn from.
        features: as of :class:`~examples.data.items.ItemData`.

    Raises:
        ValueError: an unknown split, or features outside their range.
    """
    parts: set[ItemSplit] = {"all", "eval", train_test_split}
    return {part: ItemData(reviews, train_test_split=part, **features) for part in parts}


def batches_in_order(items: ItemData, batch_size: int) -> DataLoader[SeqBatch]:
    """Batches of items, each by one indexing."""
    sampler = BatchSampler(SequentialSampler(items), batch_size=batch_size, drop_last=False)
    return DataLoader(items, sampler=sampler, batch_size=None)


def shuffled_batches(
    items: ItemData, batch_size: int, generator: torch.Generator
) -> DataLoader[SeqBatch]:
    """The same in a new order at every pass."""
    order = RandomSampler(items, generator=generator)
    sampler = BatchSampler(order, batch_size=batch_size, drop_last=False)
    return DataLoader(items, sampler=sampler, batch_size=None)


def is_due(epoch: int, every: int) -> bool:
    """Whether something that happens every so many epochs, from 1, happens at this one."""
    return every > 0 and epoch % every == 0


class MetricLog:
    """Figures by epoch: ``metrics.csv``, TensorBoard, and Weights & Biases on request.

    Args:
        folder: gets ``metrics.csv`` (epoch, name, value) and ``tensorboard``.
        wandb_project: also log there; None does not.
        config: told to Weights & Biases.

    Raises:
        ValueError: ``wandb_project`` is given and the package is not installed.
    """

    def __init__(
        self,
        folder: Path,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._wandb: Any = None
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ValueError(
                    f"wandb_project is {wandb_project!r}, but wandb is not installed: "
                    "pip install 'rectokens[wandb]', or leave wandb_project None"
                ) from error
            self._wandb = wandb.init(project=wandb_project, config=dict(config or {}))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "metrics.csv", "w", newline="")  # noqa: SIM115  see __exit__
        self._csv = csv.writer(self._file)
        self._csv.writerow(["epoch", "name", "value"])
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """Log numbers; a list becomes one figure for each level."""
        flat: dict[str, float] = {}
        for name, value in figures.items():
            if isinstance(value, list):
                flat |= {f"{name}/{level}": one for level, one in enumerate(value)}
            else:
                flat[name] = value
        self._csv.writerows([epoch, name, f"{value:.6g}"] for name, value in flat.items())
        self._file.flush()
        for name, value in flat.items():
            self._board.add_scalar(name, value, epoch)
        if self._wandb is not None:
            self._wandb.log({"epoch": epoch, **flat})


def finish(
    tokenizer: ResidualTokenizer, items: ItemData, output_dir: Path, settings: Mapping[str, Any]
) -> Path:
    """Write ``final.pt`` and an artifact in ``tokenizers``, measured on all items; print it.

    Also written is what ``python -m rectokens build-catalog`` needs besides: ``item_vectors.npy``,
    and ``items.parquet`` with ids, metadata, and how often training parts have an item.

    Args:
        tokenizer: fitted.
        items: all items of the data, of the features that the tokenizer was fitted on.
        output_dir: of the script.
        settings: parameters of the script, JSON values; where it reads and writes and what it
            logs is left out of the artifact, whose version is then that of its content.

    Returns:
        The artifact folder.
    """
    decisive = {name: value for name, value in settings.items() if name not in _NOT_DECISIVE}
    tokenizer = tokenizer.to("cpu").eval()
    tokenizer.save(output_dir / "final.pt")  # type: ignore[attr-defined]
    path = save_tokenizer(
        output_dir / "tokenizers",
        tokenizer,
        report=quality_report(tokenizer, [items.x]),
        fitted_on={"data": items.reviews.folder.name, "settings": decisive},
    )
    write_items(items, output_dir)
    render(summarize(path, verify=False), Console())
    return path


def write_items(items: ItemData, folder: Path) -> None:
    """Write ``item_vectors.npy``, float32 (N, D), and ``items.parquet``, row for row.

    Args:
        items: all items of the data.
        folder: where to.
    """
    reviews = items.reviews
    counts = item_counts(reviews.leave_one_out.train, reviews.num_items)
    table = reviews.data.metadata.with_columns(
        pl.Series("item_id", reviews.item_ids), pl.Series("popularity", counts)
    )
    with atomic_file(folder / "item_vectors.npy") as partial:
        np.save(partial, items.x.numpy())
    with atomic_file(folder / "items.parquet") as partial:
        table.write_parquet(partial)
