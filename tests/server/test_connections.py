"""Connections that say nothing, too little, too slowly, or not HTTP: raw sockets on loopback."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest.mock import MagicMock

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.connections import (
    MAX_HEAD_BYTES,
    PARSER_HEAD_BYTES,
    ConnectionLimits,
    bounded_protocol,
    file_limit,
)
from server.metrics import HttpMetrics
from server.run import GracefulServer, listen
from server.settings_serving import HttpSettings
from tests.waiting import LIMIT_S, until, wait_until

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # an optional parser of uvicorn
    HttpToolsProtocol = None  # type: ignore[assignment,misc]

IMPLEMENTATIONS = [
    pytest.param(H11Protocol, id="h11"),
    pytest.param(
        HttpToolsProtocol,
        id="httptools",
        marks=pytest.mark.skipif(HttpToolsProtocol is None, reason="httptools is not installed"),
    ),
]
GET = b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE_BYTES = 32 << 20


async def app(scope, receive, send):
    """GET /small, /large (more than any buffer of a socket holds), /held (until told to go on)."""
    assert scope["type"] == "http"
    path = scope["path"]
    app.paths.append(path)
    if path == "/held":
        while not app.release.is_set():
            await asyncio.sleep(0.005)
    if path != "/early":  # answers before the body is there
        while (await receive()).get("more_body"):
            pass
    body = b"x" * (LARGE_BYTES if path == "/large" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


app.paths = []


class Served:
    def __init__(self, port: int, metrics: HttpMetrics) -> None:
        self.port, self.metrics = port, metrics

    def open(self, data: bytes = b"", timeout: float = LIMIT_S) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        if data:
            connection.sendall(data)
        return connection

    def value(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return 0.0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, lambda: self.metrics.render().decode())


@contextmanager
def serve(base, max_connections: int = 100, **settings: float) -> Iterator[Served]:
    metrics = HttpMetrics("rectokens")
    limits = ConnectionLimits(HttpSettings(**settings), metrics, max_connections)
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits, base),
        # The other one where it is installed, as the service would.
        loop="asyncio" if base is H11Protocol else "auto",
        h11_max_incomplete_event_size=PARSER_HEAD_BYTES,
        log_config=None,
        lifespan="off",
        ws="none",
        timeout_keep_alive=int(settings.get("keep_alive_s", 30)),
        timeout_graceful_shutdown=1,
    )

    async def drained() -> bool:
        return True

    server = GracefulServer(config, drained)
    app.release = threading.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(server._serve([listener]))  # no signals in a thread

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Served(listener.getsockname()[1], metrics)
    finally:
        app.release.set()
        server.end()
        thread.join(timeout=LIMIT_S)
        assert not thread.is_alive()


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def is_answered(connection: socket.socket) -> bool:
    """Whether the next answer is a 200; reads all of a small one."""
    data = b""
    while not data.endswith(b"\r\n\r\nxx"):
        chunk = connection.recv(65_536)
        if not chunk:
            return False
        data += chunk
    return data.startswith(b"HTTP/1.1 200 ")


def assert_refused(answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_heads_that_come_too_slowly_end(base):
    with serve(base, head_timeout_s=0.3, keep_alive_s=1) as server:
        silent = server.open()
        partial = server.open(b"GET /small HT")
        assert_refused(read_all(partial), 408, "head_timeout")
        assert read_all(silent) == b""
        assert server.value("rectokens_rejected_total", reason="head_timeout") == 1
        assert server.value("rectokens_connections_closed_total", reason="silent") == 1
        server.wait_for(lambda: server.value("rectokens_connections") == 0)


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_a_head_that_trickles_in_ends(base):
    with serve(base, head_timeout_s=0.3) as server:
        # Bytes that keep trickling in do not buy time.
        trickle = server.open(GET)
        assert is_answered(trickle)
        trickle.settimeout(0.05)
        answer, ends = b"", time.monotonic() + LIMIT_S
        trickle.sendall(b"GET /small HTTP/1.1\r\nX: ")
        while not answer and time.monotonic() < ends:
            try:
                answer = trickle.recv(1000)
            except TimeoutError:
                with suppress(ConnectionError):  # closed meanwhile; the answer can be read still
                    trickle.sendall(b"x")
        assert_refused(answer, 408, "head_timeout")
        assert server.value("rectokens_rejected_total", reason="head_timeout") == 1
        server.wait_for(lambda: server.value("rectokens_connections") == 0)


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_a_connection_may_be_opened_ahead(base):
    with serve(base, head_timeout_s=0.1) as server:
        ahead = server.open()
        time.sleep(0.3)
        ahead.sendall(GET)
        assert is_answered(ahead)
        assert server.value("rectokens_connections_closed_total", reason="silent") == 0


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_a_request_may_take_longer_than_its_head(base):
    with serve(base, head_timeout_s=0.1) as server:
        held = server.open(GET.replace(b"small", b"held"))
        time.sleep(0.4)
        app.release.set()
        assert is_answered(held)
        # And an idle connection waits for its next request as long as keep_alive_s says.
        time.sleep(0.4)
        held.sendall(GET)
        assert is_answered(held)


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "junk",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS to a plain port
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ],
)
def test_what_is_not_http_is_a_400_in_the_one_shape(base, junk):
    with serve(base, head_timeout_s=0.5) as server:
        answer = read_all(server.open(junk))
        assert b" 200 " not in answer.partition(b"\r\n")[0]
        assert_refused(answer, 400, "bad_request")
        assert is_answered(server.open(GET))


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "odd",
    [
        b"GET /small HTTP/9.9\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        # A proxy before us that goes by the length would have taken the GET for a body.
        b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 45\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_parsers_read_differently_is_answered_and_kept_from_harm(base, odd):
    """h11 reads these as requests, httptools as none; neither answers what was smuggled in."""
    app.paths.clear()
    with serve(base, head_timeout_s=0.3, keep_alive_s=1) as server:
        answer = read_all(server.open(odd))
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
        assert "/smuggled" not in app.paths
        assert is_answered(server.open(GET))


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", [b"held", b"large"])
@pytest.mark.parametrize("between", [b"", GET, 3 * GET])
def test_garbage_behind_requests_ends_them_without_a_failure_of_the_app(
    base, path, between, caplog
):
    with serve(base) as server:
        requests = GET.replace(b"small", path) + between
        connection = server.open(requests + b"\x00 garbage\r\n\r\n")
        time.sleep(0.1)
        app.release.set()
        answer = b""
        with suppress(ConnectionError):
            answer = read_all(connection)
        assert answer.count(b"HTTP/1.1 400 ") <= 1
        if path == b"large" and answer.startswith(b"HTTP/1.1 200 "):
            # The error is an answer of its own, not part of the other.
            assert b"HTTP/1.1 400 " not in answer[:LARGE_BYTES]
        bad = {"reason": "bad_request"}
        server.wait_for(lambda: server.value("rectokens_rejected_total", **bad) == 1)
        server.wait_for(lambda: server.value("rectokens_connections") == 0)
    assert "Exception in ASGI" not in caplog.text


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_who_leaves_with_several_requests_open_is_no_failure_of_the_app(base, caplog):
    with serve(base) as server:
        connection = server.open(GET.replace(b"small", b"held") + GET)
        server.wait_for(lambda: server.value("rectokens_connections") == 1)
        connection.close()
        time.sleep(0.1)
        app.release.set()
        server.wait_for(lambda: server.value("rectokens_connections") == 0)
        assert is_answered(server.open(GET))
    assert "Exception in ASGI" not in caplog.text


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_a_long_head_is_read(base):
    with serve(base) as server:
        cookie = b"Cookie: " + b"x" * (MAX_HEAD_BYTES - 1000) + b"\r\n\r\n"
        assert is_answered(server.open(GET.removesuffix(b"\r\n") + cookie))


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_a_head_without_end_is_refused(base):
    with serve(base) as server:
        connection = server.open(b"GET /small HTTP/1.1\r\nHost: x\r\n")
        answer = b""
        try:
            for number in range(400):
                connection.sendall(b"X-%d: %s\r\n" % (number, b"y" * 1000))
            answer = read_all(connection)
        except ConnectionError:
            pass  # closed while we were still sending
        if answer:
            assert_refused(answer, 431, "head_too_large")
        refused = {"reason": "head_too_large"}
        server.wait_for(lambda: server.value("rectokens_rejected_total", **refused) == 1)
        server.wait_for(lambda: server.value("rectokens_connections") == 0)


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /held HTTP/1.1\r\nHost: x\r\n\r\nGET /small HTTP/1.1\r\nX: ",
        b"POST /small HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
    ],
    ids=["next head", "trailer"],
)
def test_headers_without_end_behind_a_request_that_is_under_way_are_not_held(base, beginning):
    with serve(base) as server, server.open(beginning, timeout=1.0) as connection:
        sent = 0
        # Until nobody reads on, or the connection is closed.
        with suppress(TimeoutError, ConnectionError):
            while sent < LARGE_BYTES:
                connection.sendall(b"x" * 65_536)
                sent += 65_536
        assert sent < LARGE_BYTES


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
async def test_who_stops_reading_shortly_before_the_end_is_cut_off(base):
    """When the rest is so little that writing might go on, but nothing more is to be written."""
    limits = ConnectionLimits(HttpSettings(write_timeout_s=0.05), HttpMetrics("rectokens"), 10)
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none")
    config.load()
    protocol = bounded_protocol(limits, base)(config, ServerState(), {})
    transport = MagicMock(spec=asyncio.Transport)
    transport.is_closing.return_value = False
    transport.get_extra_info.return_value = None
    protocol.connection_made(transport)
    protocol.pause_writing()
    protocol.close_in_time()
    transport.is_closing.return_value = True
    protocol.resume_writing()
    await until(lambda: transport.abort.called)
    protocol.connection_lost(None)


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_who_does_not_read_is_cut_off(base):
    with serve(base, write_timeout_s=0.3) as server:
        connection = server.open(GET.replace(b"small", b"large"))
        closed = lambda: server.value("rectokens_connections_closed_total", reason="slow_reader")  # noqa: E731
        server.wait_for(lambda: closed() == 1)
        server.wait_for(lambda: server.value("rectokens_connections") == 0)
        with suppress(ConnectionError):  # reset, as it should be
            assert len(read_all(connection)) < LARGE_BYTES


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_a_slow_reader_that_reads_gets_all(base):
    with serve(base, write_timeout_s=10.0) as server:
        connection = server.open(GET.replace(b"small", b"large"))
        received = 0
        while received < LARGE_BYTES:
            chunk = connection.recv(4 << 20)
            assert chunk, received
            received += len(chunk)
            time.sleep(0.02)
        assert server.value("rectokens_connections_closed_total", reason="slow_reader") == 0


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_a_body_that_keeps_coming_after_the_answer_ends(base):
    """The answer was early; what still arrives is dropped, but not for ever."""
    with serve(base, head_timeout_s=0.3) as server:
        connection = server.open(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n")
        assert is_answered(connection)

        def still_taken() -> bool:
            try:
                connection.sendall(b"x")
            except ConnectionError:
                return False
            return True

        server.wait_for(lambda: not still_taken())


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_five_hundred_idle_connections_leave_room(base):
    """The one idle longest goes; those in use stay, and every newcomer is answered."""
    app.paths.clear()
    with serve(base, max_connections=50) as server:
        held = server.open(GET.replace(b"small", b"held"))
        server.wait_for(lambda: app.paths == ["/held"])
        idle = [server.open(GET if number % 2 else b"") for number in range(500)]
        last = server.open(GET)
        assert is_answered(last)
        server.wait_for(lambda: server.value("rectokens_connections") <= 50)
        assert server.value("rectokens_connections_closed_total", reason="made_room") >= 452
        assert read_all(idle[0]) == b""
        app.release.set()
        assert is_answered(held)
        for connection in idle:
            connection.close()
        last.sendall(GET)
        assert is_answered(last)


@pytest.mark.parametrize("base", IMPLEMENTATIONS)
def test_where_all_connections_are_in_use_a_new_one_is_refused(base):
    app.paths.clear()
    with serve(base, max_connections=3) as server:
        held = [server.open(GET.replace(b"small", b"held")) for _ in range(3)]
        server.wait_for(lambda: app.paths == ["/held"] * 3)  # their requests have begun
        refused = read_all(server.open())
        assert_refused(refused, 429, "overloaded")
        assert b"retry-after: 1" in refused.lower()
        app.release.set()
        for connection in held:
            assert is_answered(connection)
        assert is_answered(server.open(GET))


class FakeLimits:
    def __init__(self, monkeypatch, soft: int, hard: int) -> None:
        self.now = (soft, hard)
        monkeypatch.setattr(resource, "getrlimit", lambda which: self.now)
        monkeypatch.setattr(
            resource, "setrlimit", lambda which, limits: setattr(self, "now", limits)
        )


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "expected", "soft_after"),
    [
        (1024, 1_048_576, 8192, 8192, 8192 + 256),
        (20_000, 20_000, 8192, 8192, 20_000),
        (1024, 4096, 8192, 4096 - 256, 4096),
        (100, 100, 8192, 50, 100),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 8192, 8192, resource.RLIM_INFINITY),
        (1024, resource.RLIM_INFINITY, 8192, 8192, 8192 + 256),
    ],
)
def test_open_files_are_left_for_other_things(
    monkeypatch, soft, hard, wanted, expected, soft_after
):
    limits = FakeLimits(monkeypatch, soft, hard)
    assert file_limit(wanted) == expected
    assert limits.now == (soft_after, hard)
