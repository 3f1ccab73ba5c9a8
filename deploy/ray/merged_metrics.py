"""Metrics of many processes as one page, told apart by labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge_metrics(pages: Iterable[tuple[Mapping[str, str], str]]) -> bytes:
    """One page in Prometheus' text format.

    Args:
        pages: labels, and the page whose samples get them.

    Raises:
        ValueError: a page is not in that format.
    """
    families: dict[str, Metric] = {}
    for labels, page in pages:
        for family in text_string_to_metric_families(page):
            merged = families.get(family.name)
            if merged is None:
                merged = Metric(family.name, family.documentation, family.type)
                families[family.name] = merged
            for sample in family.samples:
                merged.samples.append(sample._replace(labels={**sample.labels, **labels}))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(families.values()))
    return generate_latest(registry)
