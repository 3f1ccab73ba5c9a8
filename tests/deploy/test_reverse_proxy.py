"""The reverse proxy's own files, run by nginx in front of a server that answers as told."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import port_to_come
from tests.waiting import LIMIT_S, ended, wait_until

FOLDER = Path(__file__).parents[2] / "deploy" / "nginx"

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


class Upstream(http.server.ThreadingHTTPServer):
    """Answers everything; a streamed answer comes in pieces, as ``go_on`` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.go_on = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.path, headers, body))
        self.send_response(200)
        if b"stream" not in body:
            content = json.dumps({"path": self.path}).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in (b'{"first": 1}\n', b'{"second": 2}\n'):
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()
            assert self.server.go_on.wait(LIMIT_S)
        self.wfile.write(b"0\r\n\r\n")


@dataclass
class Running:
    """nginx with the repository's files but for ports, names and where it listens."""

    url: str
    tls_url: str
    plain_url: str
    upstream: Upstream
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=LIMIT_S)


def write_files(folder: Path, upstream_port: int, ports: dict[str, int]) -> Path:
    """A copy for this machine: addresses and certificates are its own, all else as it is."""
    shutil.copytree(FOLDER, folder / "nginx")
    target = folder / "nginx"
    main = target / "nginx.conf"
    text = main.read_text()
    text = text.replace("/tmp/", f"{folder}/").replace("/dev/stdout", f"{folder}/access.log")
    text = text.replace("/dev/stderr", f"{folder}/error.log").replace(
        "worker_processes auto", "worker_processes 1"
    )
    main.write_text(text)
    upstreams = target / "upstreams.conf"
    text = re.sub(
        r"server (server|proxy):\d+", f"server 127.0.0.1:{upstream_port}", upstreams.read_text()
    )
    upstreams.write_text(text)
    for name, source, listen in (
        ("plain", target / "servers" / "plain.conf", "8080"),
        ("tls", target / "tls" / "tls.conf", "8443"),
        ("redirect", target / "tls" / "redirect.conf", "8080"),
    ):
        text = source.read_text().replace(f"listen {listen}", f"listen 127.0.0.1:{ports[name]}")
        text = text.replace("/etc/nginx/certificates", str(folder))
        (target / "servers" / f"{name}.conf").write_text(text)
    return main


def answers(process: subprocess.Popen[str], url: str) -> httpx.Response | None:
    """What nginx says, None before it listens."""
    assert process.poll() is None, process.communicate()
    try:
        return httpx.get(url, timeout=LIMIT_S)
    except httpx.TransportError:
        return None


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("nginx")
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    made += [
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-days",
        "2",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    made += ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run(made, check=True, capture_output=True)
    upstream = Upstream()
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    ports = {name: port_to_come() for name in ("plain", "tls", "redirect")}
    main = write_files(folder, upstream.server_address[1], ports)
    # As root it would give its files to another user; a container starts it as that user at once.
    command = ["nginx", "-c", str(main), "-g", "daemon off; user root;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    result = Running(
        f"http://127.0.0.1:{ports['plain']}",
        f"https://localhost:{ports['tls']}",
        f"http://localhost:{ports['redirect']}",
        upstream,
        folder / "access.log",
    )
    try:
        wait_until(lambda: answers(process, f"{result.url}/health"))
        yield result
    finally:
        process.terminate()
        ended(process)
        upstream.shutdown()


def test_nginx_accepts_the_files(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    main = write_files(tmp_path / "plain", 9, {"plain": 8080, "tls": 8443, "redirect": 8080})
    for name in ("tls", "redirect"):
        (main.parent / "servers" / f"{name}.conf").unlink()
    done = subprocess.run(["nginx", "-t", "-c", str(main)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.replace('the "user" directive', "")


@pytest.mark.parametrize(
    ("asked", "reached"),
    [
        ("/health", "/health"),
        ("/v1/recommend", "/v1/recommend"),
        ("/v1/recommend/batch", "/v1/recommend/batch"),
        ("/proxy/v1/completions", "/v1/completions"),
        ("/proxy/v1/chat/completions", "/v1/chat/completions"),
    ],
)
def test_routes_for_callers_pass(running: Running, asked: str, reached: str) -> None:
    assert running.client.get(asked).json() == {"path": reached}


@pytest.mark.parametrize(
    "path",
    [
        *("/admin/jobs", "/admin", "/metrics", "/docs", "/openapi.json", "/", "/v1/recommend/"),
        *("/proxy/metrics", "/proxy/v1/../metrics", "/v1/..%2fadmin/jobs", "//admin/jobs"),
        *("/v1/recommend/../../admin/jobs", "/v1/models/..;/admin/jobs", "/V1/recommend"),
    ],
)
def test_all_else_stays_outside(running: Running, path: str) -> None:
    before = len(running.upstream.seen)
    # Not through a client that tidies paths up.
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert json.loads(body)["error"]["code"] == "not_found"
    assert len(running.upstream.seen) == before


def test_a_streamed_answer_comes_piece_by_piece(running: Running) -> None:
    """The second piece is made only after the first one has arrived."""
    running.upstream.go_on.clear()
    for path in ("/v1/completions", "/v1/recommend/batch", "/proxy/v1/chat/completions"):
        with running.client.stream("POST", path, content=b"stream") as response:
            pieces = response.iter_lines()
            assert json.loads(next(pieces)) == {"first": 1}
            running.upstream.go_on.set()
            assert json.loads(next(pieces)) == {"second": 2}
        running.upstream.go_on.clear()


def test_bodies_are_limited_by_route(running: Running) -> None:
    body = b"x" * ((1 << 20) + 1)
    response = running.client.post("/v1/recommend", content=body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert response.headers["content-type"] == "application/json"
    assert running.client.post("/v1/completions", content=body).status_code == 200
    assert running.upstream.seen[-1][2] == body


def test_what_a_client_claims_about_itself_is_not_passed_on(running: Running) -> None:
    headers = {"X-Forwarded-For": "10.1.2.3", "X-Request-ID": "mine-1", "Authorization": "Bearer k"}
    running.client.get("/v1/models", headers=headers)
    seen = running.upstream.seen[-1][1]
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert seen["x-forwarded-proto"] == "http"
    assert seen["x-request-id"] == "mine-1"
    assert seen["authorization"] == "Bearer k"
    running.client.get("/v1/models", headers={"X-Request-ID": 'a"b\\c'})
    assert re.fullmatch("[0-9a-f]{32}", running.upstream.seen[-1][1]["x-request-id"])


def test_the_log_has_ids_and_no_secrets(running: Running) -> None:
    headers = {"X-Request-ID": "in-the-log", "Authorization": "Bearer SECRET"}
    running.client.post("/v1/recommend?q=SECRET", headers=headers, content=b"SECRET")

    def logged() -> list[dict[str, Any]]:
        lines = running.log.read_text().splitlines()
        return [one for one in map(json.loads, lines) if one["request_id"] == "in-the-log"]

    mine = wait_until(logged)
    assert (mine[0]["path"], mine[0]["status"]) == ("/v1/recommend", 200)
    assert "SECRET" not in running.log.read_text()


def test_a_service_that_is_gone_is_told_so(tmp_path: Path) -> None:
    port = port_to_come()
    main = write_files(tmp_path, 9, {"plain": port, "tls": 8443, "redirect": 8080})
    for name in ("tls", "redirect"):
        (main.parent / "servers" / f"{name}.conf").unlink()
    command = ["nginx", "-c", str(main), "-g", "daemon off; user root;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        response = wait_until(lambda: answers(process, f"http://127.0.0.1:{port}/v1/models"))
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_unreachable"
        assert response.headers["retry-after"] == "1"
        assert response.headers["x-request-id"]
    finally:
        process.terminate()
        ended(process)


def test_tls(running: Running) -> None:
    trust = ssl.create_default_context(cafile=str(running.log.parent / "fullchain.pem"))
    with httpx.Client(verify=trust, timeout=LIMIT_S) as client:
        response = client.get(f"{running.tls_url}/v1/models")
        assert response.json() == {"path": "/v1/models"}
        assert "max-age" in response.headers["strict-transport-security"]
        assert running.upstream.seen[-1][1]["x-forwarded-proto"] == "https"
        assert client.get(f"{running.tls_url}/metrics").status_code == 404
        moved = client.post(f"{running.plain_url}/v1/recommend?a=b", content=b"{}")
        assert moved.status_code == 308
        assert moved.headers["location"] == "https://localhost/v1/recommend?a=b"
