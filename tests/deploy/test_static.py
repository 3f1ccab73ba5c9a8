"""What is deployed agrees with the service: settings, routes, limits and pinned versions."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.settings import load_settings

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# Closing connections and the engine's last batch come after the drain (server/run.py, service.py).
AFTER_DRAIN_S = 3 + 5


def of_image(*names: str) -> dict[str, dict[str, Any]]:
    return {
        name: service
        for name, service in SERVICES.items()
        if service["image"].startswith(tuple(f"${{{one}_IMAGE:-" for one in names))
    }


def environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in service.get("environment", {}).items()}


# -- compose ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(of_image("CPU", "CUDA")))
def test_the_settings_of_a_container_are_accepted(name, monkeypatch):
    for variable, value in environment(SERVICES[name]).items():
        assert variable.startswith("RECTOKENS_")
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    if name in ("server", "server-cpu", "proxy"):
        grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace_s > settings.drain_timeout_s + AFTER_DRAIN_S
    if name.startswith("server"):
        limit_gib = int(re.search(r":-(\d+)g", memory(SERVICES[name])).group(1))
        assert settings.jobs.memory_limit_gib < limit_gib


def memory(service: dict[str, Any]) -> str:
    return str(service["deploy"]["resources"]["limits"]["memory"])


@pytest.mark.parametrize("name", list(SERVICES))
def test_a_container_may_do_no_more_than_it_must(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].partition(":")[0] not in ("", "0", "root")
    assert memory(service)
    assert service["deploy"]["resources"]["limits"]["pids"]
    for volume in service["volumes"]:
        if volume.startswith(("./", "../")):
            assert volume.endswith(":ro")
            assert (DEPLOY / volume.split(":")[0]).exists()
    image = service["image"].partition(":-")[2].rstrip("}")
    assert re.search(r":v?\d", image), f"{image} is not pinned"


def test_images_of_this_project_have_its_version():
    for name, flavour in (("CPU", "cpu"), ("CUDA", "cuda")):
        assert of_image(name)
        for service in of_image(name).values():
            assert service["image"] == f"${{{name}_IMAGE:-rectokens:{VERSION}-{flavour}}}"
            assert service["build"] == {"context": "..", "target": flavour}
    assert (ROOT / "Dockerfile").read_text().count(f'image.version="{VERSION}"') == 2


def test_only_the_reverse_proxy_is_reachable_from_outside():
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            assert name == "reverse-proxy" or port.startswith("127.0.0.1:")
        if "ports" not in service:
            assert set(service["networks"]) == {"inside"}
    assert COMPOSE["networks"]["inside"] == {"internal": True}


def test_what_is_waited_for_tells_its_health():
    for service in SERVICES.values():
        for name, on in service.get("depends_on", {}).items():
            other = SERVICES[name]
            if on["condition"] == "service_completed_successfully":
                assert other["restart"] == "no"
            else:
                assert on["condition"] == "service_healthy"
                # Images of this project bring a check of their own.
                assert "test" in other.get("healthcheck", {}) or (
                    "build" in other and "healthcheck" not in other
                )
            if "profiles" in other and "profiles" not in service:
                assert on["required"] is False


def test_one_command_starts_it_with_the_demo():
    default = (DEPLOY / ".env").read_text().split("COMPOSE_PROFILES=")[-1].split()[0]
    assert set(default.split(",")) == {"gpu", "demo"}
    gpu = SERVICES["server"]
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert SERVICES["server-cpu"]["profiles"] == ["cpu"]
    assert "reservations" not in SERVICES["server-cpu"]["deploy"]["resources"]


# -- images ----------------------------------------------------------------------------------


def test_the_lock_has_every_dependency_in_a_version_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(one) for one in project["dependencies"]]
    for extra in ("server", "catalog", "hf", "otel", "redis", "postgres"):
        wanted += [Requirement(one) for one in extras[extra]]
    pinned: dict[str, str] = {}
    for line in (DEPLOY / "requirements.lock").read_text().splitlines():
        if line.startswith("#"):
            continue
        (specifier,) = Requirement(line).specifier
        assert specifier.operator == "==", line
        pinned[canonicalize_name(Requirement(line).name)] = specifier.version
    for one in wanted:
        if one.name not in ("rectokens", "torch"):
            assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one
    assert not {"torch", "triton"} & set(pinned)


def test_the_images_have_the_torch_that_is_tested():
    tested = re.search(r"^torch==(\S+)$", (ROOT / "constraints-cpu.txt").read_text(), re.MULTILINE)
    versions = re.findall(r"ARG TORCH_VERSION=(\S+)", (ROOT / "Dockerfile").read_text())
    assert versions == [tested.group(1)] * 2


def test_nothing_gets_into_an_image_unasked():
    """The context is a list of what is in, not of what is out."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    asked = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    assert asked == {path for line in copied for path in line.split()}


# -- the reverse proxy -----------------------------------------------------------------------


def locations() -> dict[str, str]:
    """The body of each exact location, by its path."""
    text = (DEPLOY / "nginx" / "routes.conf").read_text()
    return dict(re.findall(r"^location = (\S+) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


def public_routes() -> set[str]:
    """Of both apps, those that callers need."""
    from server.app import create_app

    app = create_app(load_settings(), lambda: None)
    paths = set(app.openapi()["paths"])
    return {path for path in paths if path.startswith("/v1/")} | {"/health", "/ready"}


def test_exactly_what_callers_need_passes():
    passed = {path for path in locations() if not path.startswith("/proxy/")}
    assert passed == public_routes()
    of_the_proxy = {path for path in locations() if path.startswith("/proxy/")}
    assert of_the_proxy == {
        f"/proxy/v1/{name}" for name in ("models", "completions", "chat/completions")
    }
    text = (DEPLOY / "nginx" / "routes.conf").read_text()
    # Everything else: one more location, and it answers itself.
    assert re.findall(r"^location (?!=|@)(.*?)\}", text, re.MULTILINE | re.DOTALL) == [
        "/ {\n    return 404;\n"
    ]


def test_bodies_and_times_are_those_of_the_settings():
    limits, proxy = load_settings().limits, load_settings().proxy
    most = dict.fromkeys(locations(), limits.max_body_bytes)
    most["/v1/recommend/batch"] = limits.max_bulk_body_bytes
    most["/v1/completions"] = limits.max_completion_body_bytes
    most |= {path: proxy.max_body_bytes for path in most if path.startswith("/proxy/")}
    for path, body in locations().items():
        found = re.search(r"client_max_body_size (\d+)m;", body)
        if "/models" not in path:
            assert (int(found.group(1)) if found else 1) << 20 == most[path], path
    seconds = {
        path: int(found.group(1))
        for path, body in locations().items()
        if (found := re.search(r"proxy_read_timeout (\d+)s;", body))
    }
    request_s = limits.max_timeout_ms / 1000
    for path in ("/v1/recommend", "/v1/score", "/v1/completions"):
        assert request_s < seconds[path] <= request_s + 10
    assert limits.bulk_timeout_s < seconds["/v1/recommend/batch"] <= limits.bulk_timeout_s + 10
    for path in ("/proxy/v1/completions", "/proxy/v1/chat/completions"):
        assert proxy.read_timeout_s < seconds[path] <= proxy.read_timeout_s + 10
    kept = re.findall(
        r"keepalive_timeout (\d+)s", (DEPLOY / "nginx" / "upstreams.conf").read_text()
    )
    assert all(int(one) < load_settings().http.keep_alive_s for one in kept)


def test_answers_in_pieces_are_not_gathered():
    for path in ("/v1/recommend/batch", "/v1/completions", "/proxy/v1/chat/completions"):
        assert "proxy_buffering off;" in locations()[path]


def test_errors_of_its_own_have_the_shape_of_the_services():
    from server.errors import ERROR_TABLE, ErrorKind

    text = (DEPLOY / "nginx" / "routes.conf").read_text()
    answers = re.findall(r"return (\d+) '(.*)';", text)
    assert len(answers) == len(re.findall("^error_page", text, re.MULTILINE))
    for status, body in answers:
        error = json.loads(body)["error"]
        spec = ERROR_TABLE[ErrorKind(error["code"])]
        assert (spec.status, spec.type) == (int(status), error["type"])
        assert set(error) == {"message", "type", "param", "code"}


def test_prometheus_asks_containers_that_exist():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"][0] for job in config["scrape_configs"]
    }
    assert targets["rectokens"] == "server:8000"
    port = environment(SERVICES["proxy"])["RECTOKENS_PORT"]
    assert targets["rectokens-proxy"] == f"proxy:{port}"
    for name in ("server", "server-cpu"):
        assert SERVICES[name]["networks"]["inside"]["aliases"] == ["server"]
    for upstream in (f"proxy:{port}", "server:8000"):
        assert f"server {upstream} " in (DEPLOY / "nginx" / "upstreams.conf").read_text()
