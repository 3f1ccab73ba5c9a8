"""Connections of the server: how many, how slow they may be, and what a bad one is answered.

uvicorn bounds neither the time in which a request's head arrives nor the number of connections, so
clients that connect and say nothing would keep their sockets until none are left.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import structlog
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from server.api.responses import error_response
from server.errors import ERROR_TABLE, ErrorKind
from server.metrics import HttpMetrics
from server.settings_serving import HttpSettings

_log = structlog.get_logger(__name__)

# Of a request line with its headers. httptools has no limit; that of h11 must leave room for what
# one read brings, so that ours is met first and says what is wrong.
MAX_HEAD_BYTES = 65_536
PARSER_HEAD_BYTES = 1 << 20
# Files of models and catalogs, the jobs' database, connections to an upstream.
_OTHER_FILES = 256
_REFUSAL_HEADERS = {"Connection": "close", "Retry-After": "1"}


class ConnectionLimits:
    """What the connections of one server share.

    Args:
        settings: how many, how slow.
        metrics: told of connections that are closed.
        max_connections: most at once.
    """

    def __init__(self, settings: HttpSettings, metrics: HttpMetrics, max_connections: int) -> None:
        self.head_timeout_s = settings.head_timeout_s
        self.keep_alive_s = settings.keep_alive_s
        self.write_timeout_s = settings.write_timeout_s
        self.max_connections = max_connections
        self.metrics = metrics
        # Without a request underway; longest so first.
        self.idle: dict[Any, None] = {}

    def make_room(self, newcomer: Any) -> bool:
        """Close the connection that has been idle longest; False if there is none."""
        for connection in self.idle:
            if connection is not newcomer:
                del self.idle[connection]
                self.metrics.connection_closed("made_room")
                connection.close_in_time()
                return True
        return False


def file_limit(wanted_connections: int) -> int:
    """Connections this process can have open, its limit of open files raised as far as allowed.

    Args:
        wanted_connections: as many as the settings allow.

    Returns:
        ``wanted_connections``, or fewer where the limit of open files does not let that many in
        beside the files of models and catalogs; at least 1.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wanted_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted_connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, soft), hard))
    if allowed >= wanted:
        return wanted_connections
    possible = max(allowed - _OTHER_FILES, allowed // 2, 1)
    _log.warning(
        "fewer connections than configured: the limit of open files is too low",
        open_files=allowed,
        configured=wanted_connections,
        max_connections=possible,
    )
    return possible


def bounded_protocol(
    limits: ConnectionLimits, base: Any = AutoHTTPProtocol
) -> type[asyncio.Protocol]:
    """uvicorn's protocol, bounded.

    - A head that is not complete in time, or too long, is answered with an error and the connection
      closed; one that nothing was ever sent on is closed without a word, when an idle one would be.
    - A client that does not read its answer is cut off.
    - Over the limit of connections the one idle longest is closed; where none is idle, the new one
      is refused.
    - What is not HTTP gets an error in the shape of all others.

    Args:
        limits: shared by the connections of one server.
        base: ``H11Protocol`` or ``HttpToolsProtocol`` of uvicorn.
    """

    class BoundedProtocol(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._silent_timer: asyncio.TimerHandle | None = None
            self._head_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None
            self._head_bytes = 0
            # Bytes read while a request is under way, since the last that made up a head or a body.
            self._ahead_bytes = 0
            self._heads_and_bodies = 0
            self._refused = False
            # Requests whose answer is under way or waited for, before the latest.
            self._earlier: list[Any] = []

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            limits.metrics.connections_open(len(self.connections))
            if len(self.connections) > limits.max_connections and not limits.make_room(self):
                self._refuse(
                    ErrorKind.OVERLOADED,
                    f"{limits.max_connections} connections are open, all of them in use",
                )
                return
            limits.idle[self] = None
            self._silent_timer = self.loop.call_later(limits.keep_alive_s, self._is_silent)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._abandon()
            # uvicorn leaves its own timer running after a reset, and with it the connection.
            self._unset_keepalive_if_required()
            limits.idle.pop(self, None)
            self._stop_silent_timer()
            self._stop_head_timer()
            self._stop_write_timer()
            limits.metrics.connections_open(len(self.connections))

        def data_received(self, data: bytes) -> None:
            if self._refused or self.transport.is_closing():
                return
            self._stop_silent_timer()
            before = self._heads_and_bodies
            super().data_received(data)
            if self._refused or self._in_request():
                self._bound_what_is_ahead(len(data), self._heads_and_bodies > before)
                return
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(limits.head_timeout_s, self._head_is_late)
            if not self._discards_body():
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._refuse(
                        ErrorKind.HEAD_TOO_LARGE,
                        f"the request line and headers have over {MAX_HEAD_BYTES} bytes",
                    )

        def on_headers_complete(self) -> None:
            """Called by httptools only, which reads on while a request is under way."""
            if not _is_over(self.cycle):
                self._earlier.append(self.cycle)
            self._heads_and_bodies += 1
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            """Called by httptools only."""
            self._heads_and_bodies += 1
            super().on_body(body)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._earlier = [cycle for cycle in self._earlier if not _is_over(cycle)]
            self._head_bytes = 0
            if self.transport.is_closing():
                self.close_in_time()
            elif not self._in_request():
                limits.idle[self] = None

        def timeout_keep_alive_handler(self) -> None:
            self.close_in_time()

        def close_in_time(self) -> None:
            """Close, and cut off if the client does not read what is still to be sent."""
            self.transport.close()
            self._wait_for_reader()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait_for_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_timer()
            if self.transport.is_closing():
                # Some of it is still to be read, and nothing will be written to tell of it again.
                self.close_in_time()

        def send_400_response(self, msg: str) -> None:
            self._refuse(ErrorKind.BAD_REQUEST, "this is not an HTTP/1.1 request")

        def _in_request(self) -> bool:
            """Whether a request is underway; then it is not idle, and no head is waited for."""
            if _is_over(self.cycle):
                return False
            limits.idle.pop(self, None)
            self._stop_head_timer()
            self._head_bytes = 0
            if self._of_two_lengths():
                self.cycle.keep_alive = False
            return True

        def _bound_what_is_ahead(self, num_bytes: int, made_up_something: bool) -> None:
            """Refuse a next head, or trailers of this request's body, that do not end.

            h11 reads no next head before its turn, and bounds trailers by itself.
            """
            if self._refused:
                return
            if made_up_something or not hasattr(base, "on_body"):
                self._ahead_bytes = 0
                return
            self._ahead_bytes += num_bytes
            if self._ahead_bytes > MAX_HEAD_BYTES:
                self._refuse(
                    ErrorKind.HEAD_TOO_LARGE,
                    f"what follows the request has over {MAX_HEAD_BYTES} bytes of headers",
                )

        def _of_two_lengths(self) -> bool:
            """Whether a proxy may have seen another end of this request than we do.

            RFC 9112, 6.1: nothing that follows on the connection may be taken for a request.
            """
            names = {name for name, _ in self.scope["headers"]}
            return {b"content-length", b"transfer-encoding"} <= names

        def _discards_body(self) -> bool:
            """Whether what arrives belongs to a request that was answered before its end."""
            return self.cycle is not None and self.cycle.more_body

        def _refuse(self, kind: ErrorKind, message: str) -> None:
            self._refused = True
            self._stop_head_timer()
            limits.idle.pop(self, None)
            limits.metrics.rejected(kind)
            if not self._abandon():
                self.transport.write(_raw_response(kind, message))
            self.close_in_time()

        def _abandon(self) -> bool:
            """Leave requests without their answers; whether one has begun to go out."""
            open_cycles = [one for one in [*self._earlier, self.cycle] if not _is_over(one)]
            for cycle in open_cycles:
                # Nothing may be written for it any more.
                cycle.disconnected = True
                cycle.message_event.set()
            return any(cycle.response_started for cycle in open_cycles)

        def _head_is_late(self) -> None:
            self._head_timer = None
            if self.transport.is_closing():
                return
            self._refuse(
                ErrorKind.HEAD_TIMEOUT,
                f"the request's headers did not arrive within {limits.head_timeout_s:g} seconds",
            )

        def _is_silent(self) -> None:
            self._silent_timer = None
            if not self.transport.is_closing():
                limits.metrics.connection_closed("silent")
                self.close_in_time()

        def _wait_for_reader(self) -> None:
            if self._write_timer is None:
                self._write_timer = self.loop.call_later(
                    limits.write_timeout_s, self._reader_is_slow
                )

        def _reader_is_slow(self) -> None:
            self._write_timer = None
            limits.metrics.connection_closed("slow_reader")
            # Closing would wait for the client to read the rest.
            self.transport.abort()

        def _stop_silent_timer(self) -> None:
            if self._silent_timer is not None:
                self._silent_timer.cancel()
                self._silent_timer = None

        def _stop_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

    return BoundedProtocol


def _is_over(cycle: Any) -> bool:
    """Whether a request (uvicorn's cycle of it) is answered, or there is none."""
    return cycle is None or cycle.response_complete


def _raw_response(kind: ErrorKind, message: str) -> bytes:
    """An error as bytes, for a connection that no request was read from."""
    response = error_response(kind, message, headers=_REFUSAL_HEADERS)
    reason = ERROR_TABLE[kind].type.replace("_", " ")
    head = [f"HTTP/1.1 {response.status_code} {reason}".encode()]
    head += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*head, b"", bytes(response.body)])
