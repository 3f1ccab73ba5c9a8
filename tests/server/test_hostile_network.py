"""The service as a process under clients that mean no good, and killed: docs/operations.md tells
what is tested here.

``IDLE_CONNECTIONS`` (default 1,000) and ``RAW_REQUESTS`` (default 150) make it more.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest

from tests.metrics_page import sample_of
from tests.ports import port_to_come
from tests.waiting import LIMIT_S, wait_until

IDLE = int(os.environ.get("IDLE_CONNECTIONS", "1000"))
FUZZED = int(os.environ.get("RAW_REQUESTS", "150"))
# Files that this process has open for other things.
OWN_FILES = 300
BODY = b'{"history": ["B001"], "top_k": 2}'
POST = (
    b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def post(server: Any) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}/v1/recommend", content=BODY, headers=headers, timeout=LIMIT_S)


def metric(server: Any, line: str) -> float:
    return sample_of(httpx.get(f"{server.url}/metrics", timeout=LIMIT_S).text, line)


def connect(server: Any, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S)
    if data:
        connection.sendall(data)
    return connection


@pytest.fixture
def open_files() -> Iterator[int]:
    """As many sockets as this process may open, its limit raised for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield min(hard, 1 << 20) - OWN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_killed_it_breaks_off_at_once_and_another_takes_its_place(start_process):
    port = port_to_come()
    server = start_process("told", f"port={port}")
    server.read_until("release active")
    server.tell("hold")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = [pool.submit(post, server) for _ in range(4)]
        wait_until(lambda: metric(server, "rectokens_batch_requests_count") > 0)
        server.process.kill()
        # Nobody waits for an answer that cannot come.
        ends = [answer.exception() for answer in answers]
    assert all(isinstance(end, httpx.RemoteProtocolError | httpx.NetworkError) for end in ends), (
        ends
    )
    again = start_process("ok", f"port={port}")
    again.read_until("release active")
    assert again.port == port
    assert post(again).status_code == 200


def test_idle_connections_cost_little_and_keep_nobody_out(start_process, open_files):
    count = min(IDLE, open_files)
    server = start_process(
        "ok",
        f"http.max_connections={count}",
        "http.head_timeout_s=3600",
        "http.keep_alive_s=3600",
    )
    server.read_until("release active")
    process = psutil.Process(server.process.pid)
    assert post(server).status_code == 200
    before = process.memory_info().rss
    idle = []
    try:
        for number in range(count - 10):
            idle.append(connect(server, b"" if number % 10 else HEALTH))  # noqa: PERF401
        for connection in idle[::10]:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert metric(server, "rectokens_connections") >= count - 10
        assert (process.memory_info().rss - before) / count < 64 << 10
        assert post(server).status_code == 200
        # Beyond the limit the oldest idle ones go, and still everybody gets in.
        for _ in range(50):
            idle.append(connect(server))  # noqa: PERF401
        assert post(server).status_code == 200
        closed = metric(server, 'rectokens_connections_closed_total{reason="made_room"}')
        assert 40 <= closed <= 80
        assert idle[1].recv(1) == b""
        idle[-1].sendall(HEALTH)
        assert idle[-1].recv(4096).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in idle:
            connection.close()
    wait_until(lambda: metric(server, "rectokens_connections") <= 5)


def test_slow_loris_clients_are_sent_away_and_others_are_answered(start_process):
    server = start_process("ok", "http.head_timeout_s=1.5")
    server.read_until("release active")
    slow = [connect(server, b"POST /v1/recommend HTTP/1.1\r\nX-Slow: ") for _ in range(200)]
    ends = time.monotonic() + LIMIT_S
    alive, refused = list(slow), 0
    while alive and time.monotonic() < ends:
        assert post(server).status_code == 200
        for connection in list(alive):
            connection.setblocking(False)
            try:
                answer = connection.recv(4096)
            except BlockingIOError:
                with suppress(ConnectionError):
                    connection.send(b"x")
                continue
            except ConnectionError:
                answer = b""
            alive.remove(connection)
            refused += answer.startswith(b"HTTP/1.1 408 ")
            connection.close()
    assert not alive
    # Who was sending just when it was closed may get a reset instead.
    assert refused > 100
    assert metric(server, 'rectokens_rejected_total{reason="head_timeout"}') == 200
    wait_until(lambda: metric(server, "rectokens_connections") <= 5)


def mutated(rng: random.Random) -> bytes:
    """A request with something wrong, or nothing like a request."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(1, 400))
    data = bytearray(rng.choice([POST, HEALTH, POST + HEALTH]))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randrange(1, 20)]
            case 2:
                data[place:place] = rng.randbytes(rng.randrange(1, 8))
            case 3:
                data[place:place] = rng.choice(
                    [b"\r\n", b"\n", b"\x00", b": ", b"\r\n\r\n", b"%00"]
                )
            case 4:
                data[place:place] = b"Transfer-Encoding: chunked\r\nfffffffffffff\r\n"
            case 5:
                data += data[place:]
        if not data:
            return b"\r"
    return bytes(data)


def test_malformed_requests_are_answered_without_a_server_error(start_process):
    server = start_process(
        "ok", "http.head_timeout_s=0.3", "limits.body_timeout_s=0.3", "http.keep_alive_s=1"
    )
    server.read_until("release active")
    rng = random.Random(7)
    statuses = []
    for _ in range(FUZZED):
        sent = mutated(rng)
        with connect(server) as connection:
            answer = b""
            with suppress(ConnectionError):
                connection.sendall(sent)
                if rng.random() < 0.7:
                    connection.shutdown(socket.SHUT_WR)
                while chunk := connection.recv(65_536):
                    answer += chunk
        found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
        assert all(status < 500 for status in found), (sent, answer)
        for body in re.findall(rb'\{"error".*?\}\}', answer):
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        statuses += found
    assert statuses.count(400) > FUZZED / 10
    assert post(server).status_code == 200
    assert metric(server, 'rectokens_rejected_total{reason="internal"}') == 0
    server.terminate()
    code, rest = server.wait()
    assert code == 0
    assert "Traceback" not in rest
