"""Amazon reviews as items with vectors and users with histories, split by leave one out.

Of every user the last item is for the test, the one before for the evaluation while training,
and what comes before those is what training may see. Users with fewer than three items are
counted and left out. Items are named by row, from 0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from examples.data.batch import padded
from examples.data.download import DEFAULT_BASE_URL, download_folder
from examples.data.item_vectors import item_vectors
from examples.data.layout import FILES, candidates, check_split, find_folder
from examples.data.text_vectors import DEFAULT_TEXT_MODEL
from server.demo.amazon import load_amazon
from server.demo.data import DataFolderError, DemoData, Split, leave_one_out

Features = Literal["text", "text+collaborative"]
EVAL_LENGTH = 20

_TRAIN_SHARE = 0.95
_log = logging.getLogger(__name__)


class AmazonReviews:
    """A data set: items, and histories of users.

    The folder layout of :mod:`examples.data.layout` is read where ``root`` has it, directly or
    as ``amazon-{split}`` or ``{split}``; otherwise the 5-core files are downloaded, turned into
    that layout in ``root/amazon-{split}``, and read from there.

    Attributes:
        folder: that was read.
        item_ids: N ASINs.
        text: N descriptions: title, brand, category, price.
        x: float32 (N, D), embeddings of the texts.
        is_train: bool (N,), about 95 % of the items, drawn with ``seed``: what tokenizers are
            fitted on; the others show how they do on new items.
        histories: ``train``, ``eval`` and ``test``, each a dict of ``userId`` (long (U,), the
            user's line in the file, from 0), ``itemId`` and ``itemId_fut`` (long (U,)). Of
            ``train``, ``itemId`` is a list of long tensors, one a user, possibly empty; of the
            others it is long (U, 20), the newest items, -1 at padding. The future item of
            ``train`` is the last that training may see, of ``eval`` the second last of all, of
            ``test`` the last.
        skipped_users: users with fewer than three items.

    Args:
        root: folder of data sets, or of this one.
        split: ``beauty``, ``sports`` or ``toys``.
        download: whether data that is not there may be fetched.
        base_url: where the 5-core files lie.
        text_model: a sentence encoder, by name or folder, for data that was downloaded.
        seed: of ``is_train``.

    Raises:
        ValueError: an unknown split, or data in which no user has three items.
        DataFolderError: data that is missing, partial, damaged, or cannot be fetched.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        split: str = "beauty",
        *,
        download: bool = True,
        base_url: str = DEFAULT_BASE_URL,
        text_model: str = DEFAULT_TEXT_MODEL,
        seed: int = 42,
    ) -> None:
        check_split(split)
        root = Path(root)
        folder = find_folder(root, split)
        if folder is None:
            folder = candidates(root, split)[0]
            if not download:
                raise DataFolderError(
                    f"no data for {split!r}: neither {root} nor "
                    f"{' nor '.join(map(str, candidates(root, split)))} holds {', '.join(FILES)}"
                )
            download_folder(folder, split, base_url=base_url, text_model=text_model)
        self.folder = folder
        self.split = split
        self._set_data(load_amazon(folder), seed)

    @classmethod
    def from_data(cls, data: DemoData, *, split: str = "beauty", seed: int = 42) -> AmazonReviews:
        """The same views of data that is in memory already."""
        reviews = cls.__new__(cls)
        reviews.folder = Path(data.name)
        reviews.split = split
        reviews._set_data(data, seed)
        return reviews

    def _set_data(self, data: DemoData, seed: int) -> None:
        self.data = data
        # Taken apart once, though several views ask for it.
        self._behaviour: dict[tuple[float, int, int], Tensor] = {}
        self.item_ids = data.item_ids
        self.text = list(data.texts)
        self.x = torch.from_numpy(data.embeddings)
        draws = np.random.default_rng(seed).random(len(data.item_ids))
        self.is_train = torch.from_numpy(draws < _TRAIN_SHARE)
        self.leave_one_out: Split = leave_one_out(data.sequences)
        self.skipped_users = self.leave_one_out.skipped
        if not self.leave_one_out.train:
            raise ValueError(
                f"none of the {self.skipped_users} users of {self.folder} has three items; "
                "there is nothing to split"
            )
        if self.skipped_users:
            _log.warning("%d users with fewer than three items left out", self.skipped_users)
        self.histories = _histories(data.sequences, self.leave_one_out)

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.item_ids)

    def vectors(
        self,
        features: Features = "text",
        *,
        behaviour_weight: float = 1.0,
        behaviour_dims: int = 128,
        seed: int = 0,
    ) -> Tensor:
        """Vectors of all items for semantic IDs, float32 (N, D).

        Args:
            features: ``text``, the embeddings of :attr:`x`; ``text+collaborative``, those with
                behaviour vectors beside them, which come from the training parts of the
                histories alone (:func:`~examples.data.item_vectors.item_vectors`).
            behaviour_weight: norm of the behaviour vectors, above 0.
            behaviour_dims: of the behaviour vectors.
            seed: of the decomposition.

        Raises:
            ValueError: unknown ``features``, or a value outside its range.
        """
        if features not in get_args(Features):
            allowed = ", ".join(map(repr, get_args(Features)))
            raise ValueError(f"features is {features!r}; allowed are {allowed}")
        if features == "text":
            return self.x
        if not 0.0 < behaviour_weight < float("inf"):
            raise ValueError(f"behaviour_weight is {behaviour_weight}; it must be finite and > 0")
        if not 1 <= behaviour_dims <= self.num_items:
            raise ValueError(
                f"behaviour_dims is {behaviour_dims}; allowed are 1 to {self.num_items}"
            )
        key = (behaviour_weight, behaviour_dims, seed)
        if key not in self._behaviour:
            self._behaviour[key] = item_vectors(
                self.data.embeddings,
                self.leave_one_out.train,
                behaviour_weight=behaviour_weight,
                behaviour_dims=behaviour_dims,
                seed=seed,
            )
        return self._behaviour[key]


def _histories(sequences: Sequence[Sequence[int]], split: Split) -> dict[str, dict[str, Any]]:
    users = torch.tensor(
        [user for user, sequence in enumerate(sequences) if len(sequence) >= 3], dtype=torch.long
    )
    histories: dict[str, dict[str, Any]] = {
        "train": {
            "userId": users,
            "itemId": [torch.tensor(part[:-1], dtype=torch.long) for part in split.train],
            "itemId_fut": torch.tensor([part[-1] for part in split.train]),
        }
    }
    for name, questions in (("eval", split.validation), ("test", split.test)):
        histories[name] = {
            "userId": users,
            "itemId": torch.stack([padded(one.history, EVAL_LENGTH) for one in questions]),
            "itemId_fut": torch.tensor([one.target for one in questions]),
        }
    return histories
