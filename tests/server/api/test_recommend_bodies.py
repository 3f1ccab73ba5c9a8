"""Bodies that are refused, and how that is told."""

from __future__ import annotations

import json

import pytest

from tests.server.api.answers import assert_error

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


async def test_a_part_with_item_and_text_is_told_to_choose(start_app, dummy):
    running = await start_app(dummy.make_release())
    response = await running.post({"input": [{"text": "a", "item": "B0"}]})
    assert response.status_code == 422
    assert "input.0 has both item and text" in response.json()["error"]["message"]
