"""The service as a process: sockets, signals, exit codes, logs."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from server.run import ListenError, listen
from tests.metrics_page import sample_of
from tests.waiting import LIMIT_S, wait_until

BODY = b'{"history": ["B001"], "top_k": 2}'
JSON = {"Content-Type": "application/json"}


def post(server, content=BODY, **kwargs):
    return httpx.post(
        f"{server.url}/v1/recommend", content=content, headers=JSON, timeout=LIMIT_S, **kwargs
    )


def get(server, path):
    return httpx.get(f"{server.url}{path}", timeout=LIMIT_S)


def metric(server, line):
    return sample_of(get(server, "/metrics").text, line)


def raw(server, *chunks: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S)
    for chunk in chunks:
        connection.sendall(chunk)
    return connection


def read_response(connection: socket.socket) -> tuple[int, dict]:
    data = b""
    while chunk := connection.recv(65_536):
        data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        try:
            return int(head.split()[1]), json.loads(body)
        except (ValueError, IndexError):
            continue
    raise AssertionError(f"connection closed after {data!r}")


HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_life_from_start_to_sigterm(start_process):
    """Running requests are answered, the exit code is 0, the log is JSON without user data."""
    server = start_process("told", "log_level=debug")
    server.read_until("release active")
    response = post(server, b'{"history": ["B001", "SECRET"], "top_k": 2}')
    assert [item["item_id"] for item in response.json()["items"]] == ["B000", "B002"]
    assert post(server, b'{"history": ["SECRET"]}').status_code == 422
    assert get(server, "/SECRET").status_code == 404

    server.tell("hold")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = [pool.submit(post, server) for _ in range(3)]
        wait_until(
            lambda: (
                metric(server, "rectokens_queue_requests")
                + metric(server, "rectokens_batch_requests_sum")
                >= 4
            )
        )
        server.terminate()
        server.read_until("draining")
        # Still listening, so that a load balancer can see it.
        ready = get(server, "/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
        server.tell("go")
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
    code, rest = server.wait()
    assert code == 0
    assert server.stdout == f"{server.url}\n"

    lines = server.lines + [json.loads(line) for line in rest.splitlines()]
    assert lines[-1]["event"] == "stopped"
    assert all({"event", "level", "timestamp"} <= set(line) for line in lines)
    statuses = [
        line["status"]
        for line in lines
        if line["event"] == "request" and line["route"] != "/metrics"
    ]
    assert statuses[:3] == [200, 422, 404]
    assert all(line["request_id"] for line in lines if line["event"] == "request")
    assert "SECRET" not in json.dumps(lines)
    assert "B001" not in json.dumps(lines)


def test_the_drain_is_bounded(start_process):
    server = start_process("told", "drain_timeout_s=0.05")
    server.read_until("release active")
    server.tell("hold")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(post, server)
        wait_until(lambda: metric(server, "rectokens_batch_requests_count") == 1)
        server.terminate()
        server.read_until("drain timed out")
        server.tell("go")
        assert server.wait()[0] == 0
        answer.exception()


def test_sigterm_while_loading_ends_at_once(start_process):
    server = start_process("loading")
    assert get(server, "/health").status_code == 200
    assert get(server, "/ready").status_code == 503
    server.terminate()
    assert server.wait()[0] == 0


def test_a_release_that_cannot_be_loaded_ends_it_with_one_message():
    script = Path(__file__).with_name("dummy_service.py")
    result = subprocess.run(
        [sys.executable, str(script), "0", "broken", "log_level=error"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "error: the model folder is empty\n"


def test_an_address_that_is_taken_is_one_message():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"127.0.0.1 port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ListenError, match=r"host\.invalid"):
        listen("host.invalid", 0)


def leave_while_queued(server):
    """Clients that close their connection free their places."""
    before = metric(server, "rectokens_batch_requests_count")
    server.tell("hold")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        head = pool.submit(post, server)
        wait_until(lambda: metric(server, "rectokens_batch_requests_count") > before)
        length = f"Content-Length: {len(BODY)}\r\n\r\n".encode()
        leavers = [raw(server, HEAD + length + BODY) for _ in range(3)]
        for leaver in leavers:
            leaver.close()
        gone = 'rectokens_rejected_total{reason="client_gone"}'
        wait_until(lambda: metric(server, gone) >= 3)
        server.tell("go")
        assert head.result().status_code == 200
    assert metric(server, "rectokens_queue_beam_rows") == 0


def test_hostile_clients_are_answered_and_others_do_not_notice(start_process):
    server = start_process("told", "limits.max_body_bytes=2000", "limits.body_timeout_s=0.3")
    server.read_until("release active")

    declared = raw(server, HEAD + b"Content-Length: 99999999\r\n\r\n")
    assert read_response(declared)[0] == 413

    # At once: the time for a body is short here.
    chunks = 3 * (b"400\r\n" + b" " * 0x400 + b"\r\n")
    chunked = raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    status, body = read_response(chunked)
    assert (status, body["error"]["code"]) == (413, "body_too_large")

    slow = raw(server, HEAD + b'Content-Length: 500\r\n\r\n{"hist')
    status, body = read_response(slow)
    assert (status, body["error"]["code"]) == (408, "body_timeout")

    no_utf8 = b'{"history": ["\xff\xfe"]}'
    response = post(server, no_utf8)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_json")

    gone = raw(server, HEAD + b'Content-Length: 500\r\n\r\n{"hist')
    gone.close()

    assert raw(server, b"nonsense\r\n\r\n").recv(100).startswith(b"HTTP/1.1 400")
    assert post(server).status_code == 200
    leave_while_queued(server)
    server.terminate()
    code, rest = server.wait()
    assert code == 0
    assert "Traceback" not in rest
