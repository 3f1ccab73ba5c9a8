"""What answers of /v1/recommend say."""

from __future__ import annotations

import asyncio

from server.api.schemas import RecommendResponse


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


async def begun(engine, batches):
    await asyncio.to_thread(engine.wait_for_batches, batches)
