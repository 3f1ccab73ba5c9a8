"""From examples to padded training batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer

IGNORED_LABEL = -100

LossOn = Literal["all", "items", "text"]


class InterleavedSequenceCollator:
    """Encodes sequences of texts and item vectors, and pads them to one batch.

    Labels equal the ids (transformers shifts them), but -100 at padding, at each sequence's
    first token, and at what ``loss_on`` leaves out.

    Args:
        item_tokenizer: encodes a sequence's parts.
        padding_side: ``"right"`` or ``"left"``.
        pad_token_id: id at padding.
        loss_on: ``"items"`` (item, start and end tokens), ``"text"`` (the others) or ``"all"``.
        max_length: longest sequence in tokens, of longer ones the beginning is kept; None: any.

    Raises:
        ValueError: an unknown ``padding_side`` or ``loss_on``, or ``max_length`` below 1.
    """

    def __init__(
        self,
        item_tokenizer: ItemAwareTokenizer,
        padding_side: str = "right",
        pad_token_id: int = 0,
        loss_on: LossOn = "all",
        max_length: int | None = None,
    ) -> None:
        _check_padding(padding_side, max_length)
        if loss_on not in get_args(LossOn):
            raise ValueError(
                f"loss_on is {loss_on!r}; allowed are {', '.join(map(repr, get_args(LossOn)))}"
            )
        self.item_tokenizer = item_tokenizer
        self.padding_side = padding_side
        self.pad_token_id = pad_token_id
        self.loss_on = loss_on
        self.max_length = max_length

    def __call__(self, batch: Sequence[Sequence[str | Tensor]]) -> dict[str, Tensor]:
        """Collate sequences.

        Args:
            batch: one list of parts (texts and item vectors (D,)) per sequence.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, long (B, longest).

        Raises:
            ValueError: an empty batch; as ``encode_sequence`` otherwise.
        """
        rows = []
        for parts in batch:
            ids = torch.tensor(self.item_tokenizer.encode_sequence(parts), dtype=torch.long)
            ids = ids[: self.max_length]
            labels = ids.clone()
            labels[:1] = IGNORED_LABEL
            is_item = ids >= self.item_tokenizer.original_vocab_size
            if self.loss_on == "items":
                labels[~is_item] = IGNORED_LABEL
            elif self.loss_on == "text":
                labels[is_item] = IGNORED_LABEL
            rows.append((ids, labels))
        return _pad(rows, self.pad_token_id, self.padding_side)


class PrecomputedSequenceCollator:
    """Pads sequences whose ids and labels were computed before.

    Args:
        pad_token_id: id at padding.
        max_length: longest sequence in tokens, of longer ones the beginning is kept; None: any.
        padding_side: ``"right"`` or ``"left"``.

    Raises:
        ValueError: an unknown ``padding_side``, or ``max_length`` below 1.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        max_length: int | None = None,
        padding_side: str = "right",
    ) -> None:
        _check_padding(padding_side, max_length)
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.padding_side = padding_side

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate samples.

        Args:
            batch: per sample ``input_ids`` and ``labels``, 1-D and of equal length.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, long (B, longest); the labels as
            given, -100 at padding.

        Raises:
            ValueError: an empty batch, or ids and labels that are not 1-D of equal length.
        """
        rows = []
        for sample in batch:
            ids, labels = (
                torch.as_tensor(sample[name], dtype=torch.long) for name in ("input_ids", "labels")
            )
            if ids.ndim != 1 or ids.shape != labels.shape:
                raise ValueError(
                    f"input_ids have shape {tuple(ids.shape)} and labels {tuple(labels.shape)}; "
                    "expected the same 1-D shape"
                )
            rows.append((ids[: self.max_length], labels[: self.max_length]))
        return _pad(rows, self.pad_token_id, self.padding_side)


def _check_padding(padding_side: str, max_length: int | None) -> None:
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side is {padding_side!r}; allowed are 'right', 'left'")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1, or None")


def _pad(rows: list[tuple[Tensor, Tensor]], pad_token_id: int, side: str) -> dict[str, Tensor]:
    """One batch of (ids, labels) pairs, each (length,)."""
    if not rows:
        raise ValueError("the batch is empty; expected at least one sequence")
    longest = max(ids.numel() for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, (ids, row_labels) in enumerate(rows):
        start = 0 if side == "right" else longest - ids.numel()
        span = slice(start, start + ids.numel())
        input_ids[row, span] = ids
        attention_mask[row, span] = 1
        labels[row, span] = row_labels
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
