"""The users of an offline run, read from a Parquet file piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from server.api.schemas import MAX_SEED
from server.offline.errors import OfflineError

_HASH_BYTES = 1 << 22
_LISTS = ("history", "exclude_items", "allow_items", "constraint_sets")
_COLUMNS = ("user_id", *_LISTS, "seed")


@dataclass(frozen=True, slots=True)
class User:
    """One row.

    Attributes:
        row: its number in the file, from 0.
        user_id: as text; None where the file has none, which is a fault.
        history: item ids, oldest first.
        exclude_items: item ids to keep out.
        allow_items: the only item ids allowed; None for no such list.
        constraint_sets: names.
        seed: of the sample; None where the column is left out or null.
        fault: why this row cannot be searched for; None where it can.
    """

    row: int
    user_id: str | None
    history: tuple[str, ...] = ()
    exclude_items: tuple[str, ...] = ()
    allow_items: tuple[str, ...] | None = None
    constraint_sets: tuple[str, ...] = ()
    seed: int | None = None
    fault: str | None = None


class UsersFile:
    """A Parquet file with a row for each user.

    Columns: ``user_id`` (text or integer) and ``history`` (list of item ids, oldest first; null
    is an empty one); if wanted ``exclude_items``, ``allow_items``, ``constraint_sets`` (lists of
    text) and ``seed`` (integer). Others are not read.

    Args:
        path: of the file.

    Raises:
        OfflineError: no such file, no Parquet, a column missing or of another type.

    Attributes:
        rows: how many users there are.
        ignored: columns that are not read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise OfflineError(f"{path} cannot be read as Parquet: {error}") from error
        schema = self._file.schema_arrow
        self.rows: int = self._file.metadata.num_rows
        self.ignored = [name for name in schema.names if name not in _COLUMNS]
        self._columns = [name for name in _COLUMNS if name in schema.names]
        for name in ("user_id", "history"):
            if name not in schema.names:
                raise OfflineError(
                    f"{path} has no column {name!r}; it has {', '.join(schema.names) or 'none'}"
                )
        for name in self._columns:
            _check_type(path, name, schema.field(name).type)

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes."""
        digest = hashlib.sha256()
        with open(self._path, "rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def shards(self, rows: int) -> Iterator[list[dict[str, Any]]]:
        """All rows in order, in lists of ``rows``; the last may be shorter.

        Raises:
            OfflineError: the file is damaged.
        """
        pending: list[dict[str, Any]] = []
        try:
            for batch in self._file.iter_batches(batch_size=rows, columns=self._columns):
                pending.extend(batch.to_pylist())
                while len(pending) >= rows:
                    yield pending[:rows]
                    pending = pending[rows:]
        except (OSError, pa.ArrowException) as error:
            raise OfflineError(f"{self._path} is damaged: {error}") from error
        if pending:
            yield pending


def user_of(values: dict[str, Any], row: int) -> User:
    """One row of the file as a user; a row that is none has a fault."""
    user_id = None if values["user_id"] is None else str(values["user_id"])
    if user_id is None:
        return User(row, None, fault="user_id is null")
    for name in _LISTS:
        if None in (values.get(name) or ()):
            return User(row, user_id, fault=f"{name} has a null in it")
    seed = values.get("seed")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        return User(row, user_id, fault=f"seed is {seed}; allowed are 0 to {MAX_SEED}")
    allow = values.get("allow_items")
    return User(
        row=row,
        user_id=user_id,
        history=_texts(values.get("history")),
        exclude_items=_texts(values.get("exclude_items")),
        allow_items=None if allow is None else _texts(allow),
        constraint_sets=_texts(values.get("constraint_sets")),
        seed=seed,
    )


def _texts(values: Sequence[Any] | None) -> tuple[str, ...]:
    return tuple(map(str, values or ()))


def _check_type(path: Path, name: str, found: pa.DataType) -> None:
    if name == "seed":
        fits = pa.types.is_integer(found) or pa.types.is_null(found)
        wanted = "an integer"
    elif name == "user_id":
        fits, wanted = _is_id(found), "text or an integer"
    else:
        fits = pa.types.is_null(found) or (_is_list(found) and _is_id(found.value_type))
        wanted = "a list of text or integers"
    if not fits:
        raise OfflineError(f"column {name!r} of {path} is {found}; expected {wanted}")


def _is_id(found: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    kinds = pa.types
    # A column without a single value has no type of its own.
    return bool(
        kinds.is_string(found)
        or kinds.is_large_string(found)
        or kinds.is_string_view(found)
        or kinds.is_integer(found)
        or kinds.is_null(found)
    )


def _is_list(found: pa.DataType) -> bool:
    kinds = pa.types
    return bool(
        kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
    )
