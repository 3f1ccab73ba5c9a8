"""A user a row, with what came before and what came next."""

from __future__ import annotations

from os import PathLike
from typing import Literal, get_args

import torch
from torch.utils.data import Dataset

from examples.data.batch import PADDING, SeqBatch, padded
from examples.data.reviews import AmazonReviews

SeqSplit = Literal["train", "eval", "test"]


class UserSequenceDataset(Dataset[SeqBatch]):
    """A user a row, with what came before and what came next.

    A row is ``(user_id, ids, ids_fut, x, x_fut, seq_mask)``, a :class:`SeqBatch` without the
    leading dimension. ``train`` rows hold nothing of the last two items of a user, ``eval`` rows
    nothing of the last. Training rows without any history are left out.

    Attributes:
        reviews: the data.
        user_ids: long (U,), of the rows.
        ids: long (U, T), histories, -1 at padding.
        ids_fut: long (U,), what came next.
        without_history: users left out because training may see only one of their items.

    Args:
        root: as of :class:`AmazonReviews`, or such data.
        split: as of :class:`AmazonReviews`.
        seq_split: ``train``, ``eval`` or ``test``.
        max_seq_len: T, the newest items kept of a history.

    Raises:
        ValueError: an unknown ``seq_split``, or ``max_seq_len`` below 1; as
            :class:`AmazonReviews` otherwise.
    """

    def __init__(
        self,
        root: str | PathLike[str] | AmazonReviews,
        split: str = "beauty",
        seq_split: SeqSplit = "train",
        max_seq_len: int = 20,
    ) -> None:
        if seq_split not in get_args(SeqSplit):
            allowed = ", ".join(map(repr, get_args(SeqSplit)))
            raise ValueError(f"seq_split is {seq_split!r}; allowed are {allowed}")
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len is {max_seq_len}; it must be at least 1")
        self.reviews = root if isinstance(root, AmazonReviews) else AmazonReviews(root, split)
        parts = self.reviews.leave_one_out
        questions: list[tuple[tuple[int, ...], int]]
        if seq_split == "train":
            questions = [(part[:-1], part[-1]) for part in parts.train]
        else:
            held_out = parts.validation if seq_split == "eval" else parts.test
            questions = [(one.history, one.target) for one in held_out]
        users = self.reviews.histories["train"]["userId"].tolist()
        rows = [(user, *one) for user, one in zip(users, questions, strict=True) if one[0]]
        self.without_history = len(questions) - len(rows)
        self.user_ids = torch.tensor([user for user, _, _ in rows], dtype=torch.long)
        ids = [padded(history, max_seq_len) for _, history, _ in rows]
        self.ids = torch.stack(ids) if ids else torch.empty(0, max_seq_len, dtype=torch.long)
        self.ids_fut = torch.tensor([following for _, _, following in rows], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.user_ids)

    def __getitem__(self, index: int) -> SeqBatch:
        """A user: shapes (), (T,), (), (T, D), (D,), (T,)."""
        ids, following = self.ids[index], self.ids_fut[index]
        mask = ids != PADDING
        x = self.reviews.x
        return SeqBatch(
            user_ids=self.user_ids[index],
            ids=ids,
            ids_fut=following,
            x=x[ids.clamp(min=0)] * mask.unsqueeze(-1),
            x_fut=x[following],
            seq_mask=mask,
        )
