"""The clock of the machine is set, forwards or backwards, while requests are under way."""

from __future__ import annotations

import asyncio
import time

import pytest


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
async def test_requests_and_deadlines_do_not_notice(start_app, dummy, monkeypatch, jump_s):
    engine = dummy.DummyEngine()
    running = await start_app(dummy.make_release(engine))
    engine.gate.clear()
    body = {"history": ["B001"], "top_k": 2, "timeout_ms": 60_000}
    held = asyncio.create_task(running.post(body))
    await asyncio.to_thread(engine.wait_for_batches, 1)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    # Queued behind the other, for less time than the clock has jumped.
    late = asyncio.create_task(running.post({**body, "timeout_ms": 200}))
    answer = await late
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    engine.gate.set()
    assert (await held).status_code == 200
    answer = (await running.post(body)).json()
    assert 0 <= answer["timings"]["total_ms"] < 60_000
    assert await running.metric('rectokens_request_seconds_count{route="/v1/recommend"}') == 3
    text = (await running.client.get("/metrics")).text
    assert "} -" not in text.replace("catalog_age_seconds", "")
    ready = (await running.client.get("/ready")).json()
    assert ready["status"] == "ready"
    assert ready["catalog_age_s"] is None or ready["catalog_age_s"] >= 0
