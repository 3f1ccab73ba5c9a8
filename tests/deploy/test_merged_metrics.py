"""Metrics of many processes on one page."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deploy.ray.merged_metrics import merge_metrics


def page(requests: int) -> str:
    registry = CollectorRegistry()
    counter = Counter("requests", "Answered.", ["status"], registry=registry)
    counter.labels(status="200").inc(requests)
    Gauge("rows", 'Waiting, "now".', registry=registry).set(requests / 2)
    Histogram("seconds", "Taken.", buckets=(1, 2), registry=registry).observe(1.5)
    return generate_latest(registry).decode()


def test_every_sample_is_there_with_its_labels() -> None:
    merged = merge_metrics([({"replica": "x"}, page(2)), ({"replica": "y"}, page(6))]).decode()
    families = list(text_string_to_metric_families(merged))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["requests_total", (("replica", "x"), ("status", "200"))] == 2
    assert samples["requests_total", (("replica", "y"), ("status", "200"))] == 6
    assert samples["rows", (("replica", "y"),)] == 3
    assert samples["seconds_bucket", (("le", "2.0"), ("replica", "x"))] == 1
    kinds = {family.name: family.type for family in families}
    assert (kinds["requests"], kinds["rows"], kinds["seconds"]) == ("counter", "gauge", "histogram")
    alone = list(text_string_to_metric_families(page(2)))
    assert sum(len(one.samples) for one in families) == 2 * sum(len(one.samples) for one in alone)


def test_no_pages_are_an_empty_page() -> None:
    assert merge_metrics([]) == b""


def test_what_is_no_page_is_refused() -> None:
    with pytest.raises(ValueError):
        merge_metrics([({}, "<html>")])
