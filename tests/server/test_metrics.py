from __future__ import annotations

import pytest
import torch

from server.device_metrics import DeviceMemoryCollector


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
    "rectokens_batching_limit",
    "rectokens_gpu_memory_bytes",
    "rectokens_gpu_memory_total_bytes",
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


async def test_the_limits_of_batches_and_the_queue_are_told(running):
    batching = running.service.settings.batching
    for of, limit in (
        ("batch_requests", batching.max_requests),
        ("batch_beam_rows", batching.max_beam_rows),
        ("queue_requests", batching.max_queued_requests),
        ("queue_beam_rows", batching.max_queued_beam_rows),
    ):
        assert await running.metric(f'rectokens_batching_limit{{of="{of}"}}') == limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_memory_of_the_gpu_is_torchs_account():
    collector = DeviceMemoryCollector()
    held = torch.empty(1 << 20, device="cuda")
    collector.watch(held.device)
    figures = {
        tuple(sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
    }
    assert held.nbytes <= figures["allocated",] <= figures["reserved",]
    name = torch.cuda.get_device_properties(0).name
    assert figures["reserved",] <= figures[name,] == torch.cuda.mem_get_info(0)[1]


def test_a_cpu_has_no_figures_of_a_gpu():
    collector = DeviceMemoryCollector()
    collector.watch(torch.device("cpu"))
    assert [family.samples for family in collector.collect()] == [[], []]
