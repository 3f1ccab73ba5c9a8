"""What answers of /v1/recommend say."""

from __future__ import annotations

import asyncio

from server.api.schemas import RecommendResponse
from tests.waiting import until


def ids(response):
    assert response.status_code == 200, response.text
    RecommendResponse.model_validate_json(response.text, strict=True)
    return [item["item_id"] for item in response.json()["items"]]


def assert_error(response, status, code, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return error["message"]


async def metric_is(running, line, value):
    """Wait until a metric has some value."""

    async def seen():
        return await running.metric(line) == value

    await until(seen, lambda: line)


async def begun(engine, batches):
    await asyncio.to_thread(engine.wait_for_batches, batches)
