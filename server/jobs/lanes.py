"""Which jobs wait for each other.

A lane runs one job at a time. Jobs that make a catalog out of the active one share a lane: two of
them side by side would each miss what the other did. Training takes hours and must not hold them
up, and nothing may hold up a rollback.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from server.jobs.types import JobKind


class Lane(StrEnum):
    """A queue of its own."""

    CATALOG = "catalog"
    TOKENIZER = "tokenizer"
    ACTIVATION = "activation"


LANES: Mapping[JobKind, Lane] = {
    JobKind.REINDEX: Lane.CATALOG,
    JobKind.UPDATE_ITEMS: Lane.CATALOG,
    JobKind.PUT_CONSTRAINT_SET: Lane.CATALOG,
    JobKind.DELETE_CONSTRAINT_SET: Lane.CATALOG,
    JobKind.TRAIN_TOKENIZER: Lane.TOKENIZER,
    JobKind.ACTIVATE: Lane.ACTIVATION,
    JobKind.ROLLBACK: Lane.ACTIVATION,
}
