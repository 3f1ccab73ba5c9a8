"""What the demo trains on, whatever it came from, and the leave-one-out split of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

MIN_SEQUENCE_LENGTH = 3
METADATA_COLUMNS = ("title", "brand", "category")


class DataFolderError(ValueError):
    """The data folder is missing, partial, or its files do not belong together."""


@dataclass(frozen=True, slots=True)
class DemoData:
    """Items, and what users did with them.

    Items are named by row: row r is ``item_ids[r]``, ``texts[r]``, ``embeddings[r]`` and row r
    of ``metadata``. (A catalog numbers its items anew; rows never leave the demo.)

    Attributes:
        name: of the data set, for reports.
        item_ids: N ids, unique.
        texts: N descriptions.
        embeddings: float32 (N, D), finite.
        sequences: one tuple of rows a user, oldest first.
        metadata: N rows with at least the text columns ``title``, ``brand`` and ``category``
            (levels separated by " > "); empty where unknown.
    """

    name: str
    item_ids: tuple[str, ...]
    texts: tuple[str, ...]
    embeddings: NDArray[np.float32]
    sequences: tuple[tuple[int, ...], ...]
    metadata: pl.DataFrame

    def __post_init__(self) -> None:
        items = len(self.item_ids)
        if items == 0:
            raise ValueError("the data has no items; at least one is needed")
        for name, size in (
            ("texts", len(self.texts)),
            ("embeddings", len(self.embeddings)),
            ("metadata", self.metadata.height),
        ):
            if size != items:
                raise ValueError(f"{name} has {size} rows; there are {items} item ids")
        if len(set(self.item_ids)) != items:
            raise ValueError(f"item ids repeat: {items - len(set(self.item_ids))} of {items}")
        missing = [column for column in METADATA_COLUMNS if column not in self.metadata.columns]
        if missing:
            raise ValueError(f"metadata lacks the columns {', '.join(missing)}")
        if not np.isfinite(self.embeddings).all():
            row = int((~np.isfinite(self.embeddings)).any(axis=1).argmax())
            raise ValueError(f"the embedding of item {self.item_ids[row]} is not finite")
        for user, sequence in enumerate(self.sequences):
            if sequence and not (min(sequence) >= 0 and max(sequence) < items):
                raise ValueError(
                    f"sequence {user} names rows {min(sequence)} to {max(sequence)}; "
                    f"allowed are 0 to {items - 1}"
                )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One question with a known answer: after ``history`` (rows, oldest first) came ``target``."""

    history: tuple[int, ...]
    target: int


@dataclass(frozen=True, slots=True)
class Split:
    """Leave one out: the last item of a user is test, the one before validation, the rest train.

    Attributes:
        train: what training may see of each user, at least one item each.
        validation: one question a user; its history is the training part.
        test: one question a user; its history is everything before the last item.
        skipped: users with fewer than three items, who are in none of the three.
    """

    train: tuple[tuple[int, ...], ...]
    validation: tuple[HeldOut, ...]
    test: tuple[HeldOut, ...]
    skipped: int


def leave_one_out(sequences: Sequence[Sequence[int]]) -> Split:
    """Split every user's sequence; users keep their order in all three parts."""
    usable = [tuple(sequence) for sequence in sequences if len(sequence) >= MIN_SEQUENCE_LENGTH]
    return Split(
        train=tuple(sequence[:-2] for sequence in usable),
        validation=tuple(HeldOut(sequence[:-2], sequence[-2]) for sequence in usable),
        test=tuple(HeldOut(sequence[:-1], sequence[-1]) for sequence in usable),
        skipped=len(sequences) - len(usable),
    )


def item_counts(train: Sequence[Sequence[int]], num_items: int) -> NDArray[np.int64]:
    """How often each row occurs in the training parts: int64 (N,)."""
    rows = np.fromiter((row for sequence in train for row in sequence), dtype=np.int64)
    return np.bincount(rows, minlength=num_items).astype(np.int64)
