"""The manifests: valid against the schemas of Kubernetes, and in agreement with the settings."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings, load_settings, setting_fields

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = ("shared-volume", "object-store", "cpu")
# Closing connections and the engine's last batch come after the drain (server/run.py, service.py).
AFTER_DRAIN_S = 3 + 5


def render(overlay: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    tool = shutil.which("kustomize")
    command = [tool, "build"] if tool else [shutil.which("kubectl"), "kustomize"]
    if command[0] is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run(
        [*command, str(folder / "overlays" / overlay)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


@pytest.fixture(scope="module", params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(request.param)


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name of the deployment, its pod template, its only container."""
    for name, deployment in of_kind(objects, "Deployment").items():
        template = deployment["spec"]["template"]
        (container,) = template["spec"]["containers"]
        yield name, template, container


def environment(objects: list[dict[str, Any]], container: dict[str, Any]) -> dict[str, str | None]:
    """Variables of a container; None where a Secret or a ConfigMap of the operator's has it."""
    maps = of_kind(objects, "ConfigMap")
    variables: dict[str, str | None] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            variables |= maps[source["configMapRef"]["name"]]["data"]
    for variable in container.get("env", ()):
        variables[variable["name"]] = variable.get("value")
    return variables


def settings_of(
    objects: list[dict[str, Any]], container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """What the service makes of a container's variables; an unknown one is refused."""
    for name, value in environment(objects, container).items():
        if name.startswith("RECTOKENS_"):
            # Secrets have to be long, and a store has to be some text.
            monkeypatch.setenv(name, "x" * 32 if value is None else value)
    return load_settings()


def test_every_object_is_valid(objects: list[dict[str, Any]]) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (the dev extra has it)"
    )
    checked = 0
    for one in objects:
        # The Prometheus operator's own kind; no schema of Kubernetes has it.
        if one["kind"] == "ServiceMonitor":
            continue
        validator.validate(one, "1.30", strict=True)
        checked += 1
    assert checked >= 9


def test_the_schema_check_finds_mistakes() -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (the dev extra has it)"
    )
    service = of_kind(render("cpu"), "Service")["rectokens-server"]
    service["spec"]["prots"] = service["spec"].pop("ports")
    with pytest.raises(Exception, match="prots"):
        validator.validate(service, "1.30", strict=True)


def test_every_file_is_valid_by_itself_and_used() -> None:
    """What can be said without kubectl: only what overlays patch into them is not seen here."""
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (the dev extra has it)"
    )
    files = set(FOLDER.rglob("*.yaml"))
    used = set()
    for listing in FOLDER.rglob("kustomization.yaml"):
        content = yaml.safe_load(listing.read_text())
        used.add(listing)
        for name in (*content.get("resources", ()), *content.get("components", ())):
            named = listing.parent / name
            assert named.exists(), f"{listing} names {name}"
            used.add(named.resolve())
        for patch in content.get("patches", ()):
            assert ("path" in patch) != ("patch" in patch), listing
            if "path" in patch:
                used.add(listing.parent / patch["path"])
    assert files <= used, files - used
    checked = 0
    for file in files:
        for one in yaml.safe_load_all(file.read_text()):
            # Patches are lists; the other two are no kinds of Kubernetes' own.
            if isinstance(one, list) or one["kind"] in (
                "Kustomization",
                "Component",
                "ServiceMonitor",
            ):
                continue
            validator.validate(one, "1.30", strict=True)
            checked += 1
    assert checked >= 15


def test_service_monitor_has_the_operator_s_shape() -> None:
    """monitoring.coreos.com/v1, in the fields that are used here."""
    file = FOLDER / "components" / "monitoring" / "servicemonitor.yaml"
    monitor = yaml.safe_load(file.read_text())
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"].keys() == {"selector", "endpoints"}
    assert monitor["spec"]["selector"].keys() <= {"matchLabels", "matchExpressions"}
    for endpoint in monitor["spec"]["endpoints"]:
        assert endpoint.keys() == {"port", "path", "interval", "scrapeTimeout"}
        interval_s, timeout_s = (
            int(endpoint[name].removesuffix("s")) for name in ("interval", "scrapeTimeout")
        )
        assert timeout_s < interval_s


def test_environment_is_of_real_settings(
    objects: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {field.env for field in setting_fields()}
    for name, _, container in pods(objects):
        ours = {n for n in environment(objects, container) if n.startswith("RECTOKENS_")}
        assert ours, name
        assert ours <= known, name
        with monkeypatch.context() as patch:
            settings = settings_of(objects, container, patch)
        if "proxy" in name:
            assert settings.model is not None
            assert settings.proxy.upstream is not None
        else:
            assert settings.store.path
            assert not settings.jobs.start_worker
        if settings.store.path and settings.store.path != "/store":
            assert settings.store.cache is not None  # a URL needs a folder for downloads


def test_services_of_the_cluster_do_not_become_settings(objects: list[dict[str, Any]]) -> None:
    """A Service rectokens-server would be RECTOKENS_SERVER_PORT, which the server refuses."""
    for name, template, _ in pods(objects):
        assert template["spec"]["enableServiceLinks"] is False, name


def test_ports_are_where_the_service_listens(
    objects: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    services = of_kind(objects, "Service")
    seen = 0
    for name, template, container in pods(objects):
        if "worker" in name:
            continue
        with monkeypatch.context() as patch:
            settings = settings_of(objects, container, patch)
        (port,) = container["ports"]
        assert port["containerPort"] == settings.port
        assert settings.host == "0.0.0.0"
        (service_port,) = services[name]["spec"]["ports"]
        assert service_port["targetPort"] == port["name"]
        selector = services[name]["spec"]["selector"]
        assert selector.items() <= template["metadata"]["labels"].items()
        for probe, path in (
            ("startup", "/health"),
            ("liveness", "/health"),
            ("readiness", "/ready"),
        ):
            assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": port["name"]}
        seen += 1
        upstream = settings.proxy.upstream
        if upstream is not None:
            server_port = services["rectokens-server"]["spec"]["ports"][0]["port"]
            assert upstream == f"http://rectokens-server:{server_port}"
    assert seen >= 1


def test_pods_get_longer_than_the_drain(
    objects: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, template, container in pods(objects):
        with monkeypatch.context() as patch:
            settings = settings_of(objects, container, patch)
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        before_s = int(hook[1]) if hook else 0
        needed_s = before_s + settings.drain_timeout_s + AFTER_DRAIN_S
        assert template["spec"]["terminationGracePeriodSeconds"] > needed_s, name


def test_pods_may_do_little(objects: list[dict[str, Any]]) -> None:
    for name, template, container in pods(objects):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert "memory" in container["resources"]["limits"], name
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}, name
        # The tag of an image that is rolled out says which it is.
        assert not container["image"].endswith(":latest"), name
        assert ":" in container["image"], name


def test_selectors_find_the_pods(objects: list[dict[str, Any]]) -> None:
    labels = [template["metadata"]["labels"] for _, template, _ in pods(objects)]
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        for name, one in of_kind(objects, kind).items():
            selector = one["spec"].get("podSelector") or one["spec"]["selector"]
            assert any(matches(selector, pod) for pod in labels), name
    closed = of_kind(objects, "NetworkPolicy")["rectokens-closed"]["spec"]["podSelector"]
    assert all(matches(closed, pod) for pod in labels)


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    either = selector.get("matchExpressions", ())
    return wanted.items() <= labels.items() and all(
        one["operator"] == "In" and labels.get(one["key"]) in one["values"] for one in either
    )


def test_the_autoscaler_reads_a_metric_that_exists(objects: list[dict[str, Any]]) -> None:
    from server.metrics import Metrics

    scalers = of_kind(objects, "HorizontalPodAutoscaler")
    if not scalers:
        assert "nvidia.com/gpu" not in str(objects)  # the trial on one node
        return
    scaler = scalers["rectokens-server"]["spec"]
    target = of_kind(objects, "Deployment")[scaler["scaleTargetRef"]["name"]]
    assert "replicas" not in target["spec"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert Metrics().registry.get_sample_value(name) is not None
    # It must act long before requests are refused.
    assert int(metric["pods"]["target"]["averageValue"]) < Settings().batching.max_queued_beam_rows


def test_prometheus_scrapes_both(objects: list[dict[str, Any]]) -> None:
    services = of_kind(objects, "Service").values()
    for monitor in of_kind(objects, "ServiceMonitor").values():
        found = [
            s for s in services if matches(monitor["spec"]["selector"], s["metadata"]["labels"])
        ]
        assert len(found) == len(services)
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["path"] == "/metrics"
            assert all(endpoint["port"] == s["spec"]["ports"][0]["name"] for s in found)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_volumes_of_claims_exist(overlay: str) -> None:
    objects = render(overlay)
    claims = set(of_kind(objects, "PersistentVolumeClaim"))
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for _, template, _ in pods(objects)
        for volume in template["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == claims


def test_api_keys_are_mounted_where_the_setting_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overlay of somebody's own, with the component."""
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (the dev extra has it)"
    )
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    own = tmp_path / "kubernetes" / "overlays" / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        "namespace: rectokens\nresources: [../shared-volume]\n"
        "components: [../../components/api-keys]\n"
    )
    objects = render("own", tmp_path / "kubernetes")
    checked = 0
    for name, template, container in pods(objects):
        with monkeypatch.context() as patch:
            settings = settings_of(objects, container, patch)
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert ("api-keys" in mounts) == ("worker" not in name), name
        if "worker" in name:
            continue
        assert str(settings.access.keys_file) == mounts["api-keys"]["mountPath"] + "/keys"
        assert mounts["api-keys"]["readOnly"] is True
        assert mounts.keys() == {volume["name"] for volume in template["spec"]["volumes"]}
        checked += 1
    assert checked == 2
    for one in of_kind(objects, "Deployment").values():
        validator.validate(one, "1.30", strict=True)
