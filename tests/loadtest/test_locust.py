"""Locust itself, in a process of its own (it patches whatever imports it), against a service
without weights: exit codes, reports, refusals, steps."""

from __future__ import annotations

import csv
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import LIMIT_S

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="locust is not installed"
)

ROOT = Path(__file__).parents[2]
DUMMY = ROOT / "tests" / "server" / "dummy_service.py"
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("RECTOKENS_", "LOCUST_"))},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """``serve(behaviour, "setting=value", ...)``: base URL of a service."""
    started = []

    def start(behaviour: str, *flags: str) -> str:
        process = subprocess.Popen(
            [sys.executable, str(DUMMY), "0", behaviour, "log_level=error", *flags],
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        started.append(process)
        return process.stdout.readline().strip()  # once it is ready

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.communicate(timeout=LIMIT_S)


@pytest.fixture(scope="module")
def slow(serve) -> str:
    """Half a second a batch."""
    return serve("slow")


class Run:
    def __init__(self, folder: Path, config: str, host: str, *flags: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "locust", "--config", f"loadtest/{config}.conf"]
        command += ["--host", host, "--csv", str(folder / "x"), "--html", str(folder / "x.html")]
        result = subprocess.run(
            [*command, *flags],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        self.code, self.log = result.returncode, result.stderr
        assert "Traceback" not in self.log, self.log
        # Shown where a test fails.
        print(self.log)

    def rows(self, part: str) -> list[dict[str, str]]:
        with (self.folder / f"x_{part}.csv").open() as file:
            return list(csv.DictReader(file))

    def stats(self, name: str) -> dict[str, str]:
        return next((row for row in self.rows("stats") if row["Name"] == name), {})


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_run_within_its_thresholds(serve, tmp_path, loop):
    flags = ("--run-time", "3s", "--max-p99-ms", "60000", "--think-s", "0.2")
    run = Run(tmp_path, loop, serve("ok"), *flags)
    assert run.code == 0, run.log
    assert "about 30 items and 2 constraint sets" in run.log
    found = run.stats("/v1/recommend")
    assert int(found["Request Count"]) > 0
    assert found["Failure Count"] == "0"
    assert "<html" in (tmp_path / "x.html").read_text()


def test_a_slow_server_fails_the_run(slow, tmp_path):
    run = Run(tmp_path, "closed", slow, "--run-time", "2s", "--max-p99-ms", "100")
    assert run.code == 1
    assert "threshold broken: p99 is" in run.log


def test_refusals_are_errors_but_no_quick_answers(serve, tmp_path):
    url = serve("slow", "batching.max_queued_requests=1", "batching.max_requests=1")
    flags = ("--run-time", "3s", "--max-p99-ms", "60000", "--arrivals", "constant")
    run = Run(tmp_path, "open", url, *flags)
    assert run.code == 1
    assert "had no right answer" in run.log
    refused, others = run.stats("/v1/recommend (refused)"), run.stats("/v1/recommend")
    assert int(refused["Request Count"]) > int(others["Request Count"]) > 0
    assert float(others["Min Response Time"]) >= 400  # half a second, rounded


def test_an_open_loop_is_bounded_and_says_what_was_not_sent(slow, tmp_path):
    flags = ("--run-time", "3s", "--max-p99-ms", "60000", "--max-open", "2")
    run = Run(tmp_path, "open", slow, *flags)
    assert run.code == 1
    assert any("not sent: 2 are unanswered" in row["Error"] for row in run.rows("failures"))


def test_latency_counts_from_when_a_request_was_to_be_sent(slow):
    script = """
import sys, time
from types import SimpleNamespace
from loadtest.users import OpenLoopUser, RectokensUser, Session
from loadtest.traffic import Traffic, Visit
from locust.env import Environment
options = SimpleNamespace(traffic_seed=0, max_open=1, api_key=None, arrivals="constant")
RectokensUser.session = session = Session(options)
session.traffic = Traffic(["B001"])
OpenLoopUser.host = sys.argv[1]
environment = Environment(user_classes=[OpenLoopUser])
environment.events.request.add_listener(
    lambda exception, response_time, **_: print(int(exception is not None), response_time)
)
user = OpenLoopUser(environment)
visit = Visit("/v1/recommend", {"history": ["B001"], "top_k": 1, "exclude_history": True}, None)
user.make(visit)
user.make(visit, due_s=time.perf_counter() - 100)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, slow],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    (failed, as_sent), (failed_too, as_due) = (line.split() for line in result.stdout.splitlines())
    assert failed == failed_too == "0"
    assert 500 <= float(as_sent) < 100_000
    assert float(as_due) >= 100_500


def test_steps_end_at_the_knee(slow, tmp_path):
    flags = ("--step-users", "2", "--step-factor", "1000", "--step-s", "4", "--max-open", "20")
    run = Run(tmp_path, "steps", slow, *flags, "--max-p99-ms", "60000")
    assert run.code == 0, run.log
    assert [row["users"] for row in run.rows("steps")] == ["2", "2000"]
    assert "knee: {'users': 2," in run.log


def test_no_knee_where_the_first_step_is_too_much(slow, tmp_path):
    run = Run(tmp_path, "steps", slow, "--step-s", "4", "--max-p99-ms", "100")
    assert run.code == 1
    assert "no knee" in run.log


def test_a_server_that_is_not_there_is_told_at_once(tmp_path):
    run = Run(tmp_path, "open", "http://127.0.0.1:9")
    assert run.code == 2
    assert "POST http://127.0.0.1:9/v1/recommend" in run.log


class FakeStore:
    """``/admin/releases``, activations and their jobs, as the service answers them."""

    def __init__(self, *states: str) -> None:
        self.states = {f"r{place}": state for place, state in enumerate(states)}
        self.activated: list[str] = []
        self.job_state = "succeeded"

    def answer(self, method: str, path: str) -> Any:
        if path == "/admin/releases":
            return {"releases": [{"version": v, "state": s} for v, s in self.states.items()]}
        if method == "POST":
            self.activated.append(path.split("/")[3])
            return {"id": "1", "state": "queued"}
        return {"id": "1", "state": self.job_state}


@pytest.fixture
def admin() -> Iterator[Callable[[FakeStore], str]]:
    servers = []

    def start(store: FakeStore) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.headers["Authorization"] != "Bearer the key":
                    self.send_error(401)
                    return
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.dumps(store.answer(self.command, self.path)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 (the name that http.server looks for)

            def log_message(self, *args: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_swaps_go_round_and_end_where_they_began(admin):
    from loadtest.catalog import Swapper

    store = FakeStore("available", "active", "damaged", "available")
    swapper = Swapper(admin(store), "the key")
    for _ in range(10):
        swapper.swap()
    swapper.restore()
    assert set(store.activated) <= {"r0", "r1", "r3"}
    assert store.activated[0] != "r1"
    assert store.activated[-1] == "r1"
    after = ["r1", *store.activated]
    assert all(now != then for now, then in pairwise(after))


def test_swaps_that_cannot_be_made_are_told(admin):
    from loadtest.catalog import LoadTestError, Swapper

    with pytest.raises(LoadTestError, match="401"):
        Swapper(admin(FakeStore("active", "available")), "another key")
    with pytest.raises(LoadTestError, match="two sound releases"):
        Swapper(admin(FakeStore("active", "damaged")), "the key")
    store = FakeStore("active", "available")
    swapper = Swapper(admin(store), "the key")
    store.job_state = "failed"
    with pytest.raises(LoadTestError, match="r1 was not activated"):
        swapper.swap()
