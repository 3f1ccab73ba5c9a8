"""The data classes, under one name."""

from __future__ import annotations

from examples.data.batch import SeqBatch
from examples.data.items import ItemData
from examples.data.precomputed import PrecomputedSequenceDataset
from examples.data.reviews import AmazonReviews
from examples.data.sequences import UserSequenceDataset
from server.demo.data import DataFolderError

__all__ = [
    "AmazonReviews",
    "DataFolderError",
    "ItemData",
    "PrecomputedSequenceDataset",
    "SeqBatch",
    "UserSequenceDataset",
]
