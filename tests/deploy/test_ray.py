"""The deployment on a real Ray cluster of this machine: ``make test-ray``.

One cluster for all of it, in a network namespace that has loopback only; what happened there is
told by ``ray_scenario.py`` as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.ray.routing import choose_variant

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("ray_scenario.py")
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if os.environ.get("RAY_TESTS") != "1":
        pytest.skip("a Ray cluster is some 14 processes and a minute: make test-ray")
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (the ray extra has it)")
    command = [*_namespace(), sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("ray"))]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={
            **{name: value for name, value in os.environ.items() if "RECTOKENS_" not in name},
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return found


def _namespace() -> list[str]:
    """Before a command that is to see loopback only: Ray listens on every interface."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip are needed to keep Ray to loopback")
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *user, "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no network namespaces")
    return command


def test_users_keep_their_variant(findings: dict[str, Any]) -> None:
    routing = findings["routing"]
    for user, variant in routing["users"].items():
        assert variant == choose_variant(user, {"a": 3, "b": 1}, "test"), user
    assert set(routing["users"].values()) == {"a", "b"}
    assert routing["no_user"] == "a"
    assert routing["unknown"] == 422


def test_other_weights_need_no_other_process(findings: dict[str, Any]) -> None:
    reweighing = findings["reweighing"]
    assert len(reweighing["before"]) == 3
    assert reweighing["after"] == reweighing["before"]


def test_the_service_is_all_there(findings: dict[str, Any]) -> None:
    surface = findings["surface"]
    assert surface["batch"] == [[index, 200] for index in range(5)]
    assert surface["bad"] == [422, "invalid_value", True]
    assert surface["request_id"] == ["mine-1"]
    assert surface["admin"] == 404
    assert {name: len(found) for name, found in surface["ready"].items()} == {"a": 2, "b": 1}
    told = {f"{name}/{one}" for name, found in surface["ready"].items() for one in found}
    assert set(surface["metrics_replicas"]) == told


def test_an_activation_reaches_every_replica_of_its_variant(findings: dict[str, Any]) -> None:
    activation = findings["activation"]
    assert activation["serving"] == {"a": [activation["wanted"]] * 2, "b": [activation["b"]]}
    assert len(activation["items"]) == 3
    assert all(item.startswith("2-") for item in activation["items"])


def test_a_killed_replica_costs_no_request(findings: dict[str, Any]) -> None:
    """Those in flight on it are given to the other, or their callers told to come back."""
    killed = findings["killed_replica"]
    outcomes = killed["outcomes"]
    assert outcomes.keys() <= {"answered", "retryable upstream_unavailable"}, outcomes
    assert outcomes.get("retryable upstream_unavailable", 0) <= 8
    assert outcomes["answered"] > killed["answered_before"] > 0
    # It was killed with requests on it.
    assert killed["lost"]["retried"] > 0
    assert killed["lost"]["cut"] == 0
    assert killed["replicas"] == 2


def test_beam_rows_add_a_replica(findings: dict[str, Any]) -> None:
    scaling = findings["scaling"]
    assert (scaling["before"], scaling["after"]) == (1, 2)
    assert scaling["outcomes"].keys() == {"answered"}


def test_a_catalog_is_encoded_by_workers(findings: dict[str, Any]) -> None:
    assert findings["encoding"] == {
        "told": "/bad.parquet: row 1 holds nan; embeddings must be finite",
        "pieces": 6,
        "ids": True,
        "codes": True,
        "left": 0,
    }


def test_half_an_answer_does_not_look_whole(findings: dict[str, Any]) -> None:
    cut = findings["cut_stream"]
    assert cut["status"] == 200
    assert 5 <= cut["lines"] < 1_000
    assert cut["ended"] == "RemoteProtocolError"
