"""Items alone: what tokenizers are fitted on."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset

from examples.data.batch import PADDING, SeqBatch
from examples.data.reviews import AmazonReviews, Features

ItemSplit = Literal["all", "train", "eval"]


class ItemData(Dataset[SeqBatch]):
    """Items alone, as a :class:`SeqBatch`.

    An index gives one item; a list, a slice or a tensor of indices a batch in one step.

    Attributes:
        reviews: the data.
        rows: long (M,), the items that are in it.
        x: float32 (M, D), their vectors.

    Args:
        root: as of :class:`AmazonReviews`, or such data.
        split: as of :class:`AmazonReviews`.
        train_test_split: ``all``, ``train`` (``is_train``) or ``eval`` (the others).
        features: what ``x`` is; this and the next two as of :meth:`AmazonReviews.vectors`.
        behaviour_weight: norm of the behaviour vectors.
        behaviour_dims: of the behaviour vectors.

    Raises:
        ValueError: an unknown ``train_test_split`` or ``features``; as :class:`AmazonReviews`
            otherwise.
    """

    def __init__(
        self,
        root: str | PathLike[str] | AmazonReviews,
        *,
        split: str = "beauty",
        train_test_split: ItemSplit = "all",
        features: Features = "text",
        behaviour_weight: float = 1.0,
        behaviour_dims: int = 128,
    ) -> None:
        if train_test_split not in get_args(ItemSplit):
            allowed = ", ".join(map(repr, get_args(ItemSplit)))
            raise ValueError(f"train_test_split is {train_test_split!r}; allowed are {allowed}")
        self.reviews = root if isinstance(root, AmazonReviews) else AmazonReviews(root, split)
        chosen = {
            "all": torch.ones_like(self.reviews.is_train),
            "train": self.reviews.is_train,
            "eval": ~self.reviews.is_train,
        }[train_test_split]
        self.rows = chosen.nonzero().squeeze(1)
        vectors = self.reviews.vectors(
            features, behaviour_weight=behaviour_weight, behaviour_dims=behaviour_dims
        )
        self.x = vectors[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> SeqBatch:
        """Items by their place in this data set."""
        ids = self.rows[index]
        x = self.x[index]
        nobody = torch.full_like(ids, PADDING)
        return SeqBatch(
            user_ids=nobody,
            ids=ids,
            ids_fut=nobody,
            x=x,
            x_fut=torch.zeros_like(x),
            seq_mask=torch.ones_like(ids, dtype=torch.bool),
        )
