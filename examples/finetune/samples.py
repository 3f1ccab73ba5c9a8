"""Samples on their way into batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening

from examples.data.precomputed import PrecomputedSequenceDataset
from rectokens.integrations.hf.collator import IGNORED_LABEL, LossOn, PrecomputedSequenceCollator

_log = logging.getLogger(__name__)


class TrainingSamples(Dataset[dict[str, Tensor]]):
    """Samples that are short enough, with the labels that are wanted.

    Attributes:
        kept: which of the file's samples these are.

    Args:
        samples: of a file.
        max_length: longer ones are left out and counted; cut short they would lose their answer.
        loss_on: ``all`` of the answer, its ``items`` (start, codes, end) or its ``text`` alone.
        name: of the file, for messages.

    Raises:
        ValueError: no sample is short enough and has a label.
    """

    def __init__(
        self, samples: PrecomputedSequenceDataset, max_length: int, loss_on: LossOn, name: str
    ) -> None:
        if loss_on not in ("all", "items", "text"):
            raise ValueError(f"loss_on is {loss_on!r}; allowed are 'all', 'items', 'text'")
        self._samples, self._loss_on = samples, loss_on
        short = [at for at in range(len(samples)) if len(samples[at]["input_ids"]) <= max_length]
        self.kept = [at for at in short if bool((self._labels(at) != IGNORED_LABEL).any())]
        if not self.kept:
            raise ValueError(
                f"{name}: none of the {len(samples)} samples has at most {max_length} tokens "
                f"(max_length) and something to learn with loss_on {loss_on!r}"
            )
        if len(short) < len(samples):
            _log.warning(
                "%s: %d of %d samples are longer than %d tokens (max_length) and are left out",
                name,
                len(samples) - len(short),
                len(samples),
                max_length,
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of a sample, 1-D long."""
        at = self.kept[index]
        return {"input_ids": self._samples[at]["input_ids"], "labels": self._labels(at)}

    def _labels(self, at: int) -> Tensor:
        sample = self._samples[at]
        labels = sample["labels"]
        if self._loss_on == "all":
            return labels
        is_item = sample["input_ids"] >= self._samples.original_vocab_size
        return labels.masked_fill(is_item if self._loss_on == "text" else ~is_item, IGNORED_LABEL)


def collator(*, packing: bool, pad_token_id: int) -> Any:
    """Makes batches of samples.

    Args:
        packing: all samples of a batch in one row without padding; positions begin anew with
            each, and attention does not look across. Otherwise a row each, padded on the right.
        pad_token_id: id at padding.
    """
    if packing:
        return DataCollatorWithFlattening()
    return PrecomputedSequenceCollator(pad_token_id)


def begins_with_item(samples: PrecomputedSequenceDataset, start: int) -> Iterable[tuple[int, int]]:
    """Samples whose answer begins with an item, and where the answer begins.

    Args:
        samples: of a file.
        start: id of the item start token.
    """
    for at in range(len(samples)):
        labels = samples[at]["labels"]
        answer = torch.nonzero(labels != IGNORED_LABEL)
        if len(answer) and int(labels[answer[0]]) == start:
            yield at, int(answer[0])
