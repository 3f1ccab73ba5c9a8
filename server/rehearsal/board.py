"""Where jobs and serving processes leave notes for each other: in the database of the jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from server.rehearsal.types import RehearsalReport, RehearsalRequest, ServerState

# A process that gave no sign for so long is not waited for. Hosts' clocks may differ a little.
MAX_SILENCE_S = 30.0
_FORGET_AFTER_S = 3_600.0
# A job that has not said for so long that it waits for a report was killed. Well above the time
# after which it says so again, and above what clocks may differ.
_ABANDONED_AFTER_S = 300.0


class NoteTable(Protocol):
    """Small values by key, shared by processes; see ``server.jobs.backend.Table``."""

    def put(self, key: str, value: bytes) -> None:
        """Write a value, in place of what was there."""
        ...

    def put_if_absent(self, key: str, value: bytes) -> bool:
        """Write a value unless there is one; whether it was written. Atomic."""
        ...

    def get(self, key: str) -> bytes | None:
        """The value, None for none."""
        ...

    def delete(self, key: str) -> None:
        """Remove a value if it is there."""
        ...

    def values(self) -> list[bytes]:
        """All values, in no order."""
        ...


class RehearsalBoard:
    """Requests for rehearsals, who takes them, what came of them, and who is alive.

    Every call blocks for as long as the database takes.

    Args:
        servers: signs of life, by server.
        requests: open requests, by id.
        answers: claims and reports.
        clock: Unix seconds.
        close: closes the connections.
    """

    def __init__(
        self,
        servers: NoteTable,
        requests: NoteTable,
        answers: NoteTable,
        clock: Callable[[], float] = time.time,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._servers = servers
        self._requests = requests
        self._answers = answers
        self._clock = clock
        self.close = close

    # For a serving process

    def announce(self, state: ServerState) -> None:
        """Give a sign of life; forget servers that gave none for an hour."""
        self._servers.put(state.server, state.model_dump_json().encode())
        for other in self._states():
            if self._clock() - other.at_s > _FORGET_AFTER_S:
                self._servers.delete(other.server)

    def withdraw(self, server: str) -> None:
        """Say that a server is gone."""
        self._servers.delete(server)

    def open_requests(self, server: str) -> list[RehearsalRequest]:
        """Requests that nobody has taken, or that this server took and has not reported on.

        It may not know that it did: a connection can be lost once the claim is written. What a job
        that was killed asked for is forgotten.
        """
        requests = [RehearsalRequest.model_validate_json(r) for r in self._requests.values()]
        # Jobs of versions before this one did not say when.
        abandoned = [one for one in requests if 0 < one.at_s < self._clock() - _ABANDONED_AFTER_S]
        for request in abandoned:
            self.close_request(request.id)
        return [
            request
            for request in requests
            if request not in abandoned
            and self.claimed_by(request.id) in (None, server)
            and self.report_of(request.id) is None
        ]

    def claim(self, request_id: str, server: str) -> bool:
        """Take a request; False if somebody else was quicker, or nobody waits any more."""
        if not self._answers.put_if_absent(_claim_key(request_id), server.encode()):
            return self.claimed_by(request_id) == server
        if self.is_open(request_id):
            return True
        self._answers.delete(_claim_key(request_id))
        return False

    def is_open(self, request_id: str) -> bool:
        """Whether anybody still waits for the report."""
        return self._requests.get(request_id) is not None

    def report(self, request_id: str, report: RehearsalReport) -> None:
        """Tell what came of it."""
        if self.is_open(request_id):
            self._answers.put(_report_key(request_id), report.model_dump_json().encode())

    # For a job

    def servers(self) -> list[ServerState]:
        """Servers that are alive and do not end, as far as signs tell."""
        return [
            state
            for state in self._states()
            if not state.ends and self._clock() - state.at_s <= MAX_SILENCE_S
        ]

    def ask(self, request: RehearsalRequest) -> None:
        """Post a request, or say that its report is still waited for."""
        now = request.model_copy(update={"at_s": self._clock()})
        self._requests.put(request.id, now.model_dump_json().encode())

    def claimed_by(self, request_id: str) -> str | None:
        """The server that took a request."""
        data = self._answers.get(_claim_key(request_id))
        return None if data is None else data.decode()

    def report_of(self, request_id: str) -> RehearsalReport | None:
        """What came of it, None while nothing has."""
        data = self._answers.get(_report_key(request_id))
        return None if data is None else RehearsalReport.model_validate_json(data)

    def close_request(self, request_id: str) -> None:
        """Take a request back, with all that was noted on it."""
        self._requests.delete(request_id)
        self._answers.delete(_claim_key(request_id))
        self._answers.delete(_report_key(request_id))

    def _states(self) -> list[ServerState]:
        return [ServerState.model_validate_json(data) for data in self._servers.values()]


def _claim_key(request_id: str) -> str:
    return f"claim:{request_id}"


def _report_key(request_id: str) -> str:
    return f"report:{request_id}"
