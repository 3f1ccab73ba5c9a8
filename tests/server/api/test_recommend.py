"""What is recommended, and what the fields of a request do."""

from __future__ import annotations

from tests.server.api.answers import assert_error, ids


async def test_the_answer_is_as_documented(running):
    response = await running.post({"history": ["B001", "B002"], "top_k": 3})
    body = response.json()
    assert ids(response) == ["B000", "B003", "B004"]
    assert body["id"].startswith("rec-")
    assert body["model"] == "dummy"
    assert body["model_version"] == "model0000000000a"
    assert body["catalog_version"] == "unsaved"
    assert body["items"][1] == {"item_id": "B003", "score": -4.0, "semantic_id": [0, 0, 3]}
    assert body["shortfall"] is None
    assert body["unknown_items"] == []
    assert body["seed"] is None
    assert body["usage"] == {
        "prompt_tokens": 9,
        "cached_tokens": 0,
        "history_items": 2,
        "truncated_items": 0,
        "truncated_texts": 0,
    }
    timings = body["timings"]
    assert (timings["prefill_ms"], timings["decode_ms"]) == (1.0, 2.0)
    assert timings["total_ms"] >= timings["queue_ms"] >= 0


async def test_defaults_fill_what_is_left_out(running, engine):
    assert len(ids(await running.post({"history": []}))) == 10
    (request,) = engine.batches[-1]
    assert (request.beam_width, request.temperature, request.normalization) == (50, 0, "children")


async def test_defaults_come_from_the_settings(start_app, dummy):
    running = await start_app(
        dummy.make_release(),
        defaults__top_k=2,
        defaults__beam_width=4,
        defaults__exclude_history=False,
    )
    assert ids(await running.post({"history": ["B000"]})) == ["B000", "B001"]


NULLABLE = [
    "input",
    "top_k",
    "beam_width",
    "temperature",
    "seed",
    "exclude_history",
    "constraint_set",
    "normalization",
    "timeout_ms",
]


async def test_null_is_the_same_as_left_out(running):
    assert len(ids(await running.post({"history": [], **dict.fromkeys(NULLABLE)}))) == 10


async def test_a_wide_top_k_widens_the_beam_that_is_left_out(running, engine):
    await running.post({"history": [], "top_k": 80})
    assert engine.batches[-1][0].beam_width == 80


async def test_include_adds_to_each_item(running):
    response = await running.post(
        {
            "history": [],
            "top_k": 1,
            "include": ["semantic_id", "metadata", "level_scores"],
        }
    )
    assert response.json()["items"] == [
        {
            "item_id": "B000",
            "score": -1.0,
            "semantic_id": [0, 0, 0],
            "metadata": {"title": "title of B000"},
            "level_scores": [-1.0, 0.0, 0.0],
        }
    ]


async def test_history_is_excluded_unless_told_otherwise(running):
    body = {"history": ["B000", "B000", "B002"], "top_k": 2}
    assert ids(await running.post(body)) == ["B001", "B003"]
    assert ids(await running.post({**body, "exclude_history": False})) == ["B000", "B001"]


async def test_items_dropped_from_the_prompt_are_excluded_all_the_same(running, engine):
    response = await running.post({"history": [f"B{i:03d}" for i in range(12)], "top_k": 1})
    assert ids(response) == ["B012"]
    assert response.json()["usage"]["history_items"] == 8
    assert response.json()["usage"]["truncated_items"] == 4


async def test_excluded_items_reach_the_engine_sorted_and_once(running, engine):
    body = {"history": ["B004"], "exclude_items": ["B002", "B000", "B002", "B004", "nope"]}
    assert ids(await running.post({**body, "top_k": 2})) == ["B001", "B003"]
    assert engine.batches[-1][0].excluded_items.tolist() == [0, 2, 4]


async def test_excluding_only_unknown_items_excludes_nothing(running):
    body = {"history": [], "exclude_items": ["nope"], "top_k": 1}
    response = await running.post(body)
    assert ids(response) == ["B000"]
    assert response.json()["unknown_items"] == []


async def test_a_constraint_set_and_an_intersection_of_two(running):
    even = {"history": [], "constraint_set": "even", "top_k": 3}
    assert ids(await running.post(even)) == ["B000", "B002", "B004"]
    both = {"history": [], "constraint_set": ["even", "early", "even"], "top_k": 10}
    response = await running.post(both)
    assert ids(response) == ["B000", "B002", "B004", "B006", "B008"]
    assert response.json()["shortfall"] == {"reason": "filters", "returned": 5}


async def test_an_allow_list_holds_together_with_every_other_filter(running):
    def ids(response):
        return [item["item_id"] for item in response.json()["items"]]

    listed = ["B008", "B001", "nope", "B004", "B008", "B006", "B029"]
    body = {"history": ["B004"], "allow_items": listed, "top_k": 10}
    assert ids(await running.post(body)) == ["B001", "B006", "B008", "B029"]
    body |= {"constraint_set": ["even", "early"], "exclude_items": ["B006"]}
    response = await running.post(body)
    assert ids(response) == ["B008"]
    assert response.json()["shortfall"] == {"reason": "filters", "returned": 1}


async def test_an_empty_allow_list_allows_nothing(running):
    response = await running.post({"history": [], "allow_items": []})
    assert response.json()["items"] == []
    assert response.json()["shortfall"] == {"reason": "filters", "returned": 0}
    response = await running.post({"history": [], "allow_items": None, "top_k": 1})
    assert len(response.json()["items"]) == 1


async def test_an_unknown_constraint_set_is_answered_with_the_known(running):
    response = await running.post({"history": [], "constraint_set": ["even", "odd"]})
    message = assert_error(response, 422, "invalid_value", "constraint_set")
    assert "'odd'" in message
    assert "early, even" in message


async def test_unknown_items_are_skipped_and_listed_once(running, engine):
    response = await running.post({"history": ["x", "B001", "y", "x"], "top_k": 1})
    assert response.status_code == 200
    assert response.json()["unknown_items"] == ["x", "y"]
    assert response.json()["usage"]["history_items"] == 1


async def test_no_known_item_is_an_error(running, engine):
    message = assert_error(
        await running.post({"history": ["x", "y"]}), 422, "no_known_items", "history"
    )
    assert "2 items" in message
    assert engine.batches == []


async def test_an_empty_history_is_answered_from_the_start_prompt(running, engine):
    release = running.service.require_release()
    for body in ({"history": []}, {"input": []}):
        assert len(ids(await running.post(body))) == 10
        assert engine.batches[-1][0].prompt == release.prompts.build(()).token_ids


async def test_input_of_items_is_a_history(running, engine):
    await running.post({"history": ["B001", "B002"]})
    await running.post({"input": [{"item": "B001"}, {"item": "B002"}]})
    first, second = (batch[0].prompt for batch in engine.batches)
    assert first == second


async def test_text_and_items_keep_their_order(start_app, dummy, engine):
    running = await start_app(dummy.make_release(engine, takes_text=True))
    body = {"input": [{"text": "likes matte lipstick"}, {"item": "B001"}, {"item": "x"}]}
    response = await running.post(body)
    assert response.json()["unknown_items"] == ["x"]
    assert engine.batches[-1][0].prompt == (0, 3, 4, 5, 6)


async def test_text_makes_up_for_unknown_items(start_app, dummy):
    running = await start_app(dummy.make_release(takes_text=True))
    response = await running.post({"input": [{"text": "lipstick"}, {"item": "x"}]})
    assert response.status_code == 200
    assert response.json()["unknown_items"] == ["x"]
    response = await running.post({"input": [{"item": "x"}]})
    assert_error(response, 422, "no_known_items", "input")


async def test_text_for_a_model_without_text_is_an_error(running):
    response = await running.post({"input": [{"text": "lipstick"}]})
    assert "text" in assert_error(response, 422, "invalid_value", "input")


async def test_a_prompt_longer_than_the_model_takes_loses_its_oldest_items(
    start_app, dummy, engine
):
    engine.max_prompt_tokens = 10
    running = await start_app(dummy.make_release(engine))
    response = await running.post({"history": ["B001", "B002", "B003"]})
    usage = response.json()["usage"]
    assert (usage["history_items"], usage["truncated_items"]) == (2, 1)
    assert usage["prompt_tokens"] == len(engine.batches[-1][0].prompt) == 9
    assert engine.batches[-1][0].excluded_items.tolist() == [1, 2, 3]


async def test_a_prompt_longer_than_the_model_takes_is_refused_where_that_is_wanted(
    start_app, dummy, engine
):
    engine.max_prompt_tokens = 6
    running = await start_app(dummy.make_release(engine), defaults={"long_prompt": "reject"})
    response = await running.post({"history": ["B001", "B002"]})
    message = assert_error(response, 422, "prompt_too_long", "history")
    assert "9 tokens" in message
    assert "6" in message
    assert (await running.post({"history": ["B001"]})).status_code == 200
    asked = {"history": ["B001", "B002"], "long_prompt": "truncate"}
    assert (await running.post(asked)).json()["usage"]["truncated_items"] == 1
    engine.max_prompt_tokens = 4
    message = assert_error(await running.post(asked), 422, "prompt_too_long", "history")
    assert "5 tokens even with the newest item only; at most 4 fit" in message
    response = await running.post({**asked, "long_prompt": "shorten"})
    assert_error(response, 422, "invalid_value", "long_prompt")


async def test_a_seed_is_drawn_and_told_where_it_matters(running, engine):
    body = {"history": [], "temperature": 0.5}
    seeds = {(await running.post(body)).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert {request.seed for batch in engine.batches for request in batch} == seeds
    assert (await running.post({**body, "seed": 7})).json()["seed"] == 7
    assert (await running.post({**body, "seed": 2**63 - 1})).json()["seed"] == 2**63 - 1


async def test_any_string_is_an_item_id(running):
    """Whatever a client calls an item comes back as it was, and never breaks the answer."""
    odd = ["\x00", "ünï", "🧴", "a" * 512, "../../etc/passwd", "'; DROP TABLE items", "NaN"]
    response = await running.post({"history": ["B001", *odd], "exclude_items": odd})
    assert response.status_code == 200
    assert response.json()["unknown_items"] == odd


async def test_a_narrow_beam_alone_asks_for_no_more_items_than_beams(start_app, dummy):
    running = await start_app(dummy.make_release())
    response = await running.post({"history": [], "beam_width": 3})
    assert response.status_code == 200, response.text
    assert len(response.json()["items"]) <= 3
