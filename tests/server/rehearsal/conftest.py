from __future__ import annotations

import threading
from typing import Any

import pytest

from server.rehearsal.board import RehearsalBoard
from server.rehearsal.types import ServerState


class Notes:
    """A table of notes in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, value: bytes) -> None:
        with self._lock:
            self.kept[key] = value

    def put_if_absent(self, key: str, value: bytes) -> bool:
        with self._lock:
            return self.kept.setdefault(key, value) is value

    def get(self, key: str) -> bytes | None:
        return self.kept.get(key)

    def delete(self, key: str) -> None:
        with self._lock:
            self.kept.pop(key, None)

    def values(self) -> list[bytes]:
        with self._lock:
            return list(self.kept.values())


class Clock:
    """A clock that moves when somebody sleeps, and does what is due then."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.due: list[tuple[float, Any]] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at, action in [one for one in self.due if one[0] <= self.now]:
            self.due.remove((at, action))
            action()

    def after(self, seconds: float, action: Any) -> None:
        self.due.append((self.now + seconds, action))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> RehearsalBoard:
    return RehearsalBoard(Notes(), Notes(), Notes(), clock)


@pytest.fixture
def alive(board: RehearsalBoard, clock: Clock) -> Any:
    """``alive(server, release, beat, **more)``: a sign of life, now."""

    def announce(server: str, release: str | None, beat: int = 1, **more: Any) -> None:
        board.announce(
            ServerState(server=server, beat=beat, at_s=clock.now, release=release, **more)
        )

    return announce
