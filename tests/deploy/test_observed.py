"""Rules and dashboards read metrics that the service has; every alert is tested and explained."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.metrics import Metrics
from server.proxy.metrics import ProxyMetrics

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
GRAFANA = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]

_KEYWORDS = {"by", "on", "or", "and", "unless", "ignoring", "bool", "without"}
_ALWAYS = {"up", "ALERTS"}


def metric_names(expression: str) -> set[str]:
    """Names of the series that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|ignoring|without)\s*\([^)]*\)", " ", bare)
    names = re.findall(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*\(|[\w:])", bare)
    return set(names) - _KEYWORDS


def label_names(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', '""', expression)
    groups = re.findall(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)", bare)
    matchers = re.findall(r"\{([^}]*)\}", bare)
    names = {one.strip() for group in groups for one in group.split(",")}
    return names | {name for group in matchers for name in re.findall(r"(\w+)\s*[=!]", group)}


@functools.cache
def known_metrics() -> tuple[set[str], set[str]]:
    """Series that exist, and labels that they may have."""
    series, labels = set(_ALWAYS), {"job", "instance", "le", "alertstate"}
    for metrics in (Metrics(), ProxyMetrics()):
        for family in metrics.registry.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
            series |= {family.name + one for one in suffixes.get(family.type, [""])}
        for collector in vars(metrics).values():
            labels |= set(getattr(collector, "_labelnames", ()))
    return series, labels


def rules() -> Iterator[dict[str, Any]]:
    for name in ("recording", "alerts"):
        content = yaml.safe_load((DEPLOY / "prometheus" / f"{name}.yml").read_text())
        for group in content["groups"]:
            yield from group["rules"]


def dashboards() -> dict[str, dict[str, Any]]:
    folder = DEPLOY / "grafana" / "dashboards"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule.get("record") or rule["alert"], rule["expr"]
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield f"{name}: {panel['title']}", target["expr"]


def test_the_names_in_an_expression_are_found():
    expression = (
        'histogram_quantile(0.99, sum by (job, le) (rate(a_bucket{x=~"b|c"}[5m]))) > 1 '
        'or on (job) r:c:d_5m / (e_total > 0) unless on (job) f{y!="z"}'
    )
    assert metric_names(expression) == {"a_bucket", "r:c:d_5m", "e_total", "f"}
    assert label_names(expression) == {"job", "le", "x", "y"}


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_metric_and_label_that_is_named_exists(where, expression):
    series, labels = known_metrics()
    series = series | {rule["record"] for rule in rules() if "record" in rule}
    names = metric_names(expression)
    assert names
    assert names <= series, f"{where}: {names - series}"
    # Two that a collector makes, and one of the dashboards' table.
    assert label_names(expression) <= labels | {"state", "name"}, where


def test_every_figure_that_is_recorded_is_read():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    read = {name for _, expression in expressions() for name in metric_names(expression)}
    assert recorded <= read


def test_every_alert_is_tested_and_explained():
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules.test.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for group in tests
        for case in group.get("alert_rule_test", ())
        if case["exp_alerts"]
    }
    assert fired == alerts
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert set(re.findall(r"^\| `(Rectokens\w+)`", page, re.MULTILINE)) == alerts


def test_dashboards_show_what_they_are_for():
    shown = {name for _, expression in expressions() for name in metric_names(expression)}
    for metric in (
        "rectokens_requests_total",
        "rectokens_queue_seconds_bucket",
        "rectokens_prefill_seconds_bucket",
        "rectokens_decode_seconds_bucket",
        "rectokens:batch_fill:ratio5m",
        "rectokens_batch_beam_rows_bucket",
        "rectokens:prefix_cache_hits:ratio5m",
        "rectokens_shortfall_total",
        "rectokens_rejected_total",
        "rectokens_catalog_info",
        "rectokens_catalog_age_seconds",
        "rectokens_jobs",
        "rectokens_gpu_memory_bytes",
        "rectokens_proxy_compression_ratio_bucket",
    ):
        assert metric in shown


def test_dashboards_read_the_provisioned_source():
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((folder / "dashboards" / "rectokens.yml").read_text())["providers"]
    mounted = [one.split(":")[1] for one in GRAFANA["volumes"]]
    assert provider["options"]["path"] in mounted
    assert dashboards()
    for dashboard in dashboards().values():
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        for panel in panels:
            for target in panel.get("targets", ()):
                assert target["datasource"]["uid"] == source["uid"]
    home = GRAFANA["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).stem in dashboards()
