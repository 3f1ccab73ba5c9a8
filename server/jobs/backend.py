"""Where jobs are kept: huey's storages, on SQLite, Redis or PostgreSQL.

Only their queues and key-value tables are used, with JSON in them. huey's own task messages are
pickles, which whoever can write to the database could turn into code of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huey.constants import EmptyData
from huey.exceptions import ConfigurationError
from huey.storage import BaseStorage, PostgresStorage, RedisStorage, SqliteStorage

from server.jobs.lanes import Lane

_BUSY_TIMEOUT_S = 30
_POLL_S = 1.0
# A database that says nothing for so long is away: whoever waited on would wait for the network to
# give up, a quarter of an hour, and keep a thread of the service.
_ANSWER_S = 10


class BackendError(RuntimeError):
    """The place that keeps the jobs cannot be used."""


class Table:
    """Small values by key."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def put(self, key: str, value: bytes) -> None:
        """Write a value, in place of what was there."""
        self._storage.put_data(key, value)

    def put_if_absent(self, key: str, value: bytes) -> bool:
        """Write a value unless there is one; whether it was written. Atomic."""
        return bool(self._storage.put_if_empty(key, value))

    def get(self, key: str) -> bytes | None:
        """The value, None for none."""
        value = self._storage.peek_data(key)
        return None if value is EmptyData else bytes(value)

    def delete(self, key: str) -> None:
        """Remove a value if it is there."""
        self._storage.delete_data(key)

    def values(self) -> list[bytes]:
        """All values, in no order."""
        return [bytes(value) for value in self._storage.result_items().values()]


class Queue:
    """Messages, first in first out; each is handed to one reader."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def put(self, message: str) -> None:
        """Append a message."""
        self._storage.enqueue(message.encode())

    def take(self) -> str | None:
        """The next message. With none, None: at once or after a second, as the storage does."""
        data = self._storage.dequeue()
        return None if data is None else bytes(data).decode()

    def waiting(self) -> list[str]:
        """Messages that nobody has taken."""
        return [bytes(data).decode() for data in self._storage.enqueued_items()]


@dataclass(frozen=True)
class Backend:
    """Everything that is kept of jobs.

    Attributes:
        records: by job id, what everybody sees.
        payloads: by job id, all parameters.
        keys: idempotency keys, cancel marks, claims.
        owners: by job id, who runs it.
        queues: of each lane.
    """

    records: Table
    payloads: Table
    keys: Table
    owners: Table
    queues: dict[Lane, Queue]
    _storages: list[BaseStorage] = field(repr=False)

    def close(self) -> None:
        """Close the connections."""
        for storage in self._storages:
            storage.close()


def open_backend(location: str | Path, name: str) -> Backend:
    """Open, or begin, a place that keeps jobs.

    Args:
        location: path of an SQLite file, or a URL: ``redis://``, ``rediss://``, ``unix://``
            (Redis), ``postgresql://``.
        name: keeps apart what shares one database; letters, digits and underscores.

    Raises:
        BackendError: an unknown URL, a missing driver, or no connection.
    """
    opened: list[BaseStorage] = []
    make = _factory(location)

    def storage(part: str) -> BaseStorage:
        one = make(f"{name}_{part}")
        opened.append(one)
        return one

    try:
        return Backend(
            records=Table(storage("records")),
            payloads=Table(storage("payloads")),
            keys=Table(storage("keys")),
            owners=Table(storage("owners")),
            queues={lane: Queue(storage(f"queue_{lane}")) for lane in Lane},
            _storages=opened,
        )
    except ConfigurationError as error:
        raise BackendError(f"jobs cannot be kept in {_shown(location)}: {error}") from error
    except Exception as error:
        # sqlite3, redis and psycopg each have errors of their own; none is worth telling apart.
        raise BackendError(
            f"jobs cannot be kept in {_shown(location)}: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class Tables:
    """Tables beside those of the jobs, in the same place.

    Attributes:
        by_name: the tables.
    """

    by_name: dict[str, Table]
    _storages: list[BaseStorage] = field(repr=False)

    def close(self) -> None:
        """Close the connections."""
        for storage in self._storages:
            storage.close()


def open_tables(location: str | Path, name: str, parts: Sequence[str]) -> Tables:
    """Open, or begin, further tables of their own names; see :func:`open_backend`.

    Raises:
        BackendError: as :func:`open_backend`.
    """
    make = _factory(location)
    try:
        storages = {part: make(f"{name}_{part}") for part in parts}
    except Exception as error:
        raise BackendError(
            f"notes cannot be kept in {_shown(location)}: {type(error).__name__}: {error}"
        ) from error
    tables = {part: Table(storage) for part, storage in storages.items()}
    return Tables(tables, list(storages.values()))


def _factory(location: str | Path) -> Callable[[str], BaseStorage]:
    text = str(location)
    scheme = text.partition("://")[0] if "://" in text else ""
    if scheme in ("redis", "rediss", "unix"):
        url = _with_timeout(text)
        return lambda name: _pinged(RedisStorage(name, url=url, read_timeout=_POLL_S))
    if scheme in ("postgresql", "postgres"):
        bounds = {name: value for name, value in _postgres_bounds().items() if name not in text}
        return lambda name: PostgresStorage(
            name, dsn=text, table_prefix="rectokens_jobs", read_timeout=_POLL_S, **bounds
        )
    if scheme:
        raise BackendError(
            f"jobs cannot be kept in {_shown(location)}; allowed are a file, redis:// and "
            "postgresql://"
        )
    Path(location).parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"timeout": _BUSY_TIMEOUT_S, "strict_fifo": True, "cache_mb": 1}
    return lambda name: SqliteStorage(name, filename=text, **options)


def _with_timeout(url: str) -> str:
    """A URL of Redis that says how long to wait for an answer."""
    if "socket_timeout=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}socket_timeout={_ANSWER_S}"


def _postgres_bounds() -> dict[str, int]:
    """Parameters of a connection: how long to wait for it, and for a network that is silent."""
    return {
        "connect_timeout": _ANSWER_S,
        "tcp_user_timeout": 1000 * _ANSWER_S,
        "keepalives_idle": _ANSWER_S,
        "keepalives_interval": 2,
        "keepalives_count": 3,
    }


def _pinged(storage: RedisStorage) -> RedisStorage:
    storage.conn.ping()
    return storage


def _shown(location: str | Path) -> str:
    """The location without a password."""
    text = str(location)
    scheme, separator, rest = text.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else text
