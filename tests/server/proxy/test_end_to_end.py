"""The proxy in front of our own server with a tiny model: the same items on every way."""

from __future__ import annotations

import contextlib
import json

import httpx
import pytest

from tests.waiting import LIMIT_S, until


@pytest.fixture
async def service(store, mock_tools):
    """Base URL of our own server, ready, on loopback."""
    from server.app import create_app
    from server.release import load_release
    from server.settings import load_settings

    settings = load_settings({"model": str(store.model), "catalog": str(store.catalog)})
    app = create_app(settings, lambda: load_release(settings))
    async with mock_tools.serving(app) as url:
        await until(lambda: app.state.service.phase == "ready" or app.state.service.load_error)
        assert app.state.service.load_error is None
        yield url


def items(response):
    assert response.status_code == 200, response.text
    return [choice["item"]["item_id"] for choice in response.json()["choices"]]


PROMPTS = [
    "<item:B001><item:B006>",
    "the user likes <item:B010> and matte lipstick",
    "",
    "a b c <item:B029> b <item:B002> a <item:B001>",
]
SEARCH = {"n": 8, "beam_width": 30}
ALL = {"n": 30, "beam_width": 30}


def scores(response):
    choices = response.json()["choices"]
    return {choice["item"]["item_id"]: choice["item"]["score"] for choice in choices}


def assert_same_ranking(found, expected, tolerance):
    """The same items in the same order, but for scores closer than the error of the codec."""
    assert found == pytest.approx(expected, abs=tolerance)
    for mine, theirs in zip(found, expected, strict=True):
        assert abs(expected[mine] - expected[theirs]) <= 2 * tolerance


@pytest.mark.parametrize(
    "settings", [{"embedding_compression": "none"}, {"embedding_bits": 8}], ids=["plain", "8 bits"]
)
async def test_the_same_items_with_and_without_the_proxy(service, start_proxy, settings):
    proxy = await start_proxy(catalog=True, url=service, **settings)
    exact = settings == {"embedding_compression": "none"}
    async with httpx.AsyncClient(base_url=service, timeout=LIMIT_S) as client:
        for prompt in PROMPTS:
            body = {"prompt": prompt, **ALL}
            direct = await client.post("/v1/completions", json=body)
            through = await proxy.client.post("/v1/completions", json=body)
            tolerance = 1e-5 if exact else 0.2
            assert_same_ranking(scores(through), scores(direct), tolerance)
            assert len(items(direct)) == 30
            assert items(through)[:3] == items(direct)[:3]
        body = {"prompt": PROMPTS, "n": 1}
        together = items(await proxy.client.post("/v1/completions", json=body))
        assert together == items(await client.post("/v1/completions", json=body))
    assert (await proxy.client.get("/ready")).status_code == 200
    assert (await proxy.client.get("/v1/models")).json()["data"][0]["id"] == "rectokens"


async def test_filters_errors_and_streams_pass_through(service, start_proxy):
    proxy = await start_proxy(catalog=True, url=f"{service}/v1/")
    body = {"prompt": "<item:B001>", **SEARCH}
    all_items = items(await proxy.client.post("/v1/completions", json=body))
    fewer = {**body, "n": 3, "exclude_items": all_items[:5]}
    assert items(await proxy.client.post("/v1/completions", json=fewer)) == all_items[5:]
    response = await proxy.complete("<item:B001>", n=2, top_p=0.5)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "top_p"
    streamed = await proxy.complete("<item:B001>", stream=True, **SEARCH)
    events = [event.removeprefix("data: ") for event in streamed.text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert [chunk["choices"][0]["item"]["item_id"] for chunk in chunks] == all_items


async def test_served_with_the_service_below_proxy(store, service, mock_tools):
    """Routes, limits and counts of both, side by side; stopped together."""
    from server.app import create_app
    from server.proxy.service import load_proxy
    from server.release import load_release
    from server.settings import load_settings

    settings = load_settings(
        {
            "model": str(store.model),
            "catalog": str(store.catalog),
            "proxy.upstream": service,
            "proxy.max_body_bytes": "5000",
            "limits.max_body_bytes": "2000",
        }
    )
    proxy = load_proxy(settings, settings.model, settings.catalog)
    app = create_app(settings, lambda: load_release(settings), proxy)
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(mock_tools.serving(app))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=LIMIT_S))
        await until(lambda: app.state.service.phase == "ready" or app.state.service.load_error)
        assert (await client.get("/ready")).status_code == 200
        body = {"prompt": "<item:B001>", "n": 5}
        found = [await client.post(path, json=body) for path in ("/v1/completions",) * 2]
        through = await client.post("/proxy/v1/completions", json=body)
        assert len(items(through)) == len(items(found[0])) == 5
        assert through.headers["X-Request-ID"]
        big = {**body, "user": "a" * 3_000}
        assert (await client.post("/proxy/v1/completions", json=big)).status_code == 200
        big = {**body, "user": "a" * 6_000}
        assert (await client.post("/proxy/v1/completions", json=big)).status_code == 413
        response = await client.post("/proxy/v1/completions", json={"prompt": "<item:x>"})
        assert response.json()["error"]["param"] == "prompt"
        assert (await client.get("/proxy/ready")).status_code == 200
        assert (await client.get("/proxy/nowhere")).json()["error"]["code"] == "not_found"
        text = (await client.get("/metrics")).text
        line = 'rectokens_requests_total{route="/proxy/v1/completions",status="200"} 2.0'
        assert line in text
        assert "rectokens_proxy_sent_bytes_total" in (await client.get("/proxy/metrics")).text
    assert proxy.upstream._client.is_closed
