"""Processes that do jobs on a store, one after the other, until they are killed.

    python job_worker.py STORE LAKE

Each line on stdin, a number, begins one: a copy of this process, which has imported everything.
It prints ``NUMBER PID`` and then, for every job that is done, ``NUMBER KIND``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from typing import Any

from rectokens.artifacts.errors import ArtifactError
from server.jobs.context import JobReporter, environment_of
from server.jobs.kinds import FUNCTIONS
from server.jobs.params import checked_params
from server.jobs.types import JobFailure, JobKind
from server.settings import load_settings

SOURCE = {"root": "lake", "metadata_columns": ["stock"], "prior_column": "popularity"}


def main(store: str, lake: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that were killed
    for line in sys.stdin:
        if os.fork() == 0:
            work(store, lake, int(line))


def work(store: str, lake: str, seed: int) -> None:
    say(seed, os.getpid())
    chance = random.Random(seed)
    settings = load_settings(
        {
            "store.path": store,
            "admin.sources": f"lake={lake}",
            "store.keep_younger_than_s": "0",
            "store.keep_last": "2",
            "jobs.batch_size": "64",
        }
    )
    environment = environment_of(settings)
    while True:
        kind, params = _next(chance)
        try:
            FUNCTIONS[kind](checked_params(kind, params), environment, JobReporter())
        except JobFailure as failure:
            # The other worker was quicker.
            if failure.kind != "conflict":
                raise
        except ArtifactError as error:
            # Only one release to go back to is kept: a second rollback in a row may find none.
            gone = ("nothing to roll back to", "does not exist")
            if kind is not JobKind.ROLLBACK or not any(text in str(error) for text in gone):
                raise
        say(seed, kind)


def say(seed: int, what: object) -> None:
    os.write(1, f"{seed} {what}\n".encode())  # short, so lines of two do not mix


def _next(chance: random.Random) -> tuple[JobKind, dict[str, Any]]:
    number = chance.randrange(10**6)
    upsert = {
        "item_id": f"U{number}",
        "embedding": [chance.gauss(0, 1) for _ in range(6)],
        "prior": chance.random(),
        "metadata": {"stock": number},
    }
    options: list[tuple[JobKind, dict[str, Any]]] = [
        (
            JobKind.REINDEX,
            {"source": {**SOURCE, "path": f"{chance.choice('ab')}.parquet"}, "activate": True},
        ),
        (JobKind.UPDATE_ITEMS, {"upserts": [upsert]}),
        (JobKind.PUT_CONSTRAINT_SET, {"name": "s", "predicate": f"stock > {number % 100}"}),
        (JobKind.ROLLBACK, {}),
    ]
    return chance.choice(options)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
