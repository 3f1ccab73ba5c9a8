"""What the tools of others say of the files, where they are installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name: str) -> str:
    """Beside this Python or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_hadolint() -> None:
    assert run(tool("hadolint"), "Dockerfile") == ""


@pytest.mark.parametrize("name", ["compose.yaml", "compose.tls.yaml"])
def test_the_compose_schema(name: str) -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed")
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(sys.executable, "-m", "check_jsonschema", *schema, DEPLOY / name)


def test_promtool_checks_the_configuration() -> None:
    assert "2 rule files found" in run(
        tool("promtool"), "check", "config", "prometheus.yml", cwd=DEPLOY / "prometheus"
    )


def test_promtool_tests_the_rules() -> None:
    run(tool("promtool"), "test", "rules", "rules.test.yml", cwd=DEPLOY / "prometheus")


def test_promtool_reads_the_queries_of_the_dashboards(tmp_path: Path) -> None:
    """As rules; what Grafana fills in is filled in first."""
    rules = []
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", "1m")
                rules.append({"record": f"panel:{len(rules)}", "expr": expression})
    # JSON is YAML.
    file = tmp_path / "panels.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run(tool("promtool"), "check", "rules", file)
