"""Scores of given items: those of the search, in the order asked for."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.score_schemas import ScoreRequest, ScoreResponse


@pytest.fixture
async def running(start_app: Any, real: Any) -> Any:
    return await start_app(real)


async def score(running: Any, body: dict[str, Any]) -> dict[str, Any]:
    response = await running.client.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    ScoreResponse.model_validate_json(response.text, strict=True)
    return response.json()


@pytest.mark.parametrize("normalization", ["vocab", "level", "children"])
async def test_equals_the_score_of_the_search(running: Any, normalization: str) -> None:
    body = {"history": ["item-3", "item-70", "item-8"], "normalization": normalization}
    search = {**body, "top_k": 60, "beam_width": 60, "include": ["level_scores"]}
    found = (await running.post(search)).json()["items"]
    items = [item["item_id"] for item in found]
    # Another order, and items that no beam of the search kept.
    items = [*reversed(items), *(f"item-{row}" for row in range(0, 400, 9))]
    answer = await score(running, {**body, "items": items})
    assert [item["item_id"] for item in answer["items"]] == items
    scored = {item["item_id"]: item for item in answer["items"]}
    assert len(found) == 60
    for item in found:
        mine = scored[item["item_id"]]
        assert mine["score"] == pytest.approx(item["score"], abs=1e-4)
        assert mine["level_scores"] == pytest.approx(item["level_scores"], abs=1e-4)
        assert mine["semantic_id"] == item["semantic_id"]
    assert answer["unscored_items"] == []


async def test_every_item_of_a_catalog_has_a_score_and_they_are_a_distribution(
    running: Any,
) -> None:
    import math

    items = [f"item-{row}" for row in range(400)]
    answer = await score(running, {"history": ["item-1"], "items": items})
    mass = {tuple(item["semantic_id"]): math.exp(item["score"]) for item in answer["items"]}
    assert len(mass) < 400  # some share a semantic ID, and with it the score
    assert sum(mass.values()) == pytest.approx(1.0, abs=1e-3)


async def test_unknown_and_repeated_items(running: Any) -> None:
    body = {"history": ["item-1", "gone"], "items": ["nope", "item-5", "nope", "item-5", "item-2"]}
    answer = await score(running, body)
    assert [item["item_id"] for item in answer["items"]] == body["items"]
    assert [item["score"] is None for item in answer["items"]] == [True, False, True, False, False]
    assert answer["items"][0] == {
        "item_id": "nope",
        "score": None,
        "semantic_id": None,
        "level_scores": None,
    }
    assert answer["items"][1] == answer["items"][3]
    assert answer["unscored_items"] == ["nope"]
    assert answer["unknown_items"] == ["gone"]
    assert answer["usage"]["history_items"] == 1


async def test_items_of_the_history_are_scored_too(running: Any) -> None:
    answer = await score(running, {"history": ["item-1"], "items": ["item-1"]})
    assert answer["items"][0]["score"] is not None


async def test_none_known_is_an_answer(running: Any) -> None:
    answer = await score(running, {"history": [], "items": ["x", "y"]})
    assert answer["unscored_items"] == ["x", "y"]


async def test_scores_are_not_counted_as_recommendations(running: Any) -> None:
    await score(running, {"history": [], "items": ["item-1", "nope"]})
    assert await running.metric("rectokens_items_returned_total") == 0
    assert await running.metric('rectokens_shortfall_total{reason="filters"}') == 0


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"history": []}, "items", "missing"),
        ({"history": [], "items": []}, "items", "at least 1"),
        ({"history": [], "items": ["x"] * 1_001}, "items", "1001 entries; at most 1000"),
        ({"history": [], "items": ["x" * 513]}, "items", "513 characters; at most 512"),
        ({"history": [], "items": "item-1"}, "items", "list"),
        ({"items": ["item-1"]}, None, "neither history nor input"),
        ({"history": [], "input": [], "items": ["item-1"]}, None, "both history and input"),
        ({"history": [], "items": ["item-1"], "top_k": 3}, "top_k", "unknown field"),
        ({"history": [], "items": ["item-1"], "timeout_ms": 60_001}, "timeout_ms", "60001"),
        ({"history": ["nope"], "items": ["item-1"]}, "history", "none of the 1 items"),
    ],
)
async def test_bad_requests(
    running: Any, body: dict[str, Any], param: str | None, message: str
) -> None:
    response = await running.client.post("/v1/score", json=body)
    error = response.json()["error"]
    assert response.status_code == 422, response.text
    assert error["param"] == param
    assert message in error["message"]


def test_the_documented_examples_have_the_documented_shape() -> None:
    for model in (ScoreRequest, ScoreResponse):
        for example in model.model_config["json_schema_extra"]["examples"]:  # type: ignore[index]
            model.model_validate(example)
