"""The folder of an offline run: what was asked for, the shards that are done, and the summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rectokens.core.atomic_file import PARTIAL_PREFIX, atomic_file
from server.errors import ErrorKind
from server.offline.errors import OfflineError
from server.offline.searching import UserAnswer

RUN_FILE, SUMMARY_FILE, LOCK_FILE = "run.json", "summary.json", ".lock"
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("shortfall", pa.string()),
        ("unknown_items", pa.int32()),
        ("truncated_items", pa.int32()),
        ("error", pa.string()),
        ("error_message", pa.string()),
    ]
)


class OutputFolder:
    """Shards appear whole or not at all, so a run that was killed goes on where it was.

    Args:
        path: of the folder; made if there is none.
        asked: all that the results depend on, as plain JSON.

    Raises:
        OfflineError: the folder holds another run, or something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self._path = path
        run = path / RUN_FILE
        if run.exists():
            _require_same(run, asked)
        else:
            if any(path.glob("part-*.parquet")):
                raise OfflineError(
                    f"{path} holds shards but no {RUN_FILE} that tells of which run; "
                    "give an empty folder"
                )
            with atomic_file(run) as partial:
                partial.write_text(json.dumps(asked, indent=2) + "\n")
        for leftover in path.glob(f"{PARTIAL_PREFIX}*"):
            leftover.unlink(missing_ok=True)

    def is_done(self, shard: int) -> bool:
        """Whether a shard was written, without a fault of the engine.

        What other errors say of a user stays so; that the engine failed may have been for want of
        memory that was there again a moment later.
        """
        path = self._shard(shard)
        if not path.exists():
            return False
        try:
            errors = pq.read_table(path, columns=["error"])["error"]
        except (OSError, pa.ArrowException):
            return True  # damaged: the summary tells
        return ErrorKind.ENGINE_FAULT.value not in errors.unique().to_pylist()

    def write(self, shard: int, answers: Sequence[UserAnswer]) -> None:
        """Write a shard; complete on disk when this returns."""
        table = pa.table(
            {
                "user_id": [one.user_id for one in answers],
                "item_ids": [[item.item_id for item in one.items] for one in answers],
                "scores": [[item.score for item in one.items] for one in answers],
                "shortfall": [one.shortfall for one in answers],
                "unknown_items": [one.unknown_items for one in answers],
                "truncated_items": [one.truncated_items for one in answers],
                "error": [one.error for one in answers],
                "error_message": [one.error_message for one in answers],
            },
            schema=SCHEMA,
        )
        with atomic_file(self._shard(shard)) as partial:
            pq.write_table(table, partial, compression="zstd")

    def summarize(self, shards: int, last_run: dict[str, Any]) -> dict[str, Any]:
        """Count what all shards hold, and write it down.

        Raises:
            OfflineError: a shard is damaged.
        """
        users = items = 0
        errors: Counter[str] = Counter()
        shortfalls: Counter[str] = Counter()
        for shard in range(shards):
            path = self._shard(shard)
            try:
                table = pq.read_table(path, columns=["item_ids", "shortfall", "error"])
            except (OSError, pa.ArrowException) as error:
                raise OfflineError(
                    f"{path} is damaged: {error}; remove it and run the command again"
                ) from error
            users += table.num_rows
            items += len(table["item_ids"].combine_chunks().flatten())
            errors.update(one for one in table["error"].to_pylist() if one is not None)
            shortfalls.update(one for one in table["shortfall"].to_pylist() if one is not None)
        summary = {
            "users": users,
            "answered": users - errors.total(),
            "items": items,
            "errors": dict(sorted(errors.items())),
            "shortfalls": dict(sorted(shortfalls.items())),
            "shards": shards,
            "last_run": last_run,
        }
        with atomic_file(self._path / SUMMARY_FILE) as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def _shard(self, shard: int) -> Path:
        return self._path / f"part-{shard:05d}.parquet"


def _require_same(run: Path, asked: dict[str, Any]) -> None:
    try:
        before = json.loads(run.read_text())
    except (OSError, ValueError) as error:
        raise OfflineError(f"{run} cannot be read: {error}") from error
    if not isinstance(before, dict):
        raise OfflineError(f"{run} cannot be read: it holds no JSON object")
    if before.get("format") != asked["format"]:
        raise OfflineError(
            f"{run} is of another version of rectokens, format {before.get('format')!r}, and does "
            f"not tell all that format {asked['format']} does; end that run with the version that "
            "began it, or give another folder"
        )
    names = sorted({*before, *asked})
    other = [name for name in names if before.get(name) != asked.get(name)]
    if other:
        differences = "; ".join(
            f"{name} was {before.get(name)!r} and is {asked.get(name)!r}" for name in other
        )
        raise OfflineError(
            f"{run.parent} holds another run: {differences}; give another folder, or the same "
            "options to continue it"
        )
