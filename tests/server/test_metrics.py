from __future__ import annotations

import pytest


@pytest.fixture
async def running(start_app, dummy):
    return await start_app(dummy.make_release())


EXPECTED = [
    "rectokens_requests_total",
    "rectokens_rejected_total",
    "rectokens_request_seconds",
    "rectokens_queue_seconds",
    "rectokens_prefill_seconds",
    "rectokens_decode_seconds",
    "rectokens_queue_requests",
    "rectokens_queue_beam_rows",
    "rectokens_batch_requests",
    "rectokens_batch_beam_rows",
    "rectokens_items_returned_total",
    "rectokens_shortfall_total",
    "rectokens_catalog_info",
    "rectokens_catalog_items",
    "rectokens_prefix_cache_queried_tokens_total",
    "rectokens_prefix_cache_hit_tokens_total",
    "rectokens_prefix_cache_evictions_total",
    "rectokens_prefix_cache_pages",
    "rectokens_prefix_cache_pages_used",
    "process_resident_memory_bytes",
]


@pytest.mark.parametrize("name", EXPECTED)
async def test_every_metric_is_described(running, name):
    response = await running.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert f"# TYPE {name} " in response.text
    assert f"# HELP {name} " in response.text


async def test_a_recommendation_is_counted(running):
    await running.post({"history": ["B001"], "top_k": 3, "beam_width": 20})
    await running.post({"history": [], "constraint_set": ["even", "early"], "beam_width": 30})
    assert await running.metric("rectokens_items_returned_total") == 8
    assert await running.metric('rectokens_shortfall_total{reason="filters"}') == 1
    route = 'route="/v1/recommend"'
    assert await running.metric(f'rectokens_requests_total{{{route},status="200"}}') == 2
    assert await running.metric(f"rectokens_request_seconds_count{{{route}}}") == 2
    for name in ("queue", "prefill", "decode"):
        assert await running.metric(f"rectokens_{name}_seconds_count") == 2
    assert await running.metric("rectokens_batch_requests_sum") == 2
    assert await running.metric("rectokens_batch_beam_rows_sum") == 50
    assert await running.metric("rectokens_prefill_seconds_sum") == pytest.approx(0.002)
    assert await running.metric("rectokens_decode_seconds_sum") == pytest.approx(0.004)


async def test_rejections_are_counted_by_reason(running):
    await running.post({"history": [], "top_k": 0})
    await running.post({"history": ["x"]})
    await running.client.get("/nowhere")
    for reason in ("invalid_value", "no_known_items", "not_found"):
        assert await running.metric(f'rectokens_rejected_total{{reason="{reason}"}}') == 1


async def test_unknown_paths_share_one_label(running):
    for i in range(5):
        await running.client.get(f"/nowhere/{i}")
    assert await running.metric('rectokens_requests_total{route="other",status="404"}') == 5


async def test_the_catalog_info_follows_the_active_release(running, dummy):
    labels = (
        'catalog_version="unsaved",model="dummy",model_version="{}",'
        f'tokenizer_fingerprint="{dummy.FINGERPRINT}"'
    )
    info = "rectokens_catalog_info{{" + labels + "}}"
    assert await running.metric(info.format("model0000000000a")) == 1
    running.service.activate(dummy.make_release(model_version="model0000000000b"))
    assert await running.metric(info.format("model0000000000a")) == 0
    assert await running.metric(info.format("model0000000000b")) == 1
