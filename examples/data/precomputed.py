"""Files of token sequences, made once and trained on many times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rectokens.tokenizers.checkpoint import write_checkpoint

_SIZES = ("original_vocab_size", "num_levels", "codebook_size")


def write_samples(
    path: str | PathLike[str],
    samples: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    original_vocab_size: int,
    num_levels: int,
    codebook_size: int,
    meta: dict[str, Any],
) -> int:
    """Write a file of samples; it appears whole or not at all.

    All ids lie in one tensor, of which the samples are views: a file of 100,000 samples is then
    written and read in seconds.

    Args:
        path: parents are created.
        samples: ids and labels of each, equally long.
        original_vocab_size: tokens of the model before those of items.
        num_levels: L.
        codebook_size: K.
        meta: what else is to be known of them: plain values and tensors.

    Returns:
        How many samples were written.

    Raises:
        ValueError: a sample whose ids and labels are not equally long.
    """
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for number, (sample_ids, sample_labels) in enumerate(samples):
        if len(sample_ids) != len(sample_labels):
            raise ValueError(
                f"sample {number} has {len(sample_ids)} ids and {len(sample_labels)} labels; "
                "they must be equally many"
            )
        ids += sample_ids
        labels += sample_labels
        lengths.append(len(sample_ids))
    parts = zip(
        torch.tensor(ids, dtype=torch.long).split(lengths),
        torch.tensor(labels, dtype=torch.long).split(lengths),
        strict=True,
    )
    write_checkpoint(
        path,
        {
            "samples": [{"input_ids": one, "labels": label} for one, label in parts],
            "original_vocab_size": original_vocab_size,
            "num_levels": num_levels,
            "codebook_size": codebook_size,
            "meta": meta,
        },
    )
    return len(lengths)


class PrecomputedSequenceDataset(Dataset[dict[str, Tensor]]):
    """Samples of a file that :func:`write_samples` wrote.

    Attributes:
        samples: as in the file.
        original_vocab_size: tokens of the model before those of items.
        num_levels: L.
        codebook_size: K.
        meta: what else the file says of them. Sequence files have ``user_ids`` (long, one a
            sample), ``targets`` (row of the item to predict), ``histories`` (long (S, T), rows,
            padded with -1) and ``templates`` (names, one a sample); item files have ``targets``
            and ``templates``.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, or holds no samples of this form.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        path = Path(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch reports damage by many types
            raise ValueError(f"{path} is no readable sample file: {error}") from error
        wanted = ("samples", *_SIZES)
        missing = [name for name in wanted if not isinstance(content, dict) or name not in content]
        if missing:
            raise ValueError(f"{path} is no sample file: it has no {', '.join(missing)}")
        for name in _SIZES:
            if not isinstance(content[name], int) or content[name] < 1:
                raise ValueError(f"{path}: {name} is {content[name]!r}; expected an int above 0")
        self.samples: list[dict[str, Tensor]] = content["samples"]
        self.original_vocab_size: int = content["original_vocab_size"]
        self.num_levels: int = content["num_levels"]
        self.codebook_size: int = content["codebook_size"]
        self.meta: dict[str, Any] = content.get("meta", {})
        for number, sample in enumerate(self.samples):
            ids, labels = sample["input_ids"], sample["labels"]
            if ids.ndim != 1 or ids.shape != labels.shape:
                raise ValueError(
                    f"{path}: sample {number} has ids of shape {tuple(ids.shape)} and labels of "
                    f"shape {tuple(labels.shape)}; expected the same 1-D shape"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of a sample, 1-D long."""
        sample = self.samples[index]
        return {"input_ids": sample["input_ids"], "labels": sample["labels"]}
