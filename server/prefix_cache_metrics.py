"""Metrics of the prefix cache, read from the engine that serves whenever they are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.engine.types import PrefixCacheStats, SearchEngine

_NOTHING = PrefixCacheStats(0, 0, 0, 0, 0, 0)
_PREFIX = "rectokens_prefix_cache_"


class PrefixCacheCollector(Collector):
    """Counters start again at 0 when another model is served, as after a restart.

    An engine is not kept in memory for its figures: a model that was unloaded reads as none.
    """

    def __init__(self) -> None:
        self._engine: weakref.ref[SearchEngine] | None = None

    def watch(self, engine: SearchEngine) -> None:
        """Report this engine's cache from now on."""
        self._engine = weakref.ref(engine)

    def collect(self) -> Iterator[Metric]:
        """All metrics, 0 where nothing is kept."""
        engine = None if self._engine is None else self._engine()
        stats = (None if engine is None else engine.prefix_cache) or _NOTHING
        yield CounterMetricFamily(
            f"{_PREFIX}queried_tokens",
            "Tokens of prompts that were looked up.",
            value=stats.queried_tokens,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}hit_tokens",
            "Tokens of prompts that were not computed, because an earlier prompt began alike.",
            value=stats.hit_tokens,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}evictions",
            "Pages of keys and values given to other prompts.",
            value=stats.evictions,
        )
        yield GaugeMetricFamily(
            f"{_PREFIX}pages", "Pages of keys and values there are.", value=stats.pages
        )
        yield GaugeMetricFamily(
            f"{_PREFIX}pages_used", "Those that hold something.", value=stats.pages_used
        )
