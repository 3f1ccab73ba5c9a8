"""From the kind of a job to the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from server.jobs.activation import activate, rollback
from server.jobs.constraint_sets import delete_constraint_set, put_constraint_set
from server.jobs.reindex import reindex
from server.jobs.train_tokenizer import train_tokenizer
from server.jobs.types import JobKind
from server.jobs.update_items import update_items

# Called with the kind's parameters, a JobEnvironment and a JobReporter; gives the job's result.
JobFunction = Callable[..., dict[str, Any]]

FUNCTIONS: Mapping[JobKind, JobFunction] = {
    JobKind.REINDEX: reindex,
    JobKind.UPDATE_ITEMS: update_items,
    JobKind.PUT_CONSTRAINT_SET: put_constraint_set,
    JobKind.DELETE_CONSTRAINT_SET: delete_constraint_set,
    JobKind.TRAIN_TOKENIZER: train_tokenizer,
    JobKind.ACTIVATE: activate,
    JobKind.ROLLBACK: rollback,
}
