"""Spans by OpenTelemetry: one for each request, below it one for each search and its phases.

Spans of ours hold numbers, versions and the request's id. OpenTelemetry's own middleware adds
method, path, query, host, user agent and the client's address. None has a body or what was made
of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode
from starlette.types import ASGIApp

from server.errors import ErrorKind, ServiceError
from server.recommender import Recommendation
from server.tracing.spans import Spans
from server.version import running_version

# Asked every few seconds by machines, and about themselves.
_UNTRACED = r"/(health|ready|metrics)$"
_CLOSE_S = 3.0
_NS = 1_000_000_000


def otlp_provider(service_name: str) -> TracerProvider:
    """A provider that sends by OTLP over HTTP, as OpenTelemetry's own variables say."""
    resource = Resource.create({"service.version": running_version()})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service_name}))
    # It is closed with the app; at the exit of the process it would wait for a dead collector.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class OtelSpans(Spans):
    """Spans that a provider takes.

    Args:
        provider: closed with this.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("rectokens")

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app, with a span around every request that goes on with a caller's trace."""
        return OpenTelemetryMiddleware(
            app,
            excluded_urls=_UNTRACED,
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],
        )

    def began(self, request_id: str) -> Mapping[str, str]:
        """Note the request's id in its span, and the trace's in the log."""
        span = trace.get_current_span()
        if not span.is_recording():
            return {}
        span.set_attribute("rectokens.request_id", request_id)
        context = span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def routed(self, method: str, route: str) -> None:
        """Name the span by the route as declared: few names, whatever clients ask for."""
        span = trace.get_current_span()
        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)

    @contextmanager
    def search(self) -> Iterator[Callable[[Recommendation], None]]:
        """A span around a search; told the outcome, it has the phases below it."""
        with self._tracer.start_as_current_span(
            # Messages of errors name what the caller sent; the kind of error is told below.
            "search",
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield lambda found: self._found(span, found)
            except ServiceError as error:
                span.set_attribute("error.type", error.kind.value)
                span.set_status(Status(StatusCode.ERROR))
                raise
            except Exception:
                span.set_attribute("error.type", ErrorKind.INTERNAL.value)
                span.set_status(Status(StatusCode.ERROR))
                raise

    def pass_on(self, headers: MutableMapping[str, str]) -> None:
        """Add ``traceparent`` and what else the propagators of the environment add."""
        propagate.inject(headers)

    def close(self) -> None:
        """Send what is left, for as long as a collector may take."""
        # A thread of its own that nobody waits for at the exit.
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def _found(self, span: trace.Span, found: Recommendation) -> None:
        answer, prepared = found.answer, found.prepared
        span.set_attributes(
            {
                "rectokens.model_version": found.release.model_version,
                "rectokens.catalog_version": found.release.catalog.version,
                "rectokens.beam_width": prepared.search.beam_width,
                "rectokens.items_returned": len(found.items),
                "rectokens.prompt_tokens": len(prepared.prompt.token_ids),
                "rectokens.cached_tokens": answer.cached_tokens,
            }
        )
        # The phases follow each other and have just ended; those of the engine are the batch's.
        end = time.time_ns()
        phases = (
            ("queue", answer.queue_s),
            ("prefill", answer.prefill_s),
            ("decode", answer.decode_s),
        )
        begin = end - sum(round(seconds * _NS) for _, seconds in phases)
        for name, seconds in phases:
            phase = self._tracer.start_span(name, start_time=begin)
            begin += round(seconds * _NS)
            phase.end(begin)
