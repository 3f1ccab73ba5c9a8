"""The compose file, really started: `make test-deploy` builds the images and runs this.

Without a Docker engine: podman with runc, all containers in a network namespace that has loopback
only. What differs from `docker compose up` is in ``for_podman``; the rest is the file as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

pytestmark = pytest.mark.skipif(
    os.environ.get("DEPLOY_TESTS") != "1", reason="takes minutes and images; run make test-deploy"
)

DEPLOY = Path(__file__).parents[2] / "deploy"
PROJECT = "rectokens-test"
SIDECARS = "localhost/rectokens-sidecars:debian"
STARTED = ("server-cpu", "redis", "worker", "proxy", "reverse-proxy", "prometheus")
NAMES = ("server", "proxy", "redis", "prometheus")
ADMIN_KEY = "of-the-test-and-nobody-else"
OUTSIDE, SERVER, PROMETHEUS = (f"http://127.0.0.1:{port}" for port in (8080, 8000, 9090))
HISTORY = ["B0001", "B0042"]


def for_podman(content: dict[str, Any], image: str) -> dict[str, Any]:
    """The compose file for one network namespace, small limits of this machine, and no Docker."""
    services = {}
    for name in ("demo", *STARTED):
        service = dict(content["services"][name])
        for key in ("networks", "ports", "build", "depends_on", "env_file", "profiles"):
            service.pop(key, None)
        # One network for all, so names are addresses of their own; nothing is waited for here.
        service["network_mode"] = "host"
        service["extra_hosts"] = [f"{one}:127.0.0.1" for one in NAMES]
        service["healthcheck"] = {"disable": True}
        service["ulimits"] = {kind: {"soft": 1_024, "hard": 4_096} for kind in ("nofile", "nproc")}
        service["image"] = image if "rectokens" in service["image"] else SIDECARS
        service["container_name"] = f"{PROJECT}-{name}"
        service["volumes"] = [
            f"{DEPLOY}/{one.removeprefix('./')}" if one.startswith("./") else one
            for one in (
                volume.replace("${STORE:-", "").replace("${SOURCES:-", "").replace("}", "")
                for volume in service["volumes"]
            )
        ]
        services[name] = service
    services["demo"]["command"] = [*services["demo"]["command"], "--train-seconds", "10"]
    services["server-cpu"]["environment"] = {
        **services["server-cpu"]["environment"],
        # What docs/deploy.md tells to write into server.env for jobs in Redis.
        "RECTOKENS_JOBS__DATABASE": "redis://redis:6379/0",
        "RECTOKENS_JOBS__START_WORKER": "false",
        "RECTOKENS_ADMIN__KEYS": ADMIN_KEY,
        "RECTOKENS_CPU_THREADS": "1",
    }
    return {"services": services, "volumes": dict.fromkeys(content["volumes"])}


def podman(*arguments: str, timeout_s: float = 120) -> str:
    done = subprocess.run(
        ["podman", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until(check: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    """The first true value of ``check``; it may raise what happens before things are up."""
    problem: object = None
    for _ in range(int(seconds * 2)):
        try:
            if value := check():
                return value
        except (httpx.TransportError, KeyError, ValueError, IndexError) as error:
            problem = error
        time.sleep(0.5)
    logs = {
        name: subprocess.run(
            ["podman", "logs", "--tail", "15", f"{PROJECT}-{name}"], capture_output=True, text=True
        )
        for name in STARTED
    }
    told = "\n".join(f"--- {name}\n{log.stdout}{log.stderr}" for name, log in logs.items())
    pytest.fail(f"not within {seconds} s: {what} ({problem})\n{told}")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    image = os.environ["DEPLOY_IMAGE"]
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    file = tmp_path_factory.mktemp("compose") / "compose.yaml"
    file.write_text(yaml.safe_dump(for_podman(content, image)))
    compose = [sys.executable, "-m", "podman_compose", "-p", PROJECT, "-f", str(file)]
    compose += ["--podman-run-args=--runtime=runc"]

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [*compose, *arguments], capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]

    subprocess.run([*compose, "down", "-v"], capture_output=True, timeout=200, check=False)
    try:
        run("up", "demo")
        # podman-compose does not say so where it failed.
        code = podman("inspect", "--format", "{{.State.ExitCode}}", f"{PROJECT}-demo").strip()
        assert code == "0", podman("logs", "--tail", "20", f"{PROJECT}-demo")
        # The order that depends_on gives; its conditions are waited for here.
        run("up", "-d", "redis", "server-cpu")
        until(lambda: httpx.get(f"{SERVER}/ready").status_code == 200, "the server is ready")
        run("up", "-d", "worker", "proxy", "prometheus", "reverse-proxy")
        until(
            lambda: httpx.get(f"{OUTSIDE}/proxy/v1/models").status_code == 200, "the proxy answers"
        )
        yield
    finally:
        subprocess.run([*compose, "down", "-v"], capture_output=True, timeout=200, check=False)


@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "rules.test.yml")]
)
def test_promtool(arguments: tuple[str, ...]) -> None:
    """Here too, for a machine that has none of its own."""
    options = ("--rm", "--runtime=runc", "--network=none", "--ulimit=nofile=1024:4096")
    mount = f"{DEPLOY / 'prometheus'}:/rules:ro"
    limits = "--ulimit=nproc=1024:4096"
    command = ("--entrypoint=promtool", SIDECARS, *arguments)
    podman("run", *options, limits, f"--volume={mount}", "--workdir=/rules", *command)


def recommend(**body: Any) -> httpx.Response:
    return httpx.post(f"{OUTSIDE}/v1/recommend", json={"history": HISTORY, **body}, timeout=60)


@pytest.mark.usefixtures("started")
class TestRunning:
    def test_a_request_through_the_reverse_proxy(self) -> None:
        response = recommend(top_k=5)
        assert response.status_code == 200, response.text
        items = [item["item_id"] for item in response.json()["items"]]
        assert len(set(items) - set(HISTORY)) == 5

    def test_lines_come_through_as_they_are_made(self) -> None:
        body = {"requests": [{"history": HISTORY[:1]}, {"history": HISTORY}]}
        with httpx.stream(
            "POST", f"{OUTSIDE}/v1/recommend/batch", json=body, timeout=60
        ) as response:
            lines = [json.loads(line) for line in response.iter_lines() if line]
        assert response.status_code == 200
        assert len(lines) >= 2

    def test_a_completion_through_both_proxies(self) -> None:
        body = {"prompt": "".join(f"<item:{one}>" for one in HISTORY), "n": 3}
        response = httpx.post(f"{OUTSIDE}/proxy/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        assert len(response.json()["choices"]) == 3

    @pytest.mark.parametrize("path", ["/metrics", "/admin/jobs", "/proxy/metrics", "/docs"])
    def test_what_is_inside_stays_inside(self, path: str) -> None:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert httpx.get(f"{OUTSIDE}{path}", headers=headers).status_code == 404

    def test_prometheus_has_scraped_both(self) -> None:
        recommend()

        def value(query: str) -> float:
            answer = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": query}).json()
            return float(answer["data"]["result"][0]["value"][1])

        until(lambda: value('up{job="rectokens"}') == 1, "the server is scraped")
        until(lambda: value('up{job="rectokens-proxy"}') == 1, "the proxy is scraped")
        answered = 'rectokens_requests_total{route="/v1/recommend",status="200"}'
        until(lambda: value(answered) >= 1, "the request is counted")
        until(lambda: value("rectokens:queue_fill:ratio") >= 0, "rules are recorded")
        groups = httpx.get(f"{PROMETHEUS}/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
        assert not any(rule.get("lastError") for group in groups for rule in group["rules"])

    def test_a_job_goes_through_redis_to_the_worker(self) -> None:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        release = httpx.get(f"{SERVER}/ready").json()["release_version"]
        url = f"{SERVER}/admin/releases/{release}/activate"
        response = httpx.post(url, headers=headers, json={}, timeout=60)
        assert response.status_code == 202, response.text
        job = f"{SERVER}/admin/jobs/{response.json()['id']}"

        def ended() -> Any:
            told = httpx.get(job, headers=headers).json()
            return told if told["state"] not in ("queued", "running") else None

        assert until(ended, "the job has ended")["state"] == "succeeded"
        keys = podman("exec", f"{PROJECT}-redis", "redis-cli", "--scan")
        assert "rectokens" in keys

    def test_the_container_is_as_small_as_it_can_be(self) -> None:
        name = f"{PROJECT}-server-cpu"
        (told,) = json.loads(podman("inspect", name))
        assert told["Config"]["User"] == "10001:10001"
        assert told["HostConfig"]["ReadonlyRootfs"] is True
        assert not told["EffectiveCaps"]
        assert "no-new-privileges" in told["HostConfig"]["SecurityOpt"]
        missing = (
            "import shutil, sys; sys.exit(any(map(shutil.which, ('gcc', 'cc', 'pip', 'make'))))"
        )
        podman("exec", name, "python", "-c", missing)

    def test_the_health_check_of_the_image(self) -> None:
        image = os.environ["DEPLOY_IMAGE"]
        (told,) = json.loads(podman("image", "inspect", image))
        kind, *command = told["Healthcheck"]["Test"]
        assert kind == "CMD"
        podman("exec", f"{PROJECT}-server-cpu", *command)
        labels = told["Config"]["Labels"]
        assert labels["org.opencontainers.image.title"] == "rectokens"
        assert labels["org.opencontainers.image.revision"] not in ("", "unknown")

    def test_it_ends_when_it_is_told_to(self) -> None:
        """Last: SIGTERM, drained, exit code 0."""
        name = f"{PROJECT}-server-cpu"
        podman("stop", "--time", "45", name)
        assert podman("inspect", "--format", "{{.State.ExitCode}}", name).strip() == "0"
        response = recommend()
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_unreachable"
