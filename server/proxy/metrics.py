"""Prometheus metrics of the proxy."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from rectokens.artifacts.activation import Activation
from server.metrics import SECONDS, HttpMetrics

# A prompt is encoded in microseconds to tens of milliseconds.
_ENCODE_SECONDS = (0.0001, 0.00025, 0.0005, *SECONDS)
_RATIOS = (0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)


class ProxyMetrics(HttpMetrics):
    """All metrics of the proxy, by name."""

    def __init__(self) -> None:
        super().__init__("rectokens_proxy")
        registry = self.registry
        self._plain_bytes = Counter(
            "rectokens_proxy_plain_bytes",
            "Bytes that the embeddings would have been as plain base64.",
            registry=registry,
        )
        self._sent_bytes = Counter(
            "rectokens_proxy_sent_bytes",
            "Bytes of prompt_embeds that were sent instead.",
            registry=registry,
        )
        self._ratio = Histogram(
            "rectokens_proxy_compression_ratio",
            "Plain bytes over sent bytes, one observation a prompt.",
            buckets=_RATIOS,
            registry=registry,
        )
        self._tokens = Counter(
            "rectokens_proxy_prompt_tokens", "Tokens of encoded prompts.", registry=registry
        )
        self._encode_seconds = Histogram(
            "rectokens_proxy_encode_seconds",
            "Time to embed and encode, one observation a prompt.",
            buckets=_ENCODE_SECONDS,
            registry=registry,
        )
        self._upstream_seconds = Histogram(
            "rectokens_proxy_upstream_seconds",
            "Time until the upstream's answer was complete, or its stream began.",
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "rectokens_proxy_in_flight", "Requests being answered.", registry=registry
        )
        self._store_sequence = Gauge(
            "rectokens_proxy_store_activations",
            "Number of the followed store's last activation, 0 without a store.",
            registry=registry,
        )
        self._behind = Gauge(
            "rectokens_proxy_release_behind",
            "1 while what is active in the followed store is not what prompts are encoded with.",
            registry=registry,
        )
        self._follow_failures = Counter(
            "rectokens_proxy_follow_failures",
            "Attempts to take what is active that failed, or to read the store; the log says why.",
            registry=registry,
        )

    def encoded(self, tokens: int, plain_bytes: int, sent_bytes: int, seconds: float) -> None:
        """A prompt was encoded."""
        self._tokens.inc(tokens)
        self._plain_bytes.inc(plain_bytes)
        self._sent_bytes.inc(sent_bytes)
        self._ratio.observe(plain_bytes / sent_bytes)
        self._encode_seconds.observe(seconds)

    def upstream_answered(self, seconds: float) -> None:
        """The upstream's answer, or the head of its stream, is there."""
        self._upstream_seconds.observe(seconds)

    def store_read(self, active: Activation, taken: int) -> None:
        """The store's pointer was read, while the activation of this number was followed."""
        self._store_sequence.set(active.sequence)
        self._behind.set(active.sequence != taken)

    def follow_failed(self) -> None:
        """What is active could not be taken, or the store not be read."""
        self._follow_failures.inc()
