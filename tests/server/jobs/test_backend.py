"""A database that takes connections and says nothing more, as where a network swallows all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from server.jobs import backend
from server.jobs.backend import BackendError, open_backend, open_tables


@pytest.fixture
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("driver", "url"),
    [
        ("redis", "redis://{}/0"),
        ("redis", "redis://{}/0?health_check_interval=9"),
        ("psycopg", "postgresql://user@{}/jobs"),
    ],
)
def test_a_database_that_says_nothing_is_not_waited_for(
    silent: str, monkeypatch: pytest.MonkeyPatch, driver: str, url: str
) -> None:
    pytest.importorskip(driver)
    monkeypatch.setattr(backend, "_ANSWER_S", 1)
    told: list[Exception] = []

    def opened() -> None:
        for attempt in (
            lambda: open_backend(url.format(silent), "jobs"),
            lambda: open_tables(url.format(silent), "jobs", ["notes"]),
        ):
            try:
                attempt()
            except BackendError as error:
                told.append(error)

    thread = threading.Thread(target=opened, daemon=True)
    thread.start()
    thread.join(20)
    assert len(told) == 2


def test_what_an_url_says_of_it_counts(silent: str) -> None:
    pytest.importorskip("redis")
    with pytest.raises(BackendError, match="Timeout"):
        open_backend(f"redis://{silent}/0?socket_timeout=0.2", "jobs")
