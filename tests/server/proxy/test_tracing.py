"""A trace goes on through the proxy."""

from __future__ import annotations

import pytest

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("tracing", [True, False])
async def test_the_upstream_learns_the_trace(start_proxy, upstream, monkeypatch, tracing):
    # Nobody listens there; nothing waits for that.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    proxy = await start_proxy(__tracing=tracing)
    answer = await proxy.client.post(
        "/v1/completions",
        json={"prompt": "the user"},
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    )
    assert answer.status_code == 200
    given = upstream.calls[0].headers.get("traceparent", "")
    if not tracing:
        assert given == ""
        return
    _, trace, span, _ = given.split("-")
    assert trace == TRACE
    assert span != PARENT  # the proxy's own
