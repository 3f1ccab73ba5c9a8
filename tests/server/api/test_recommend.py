from __future__ import annotations

import asyncio
import json

import pytest

from server.api.schemas import RecommendResponse


@pytest.fixture
def engine(dummy):
    return dummy.DummyEngine()


@pytest.fixture
async def running(start_app, dummy, engine):
    return await start_app(dummy.make_release(engine))


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


BAD_BODIES = [
    ({}, None, "neither history nor input"),
    ({"history": None}, None, "neither history nor input"),
    ({"history": [], "input": []}, None, "both history and input"),
    ({"history": "B001"}, "history", "'B001'"),
    ({"history": [1]}, "history.0", "1"),
    ({"history": ["B001", None]}, "history.1", "string"),
    ({"history": [""]}, "history.0", "''"),
    ({"history": ["a" * 513]}, "history", "513"),
    ({"history": ["B001"] * 10_000}, "history", "10000 entries; at most 2000"),
    ({"input": [{"item": "B001"}] * 2_001}, "input", "2001 entries; at most 2000"),
    ({"input": ["B001"]}, "input.0", "object"),
    ({"input": [{}]}, "input.0.item", "missing"),
    ({"input": [{"item": "B001", "text": "x"}]}, "input.0.item", "both item and text"),
    ({"input": [{"item": "B001"}, {"text": 3}]}, "input.1.text", "3"),
    ({"input": [{"txet": "x"}]}, "input.0.item", "missing"),
    ({"input": [{"text": "x" * 20_001}]}, "input", "20001 characters of text; at most 20000"),
    ({"history": [], "top_k": 0}, "top_k", "0"),
    ({"history": [], "top_k": -1}, "top_k", "-1"),
    ({"history": [], "top_k": 1_001}, "top_k", "1001; at most 1000"),
    ({"history": [], "top_k": 10**30}, "top_k", "at most 1000"),
    ({"history": [], "top_k": "10"}, "top_k", "'10'"),
    ({"history": [], "top_k": 10.0}, "top_k", "10.0"),
    ({"history": [], "top_k": True}, "top_k", "True"),
    ({"history": [], "top_k": 11, "beam_width": 10}, "top_k", "11; at most beam_width, 10"),
    ({"history": [], "beam_width": 5_001}, "beam_width", "5001; at most 5000"),
    ({"history": [], "beam_width": 0}, "beam_width", "0"),
    ({"history": [], "temperature": -0.1}, "temperature", "-0.1"),
    ({"history": [], "temperature": 10.1}, "temperature", "10.1; at most 10"),
    ({"history": [], "temperature": 1e-9}, "temperature", "1e-09; allowed are 0 and 0.001"),
    ({"history": [], "temperature": "hot"}, "temperature", "'hot'"),
    ({"history": [], "seed": -1}, "seed", "-1"),
    ({"history": [], "seed": 2**63}, "seed", str(2**63)),
    ({"history": [], "seed": 1.5}, "seed", "1.5"),
    ({"history": [], "exclude_history": "yes"}, "exclude_history", "'yes'"),
    ({"history": [], "exclude_items": None}, "exclude_items", "list"),
    ({"history": [], "exclude_items": ["x"] * 10_001}, "exclude_items", "10001 entries"),
    ({"history": [], "allow_items": ["x"] * 10_001}, "allow_items", "10001 entries"),
    ({"history": [], "allow_items": "B001"}, "allow_items", "list"),
    ({"history": [], "constraint_set": 3}, "constraint_set", "3"),
    ({"history": [], "constraint_set": ["even"] * 9}, "constraint_set", "9 entries; at most 8"),
    ({"history": [], "normalization": "softmax"}, "normalization", "'softmax'"),
    ({"history": [], "include": ["price"]}, "include.0", "'price'"),
    ({"history": [], "include": "metadata"}, "include", "'metadata'"),
    ({"history": [], "timeout_ms": 0}, "timeout_ms", "0"),
    ({"history": [], "timeout_ms": 60_001}, "timeout_ms", "60001; at most 60000"),
    ({"history": [], "topk": 3}, "topk", "did you mean top_k"),
    ({"history": [], "zzz": 3}, "zzz", "allowed are history, input, top_k"),
    ([], None, "object"),
    ("B001", None, "object"),
    (None, None, "body"),
]


@pytest.mark.parametrize(
    ("body", "param", "part"), BAD_BODIES, ids=[json.dumps(b)[:50] for b, _, _ in BAD_BODIES]
)
async def test_a_bad_value_names_field_value_and_limit(running, engine, body, param, part):
    message = assert_error(await running.post(body), 422, "invalid_value", param)
    assert part in message
    assert len(message) < 1_000
    assert engine.batches == []


async def test_several_bad_values_are_told_together(running):
    body = {"history": [], "top_k": "x", "beam_width": "y", "seed": "z"}
    message = assert_error(await running.post(body), 422, "invalid_value", "top_k")
    assert "beam_width" in message
    assert "seed" in message
    message = assert_error(
        await running.post({"history": [1] * 1_000}), 422, "invalid_value", "history.0"
    )
    assert "and 995 more" in message


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"nonsense",
        b'{"history": []',
        b'{"history": ["\xff"]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"history": [], "top_k": ' + b"9" * 5_000 + b"}",
    ],
    ids=lambda content: repr(content[:16]),
)
async def test_what_is_no_json_is_a_400(running, content):
    response = await running.client.post(
        "/v1/recommend", content=content, headers={"Content-Type": "application/json"}
    )
    assert "body is not JSON" in assert_error(response, 400, "malformed_json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_not_finite_are_refused(running, value):
    response = await running.client.post(
        "/v1/recommend",
        content=f'{{"history": [], "temperature": {value}}}',
        headers={"Content-Type": "application/json"},
    )
    assert_error(response, 422, "invalid_value", "temperature")


async def test_half_of_a_surrogate_pair_is_refused(running):
    response = await running.client.post(
        "/v1/recommend",
        content=b'{"history": ["B001", "\\ud800"]}',
        headers={"Content-Type": "application/json"},
    )
    assert_error(response, 422, "invalid_value", "history.1")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
async def test_another_content_type_is_a_415(running, content_type):
    response = await running.client.post(
        "/v1/recommend", content=b'{"history": []}', headers={"Content-Type": content_type}
    )
    assert content_type in assert_error(response, 415, "unsupported_media_type")


async def test_no_body_is_an_error(running):
    message = assert_error(await running.client.post("/v1/recommend"), 422, "invalid_value")
    assert "body is missing" in message


async def test_a_full_queue_is_a_429_with_retry_after(start_app, dummy, engine):
    running = await start_app(
        dummy.make_release(engine),
        limits__max_beam_width=60,
        limits__max_top_k=60,
        batching__max_queued_beam_rows=60,
    )
    engine.gate.clear()
    first = asyncio.create_task(running.post({"history": [], "beam_width": 10}))
    await begun(engine, 1)
    second = asyncio.create_task(running.post({"history": [], "beam_width": 50}))
    while await running.metric("rectokens_queue_beam_rows") != 50:
        await asyncio.sleep(0.005)
    refused = await running.post({"history": [], "beam_width": 20})
    message = assert_error(refused, 429, "overloaded")
    assert "50 beam rows" in message
    assert int(refused.headers["Retry-After"]) >= 1
    assert await running.metric('rectokens_rejected_total{reason="overloaded"}') == 1
    engine.gate.set()
    assert {(await first).status_code, (await second).status_code} == {200}


async def test_a_deadline_that_passes_is_a_504(running, engine):
    engine.gate.clear()
    response = await running.post({"history": [], "timeout_ms": 30})
    assert_error(response, 504, "deadline_exceeded", "timeout_ms")
    engine.gate.set()


async def test_a_faulty_request_is_a_500_with_an_id_and_no_details(running, engine):
    engine.fault_if = lambda request: True
    response = await running.post({"history": []}, headers={"X-Request-ID": "abc-1"})
    message = assert_error(response, 500, "engine_fault")
    assert "made to order" not in response.text
    assert "request id" in message
    assert response.headers["X-Request-ID"] == "abc-1"
    engine.fault_if = lambda request: False
    assert (await running.post({"history": []})).status_code == 200


async def test_an_unforeseen_error_is_a_500_without_a_traceback(running, monkeypatch):
    def explode(*args):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("server.recommender.present", explode)
    response = await running.post({"history": []})
    assert_error(response, 500, "internal")
    assert "secret" not in response.text
    assert response.headers["X-Request-ID"]
    assert await running.metric('rectokens_rejected_total{reason="internal"}') == 1


async def test_concurrent_requests_share_a_batch(running, engine):
    engine.gate.clear()
    first = asyncio.create_task(running.post({"history": []}))
    await begun(engine, 1)
    others = [
        asyncio.create_task(running.post({"history": [f"B{i:03d}"], "top_k": i + 1}))
        for i in range(6)
    ]
    while await running.metric("rectokens_queue_requests") != 6:
        await asyncio.sleep(0.005)
    engine.gate.set()
    responses = await asyncio.gather(first, *others)
    assert [len(ids(response)) for response in responses] == [10, 1, 2, 3, 4, 5, 6]
    assert [len(batch) for batch in engine.batches] == [1, 6]


async def test_a_request_keeps_the_release_it_was_admitted_under(running, engine, dummy):
    engine.gate.clear()
    before = asyncio.create_task(running.post({"history": []}))
    await begun(engine, 1)
    queued = asyncio.create_task(running.post({"history": []}))
    while await running.metric("rectokens_queue_requests") != 1:
        await asyncio.sleep(0.005)
    running.service.activate(dummy.make_release(model_version="model0000000000b"))
    after = asyncio.create_task(running.post({"history": []}))
    while await running.metric("rectokens_queue_requests") != 2:
        await asyncio.sleep(0.005)
    engine.gate.set()
    versions = [(await task).json()["model_version"][-1] for task in (before, queued, after)]
    assert versions == ["a", "a", "b"]


async def call_asgi(app, messages, scope_headers=()):
    """Drive the app with hand-made messages; returns what it sent."""
    sent = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/recommend",
        "raw_path": b"/v1/recommend",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json"), *scope_headers],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }

    async def send(message):
        sent.append(message)

    await app(scope, messages, send)
    return sent


async def test_a_client_that_leaves_frees_its_place_in_the_queue(running, engine):
    engine.gate.clear()
    head = asyncio.create_task(running.post({"history": []}))
    await begun(engine, 1)
    leave = asyncio.Event()
    body = iter([{"type": "http.request", "body": b'{"history": []}', "more_body": False}])

    async def receive():
        message = next(body, None)
        if message is None:
            await leave.wait()
            return {"type": "http.disconnect"}
        return message

    leaver = asyncio.create_task(call_asgi(running.app, receive))
    while await running.metric("rectokens_queue_requests") != 1:
        await asyncio.sleep(0.005)
    leave.set()
    await leaver
    assert await running.metric("rectokens_queue_requests") == 0
    assert await running.metric("rectokens_queue_beam_rows") == 0
    assert await running.metric('rectokens_rejected_total{reason="client_gone"}') == 1
    engine.gate.set()
    assert (await head).status_code == 200
    assert [len(batch) for batch in engine.batches] == [1]


async def test_health_answers_while_requests_are_being_prepared(start_app, dummy, monkeypatch):
    """A long request is turned into a prompt off the event loop."""
    import threading

    import server.recommender

    entered, go_on, prepare = threading.Event(), threading.Event(), server.recommender.prepare

    def slow(query, release):
        entered.set()
        assert go_on.wait(timeout=30)
        return prepare(query, release)

    monkeypatch.setattr("server.recommender.prepare", slow)
    running = await start_app(dummy.make_release())
    task = asyncio.create_task(running.post({"history": ["B001"] * 500}))
    await asyncio.to_thread(entered.wait, 30)
    assert (await running.client.get("/health")).status_code == 200
    go_on.set()
    assert (await task).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le", "utf-8-sig"])
async def test_a_body_that_is_not_plain_utf_8_is_malformed(start_app, dummy, encoding):
    running = await start_app(dummy.make_release())
    response = await running.client.post(
        "/v1/recommend",
        content='{"history": []}'.encode(encoding),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "malformed_json"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ('{"history": ["B0"], "history": []}', "key 'history' is given more than once"),
        ('{"history": [], "top_k": ' + "9" * 10_000 + "}", "a number has 10000 digits"),
        ('{"history": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
async def test_json_that_nobody_means_is_malformed(start_app, dummy, body, part):
    running = await start_app(dummy.make_release())
    response = await running.client.post(
        "/v1/recommend", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert part in response.json()["error"]["message"]


async def test_a_narrow_beam_alone_asks_for_no_more_items_than_beams(start_app, dummy):
    running = await start_app(dummy.make_release())
    response = await running.post({"history": [], "beam_width": 3})
    assert response.status_code == 200, response.text
    assert len(response.json()["items"]) <= 3


async def test_a_part_with_item_and_text_is_told_to_choose(start_app, dummy):
    running = await start_app(dummy.make_release())
    response = await running.post({"input": [{"text": "a", "item": "B0"}]})
    assert response.status_code == 422
    assert "input.0 has both item and text" in response.json()["error"]["message"]
