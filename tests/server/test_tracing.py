"""Traces as a collector gets them: over HTTP, from the service as it is started."""

from __future__ import annotations

import asyncio
import builtins
import gzip
import http.server
import io
import itertools
import json
import logging
import sys
import threading

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.logs import configure_logging
from server.settings import SettingsError, load_settings
from server.tracing.spans import Spans, make_spans
from tests.waiting import LIMIT_S

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes spans on loopback."""

    def __init__(self) -> None:
        self.spans = []
        self.service_names = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def take(self, path, request):
        assert path == "/v1/traces"
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.service_names.add(attributes["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def named(self, name):
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector(monkeypatch):
    collector = Collector()
    port = collector.server.server_address[1]
    monkeypatch.setattr("server.tracing.otel._CLOSE_S", LIMIT_S)  # this one is there
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    yield collector
    collector.close()


def attributes(span):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


async def close(running):
    await asyncio.to_thread(running.app.state.spans.close)


async def test_a_request_is_a_trace_with_its_phases(start_app, dummy, collector):
    running = await start_app(dummy.make_release(), tracing=True)
    response = await running.post(
        {"history": ["B001"], "top_k": 2, "beam_width": 4},
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "mine"},
    )
    assert response.status_code == 200
    for path in ("/health", "/ready", "/metrics"):
        await running.client.get(path)
    await close(running)
    assert collector.service_names == {"rectokens"}
    assert sorted(span.name for span in collector.spans) == sorted(
        ["POST /v1/recommend", "search", "queue", "prefill", "decode"]
    )
    (request,) = collector.named("POST /v1/recommend")
    (search,) = collector.named("search")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert search.parent_span_id == request.span_id
    assert attributes(request)["rectokens.request_id"] == "mine"
    assert attributes(request)["http.route"] == "/v1/recommend"
    told = attributes(search)
    assert told["rectokens.beam_width"] == 4
    assert told["rectokens.items_returned"] == 2
    assert told["rectokens.catalog_version"] == response.json()["catalog_version"]
    phases = [collector.named(name)[0] for name in ("queue", "prefill", "decode")]
    for phase, name in zip(phases, ("queue_ms", "prefill_ms", "decode_ms"), strict=True):
        assert phase.parent_span_id == search.span_id
        ms = (phase.end_time_unix_nano - phase.start_time_unix_nano) / 1e6
        assert ms == pytest.approx(response.json()["timings"][name], abs=0.001)
    for before, after in itertools.pairwise(phases):
        assert before.end_time_unix_nano == after.start_time_unix_nano


async def test_a_failure_is_told_by_its_kind_and_without_what_was_sent(start_app, dummy, collector):
    engine = dummy.DummyEngine()
    engine.fault_if = lambda request: request.top_k == 3
    running = await start_app(dummy.make_release(engine), tracing=True)
    assert (await running.post({"history": ["SECRET"]})).status_code == 422
    assert (await running.post({"history": ["B001"], "top_k": 3})).status_code == 500
    assert (await running.client.get("/v1/SECRET-path")).status_code == 404
    await close(running)
    kinds = [attributes(span)["error.type"] for span in collector.named("search")]
    assert kinds == ["no_known_items", "engine_fault"]
    assert all(span.status.code == 2 for span in collector.named("search"))
    assert not any(span.events for span in collector.spans)
    assert "SECRET" not in str(collector.named("search"))
    assert collector.named("GET other")


async def test_every_request_of_a_bulk_call_has_its_search(start_app, dummy, collector):
    running = await start_app(dummy.make_release(), tracing=True)
    body = {"requests": [{"history": ["B001"]}] * 3}
    await running.client.post("/v1/recommend/batch", json=body)
    await close(running)
    (request,) = collector.named("POST /v1/recommend/batch")
    assert [span.parent_span_id for span in collector.named("search")] == [request.span_id] * 3


async def test_log_lines_name_the_trace(start_app, dummy, collector, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level
    import structlog

    config = structlog.get_config()
    configure_logging("debug")
    # A logger that is kept would write so in later tests, too.
    structlog.configure(cache_logger_on_first_use=False)
    try:
        running = await start_app(dummy.make_release(), tracing=True)
        await running.post({"history": ["B001"]}, headers={"X-Request-ID": "mine"})
        await close(running)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        structlog.configure(**config)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [
        one for one in lines if one.get("request_id") == "mine" and one["event"] == "request"
    ]
    (request,) = collector.named("POST /v1/recommend")
    assert line["trace_id"] == request.trace_id.hex()
    assert line["span_id"] == request.span_id.hex()


async def test_a_collector_that_is_gone_changes_nothing(start_app, dummy, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    monkeypatch.setattr("server.tracing.otel._CLOSE_S", 0.5)
    running = await start_app(dummy.make_release(), tracing=True)
    assert (await running.post({"history": ["B001"]})).status_code == 200
    began = asyncio.get_running_loop().time()
    await close(running)
    # Bounded, where the exporter itself would go on trying for half a minute.
    assert asyncio.get_running_loop().time() - began < 25


def test_without_the_packages_tracing_stops_the_start(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(("opentelemetry", "server.tracing.otel")):
            raise ModuleNotFoundError(f"No module named {name!r}", name="opentelemetry")
        return imported(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "server.tracing.otel", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        SettingsError, match=r"RECTOKENS_TRACING is on.*pip install 'rectokens\[otel"
    ):
        make_spans(load_settings({"tracing": True}), "rectokens")
    assert type(make_spans(load_settings({}), "rectokens")) is Spans


def test_a_process_that_traces_ends_as_any_other(start_process, collector):
    server = start_process("ok", "tracing=true")
    server.read_until("release active")
    body = {"history": ["B001"]}
    answer = httpx.post(f"{server.url}/v1/recommend", json=body, timeout=LIMIT_S)
    assert answer.status_code == 200
    server.terminate()
    assert server.wait()[0] == 0
    # What was not sent yet is sent at the end.
    assert len(collector.named("search")) == 1
