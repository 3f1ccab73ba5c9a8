"""Prometheus metrics of one service. Each app has a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from server.device_metrics import DeviceMemoryCollector
from server.prefix_cache_metrics import PrefixCacheCollector

if TYPE_CHECKING:
    from rectokens.artifacts.activation import Activation
    from server.batching.batcher import Batcher
    from server.release import Release
    from server.settings_serving import BatchingSettings

# From an idle H200 to a saturated CPU, roughly doubling.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_POWERS_OF_TWO = tuple(float(2**i) for i in range(15))


class HttpMetrics:
    """What every app of ours counts: requests and errors. Safe to use from any thread.

    Args:
        prefix: of the names of these metrics.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.registry = registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        self._requests = Counter(
            f"{prefix}_requests",
            "HTTP requests answered, by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self._rejected = Counter(
            f"{prefix}_rejected",
            "Requests answered with an error, by its code.",
            ["reason"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            f"{prefix}_request_seconds",
            "End-to-end time of a request, by route.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        # Of routes and statuses so far: few, and looking them up takes as long as counting.
        self._finished: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

        self._connections = Gauge(
            f"{prefix}_connections", "Connections of clients that are open.", registry=registry
        )
        self._connections_closed = Counter(
            f"{prefix}_connections_closed",
            "Connections closed without an answer: nothing was ever sent on it (silent), it was "
            "idle longest when others needed its place (made_room), or its client did not read "
            "the answer (slow_reader).",
            ["reason"],
            registry=registry,
        )

    def render(self) -> bytes:
        """All metrics in Prometheus text format."""
        return generate_latest(self.registry)

    def request_finished(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered (or its client had gone: 499)."""
        known = self._finished.get((route, status))
        if known is None:
            known = (
                self._requests.labels(route=route, status=str(status)),
                self._request_seconds.labels(route=route),
            )
            self._finished[route, status] = known
        requests, request_seconds = known
        requests.inc()
        request_seconds.observe(seconds)

    def connections_open(self, count: int) -> None:
        """So many connections are open."""
        self._connections.set(count)

    def connection_closed(self, reason: str) -> None:
        """A connection was closed without an answer."""
        self._connections_closed.labels(reason=reason).inc()

    def rejected(self, reason: str) -> None:
        """A request got an error."""
        self._rejected.labels(reason=reason).inc()


class Metrics(HttpMetrics):
    """All metrics of the service, by name."""

    def __init__(self) -> None:
        super().__init__("rectokens")
        registry = self.registry
        self._queue_seconds = _seconds(
            registry, "queue", "Time a request waited for the engine, one observation a request."
        )
        self._prefill_seconds = _seconds(
            registry, "prefill", "Time a batch spent on its prompts, one observation a batch."
        )
        self._decode_seconds = _seconds(
            registry, "decode", "Time a batch spent on its beam steps, one observation a batch."
        )
        self._batch_requests = Histogram(
            "rectokens_batch_requests",
            "Requests in a batch.",
            buckets=_POWERS_OF_TWO[:9],
            registry=registry,
        )
        self._batch_beam_rows = Histogram(
            "rectokens_batch_beam_rows",
            "Beam rows in a batch.",
            buckets=_POWERS_OF_TWO,
            registry=registry,
        )
        self._queued_requests = Gauge(
            "rectokens_queue_requests", "Requests waiting for the engine.", registry=registry
        )
        self._queued_beam_rows = Gauge(
            "rectokens_queue_beam_rows", "Their beam rows.", registry=registry
        )
        self._limits = Gauge(
            "rectokens_batching_limit",
            "Most that the settings allow of what the label names: of a batch, and waiting.",
            ["of"],
            registry=registry,
        )
        self._items_returned = Counter(
            "rectokens_items_returned", "Items in answers.", registry=registry
        )
        self._shortfall = Counter(
            "rectokens_shortfall",
            "Answers with fewer items than asked for, by reason.",
            ["reason"],
            registry=registry,
        )
        self._catalog_info = Gauge(
            "rectokens_catalog_info",
            "1 for what is being served, told by the labels.",
            ["catalog_version", "model", "model_version", "tokenizer_fingerprint"],
            registry=registry,
        )
        self._catalog_items = Gauge(
            "rectokens_catalog_items", "Items in the catalog being served.", registry=registry
        )

        self._catalog_age = Gauge(
            "rectokens_catalog_age_seconds",
            "Time since the catalog being served was made.",
            registry=registry,
        )
        self._active_since = Gauge(
            "rectokens_release_active_timestamp_seconds",
            "Unix time since when this process serves its release.",
            registry=registry,
        )
        self._store_sequence = Gauge(
            "rectokens_store_activations",
            "Number of the store's last activation, 0 before it was read.",
            registry=registry,
        )
        self._behind = Gauge(
            "rectokens_release_behind",
            "1 while the release that is active in the store is not the one served.",
            registry=registry,
        )
        self._swap_seconds = Histogram(
            "rectokens_swap_seconds",
            "Time from seeing a new active release to serving it; requests do not wait meanwhile.",
            buckets=(*SECONDS, 60.0, 300.0, 1_800.0),
            registry=registry,
        )
        self._swap_failures = Counter(
            "rectokens_swap_failures",
            "Attempts to serve the active release that failed; the log and /ready say why.",
            registry=registry,
        )

        self._refused = Counter(
            "rectokens_activations_refused",
            "Releases that did not become active: they could not be loaded (failed), or the gate "
            "did not let them through (blocked).",
            ["state"],
            registry=registry,
        )
        self._jobs = Gauge(
            "rectokens_jobs", "Jobs that are remembered, by state.", ["state"], registry=registry
        )

        self._prefix_cache = PrefixCacheCollector()
        registry.register(self._prefix_cache)
        self._device_memory = DeviceMemoryCollector()
        registry.register(self._device_memory)

    def limits_set(self, batching: BatchingSettings) -> None:
        """What batches and the queue may hold, so that fill and headroom can be told."""
        for of, limit in (
            ("batch_requests", batching.max_requests),
            ("batch_beam_rows", batching.max_beam_rows),
            ("queue_requests", batching.max_queued_requests),
            ("queue_beam_rows", batching.max_queued_beam_rows),
        ):
            self._limits.labels(of=of).set(limit)

    def watch_queue(self, batcher: Batcher) -> None:
        """Report the batcher's queue depth whenever the metrics are read."""
        self._queued_requests.set_function(lambda: batcher.queued_requests)
        self._queued_beam_rows.set_function(lambda: batcher.queued_beam_rows)

    def release_active(self, release: Release) -> None:
        """What is served from now on."""
        self._catalog_info.clear()
        self._catalog_info.labels(
            catalog_version=release.catalog.version,
            model=release.model_name,
            model_version=release.model_version,
            tokenizer_fingerprint=release.spec.tokenizer_fingerprint,
        ).set(1)
        self._catalog_items.set(release.catalog.num_items)
        self._prefix_cache.watch(release.engine)
        self._device_memory.watch(release.trie.device)
        made_s = release.catalog_created_s
        if made_s is not None:
            self._catalog_age.set_function(lambda: time.time() - made_s)
        self._active_since.set_to_current_time()

    def store_read(self, active: Activation | None, serving: str | None) -> None:
        """The store's pointer was read, while this version was served."""
        self._store_sequence.set(0 if active is None else active.sequence)
        self._behind.set(active is not None and active.release != serving)

    def swapped(self, seconds: float) -> None:
        """The active release is served, so long after it was seen."""
        self._swap_seconds.observe(seconds)
        self._behind.set(0)

    def rehearsal_refused(self, state: str) -> None:
        """A release that a job wants to activate was ``failed`` or ``blocked`` here."""
        self._refused.labels(state=state).inc()

    def jobs_counted(self, counts: Mapping[str, int]) -> None:
        """How many jobs the jobs' database has in each state."""
        for state, count in counts.items():
            self._jobs.labels(state=state).set(count)

    def swap_failed(self) -> None:
        """The active release could not be served, or the pointer could not be read."""
        self._swap_failures.inc()

    def answered(self, items: int, shortfall_reason: str | None) -> None:
        """A recommendation went out."""
        self._items_returned.inc(items)
        if shortfall_reason is not None:
            self._shortfall.labels(reason=shortfall_reason).inc()

    def batch_started(self, requests: int, beam_rows: int, queue_s: Sequence[float]) -> None:
        """A batch begins; see ``BatchObserver``."""
        self._batch_requests.observe(requests)
        self._batch_beam_rows.observe(beam_rows)
        for seconds in queue_s:
            self._queue_seconds.observe(seconds)

    def batch_finished(self, prefill_s: float, decode_s: float) -> None:
        """A forward pass came back; see ``BatchObserver``."""
        self._prefill_seconds.observe(prefill_s)
        self._decode_seconds.observe(decode_s)


def _seconds(registry: CollectorRegistry, what: str, help_text: str) -> Histogram:
    return Histogram(f"rectokens_{what}_seconds", help_text, buckets=SECONDS, registry=registry)
