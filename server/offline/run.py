"""All users of a file, shard by shard; what was done before is not done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from server.batching.policy import BatchLimits
from server.offline.errors import OfflineError
from server.offline.output import LOCK_FILE, OutputFolder
from server.offline.searching import OfflineSearch, Task
from server.offline.users import UsersFile, user_of
from server.release import Release
from server.settings import Settings

# 1 had the device and the type as they were asked for, not as they were.
FORMAT = 2
# Told the rows done of all rows, and how many of them in this run so far.
Progress = Callable[[int, int], None]


def recommend_offline(
    users: UsersFile,
    out: Path,
    release: Release,
    settings: Settings,
    *,
    shard_rows: int,
    seed: int,
    progress: Progress = lambda done, now: None,
) -> dict[str, Any]:
    """Answer every user of a file into a folder of shards.

    A run that ended early, by whatever means, goes on where it was when it is started again with
    the same arguments; the shards are those of a run that was never interrupted.

    Args:
        users: the file.
        out: the folder.
        release: what is searched.
        settings: its defaults hold for every user, its batching for the batches.
        shard_rows: users in a shard.
        seed: of the samples, where the temperature is above 0.
        progress: told after every shard.

    Returns:
        The summary.

    Raises:
        OfflineError: the folder holds another run or is being written to, or the file is damaged.
        EngineBrokenError: the device does not work any more; start again to go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OfflineError(f"{out} is being written to by another run") from None
    try:
        folder = OutputFolder(out, _asked(users, release, settings, shard_rows, seed))
        return _run(users, folder, release, settings, shard_rows, seed, progress)
    finally:
        lock.release()


def _run(
    users: UsersFile,
    folder: OutputFolder,
    release: Release,
    settings: Settings,
    shard_rows: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    started = time.monotonic()
    batching = settings.batching
    limits = BatchLimits(batching.max_requests, batching.max_beam_rows, batching.max_prompt_tokens)
    search = OfflineSearch(release, settings.defaults, limits, seed)
    done = now = shards = 0
    for number, rows, tasks in _tasks(users, folder, search, shard_rows):
        if tasks is not None:
            folder.write(number, search.answers(tasks))
            now += rows
        done += rows
        shards = number + 1
        progress(done, now)
    seconds = time.monotonic() - started
    last_run = {
        "users": now,
        "seconds": round(seconds, 3),
        "users_per_s": round(now / max(seconds, 1e-9), 1),
    }
    return folder.summarize(shards, last_run)


def _tasks(
    users: UsersFile, folder: OutputFolder, search: OfflineSearch, shard_rows: int
) -> Iterator[tuple[int, int, list[Task] | None]]:
    """(shard, its rows, its searches or None where it is done); one shard is read ahead."""
    shards = enumerate(users.shards(shard_rows))

    def read() -> tuple[int, int, list[Task] | None] | None:
        found = next(shards, None)
        if found is None:
            return None
        number, rows = found
        if folder.is_done(number):
            return number, len(rows), None
        first = number * shard_rows
        tasks = [search.task(user_of(row, first + i)) for i, row in enumerate(rows)]
        return number, len(rows), tasks

    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        following = reader.submit(read)
        while (current := following.result()) is not None:
            following = reader.submit(read)
            yield current


def _asked(
    users: UsersFile, release: Release, settings: Settings, shard_rows: int, seed: int
) -> dict[str, Any]:
    batching = settings.batching
    return {
        "format": FORMAT,
        "input_sha256": users.fingerprint(),
        "input_rows": users.rows,
        "model_version": release.model_version,
        "catalog_version": release.catalog.version,
        # Sums are rounded differently in another type, and in batches of another shape.
        "device": release.trie.device.type,
        "dtype": "fp8" if settings.engine.fp8 else str(release.engine.dtype).removeprefix("torch."),
        "batching": {
            "max_requests": batching.max_requests,
            "max_beam_rows": batching.max_beam_rows,
            "max_prompt_tokens": batching.max_prompt_tokens,
        },
        "defaults": settings.defaults.model_dump(exclude={"timeout_ms"}),
        "shard_rows": shard_rows,
        "seed": seed,
    }
