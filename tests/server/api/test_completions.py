"""``POST /v1/completions``: around a dummy engine, and with a real tiny model."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

from rectokens.prompt_embeds import dump_payload, dump_tensor
from rectokens.turboquant import encode_embeddings
from server.api.completion_schemas import NEUTRAL_VALUES, CompletionResponse
from tests.server.api.answers import assert_error

URL = "/v1/completions"


@pytest.fixture
async def running(start_app, dummy, engine):
    return await start_app(dummy.make_release(engine), model_name="dummy")


async def complete(running, **body):
    return await running.client.post(URL, json=body)


def answered(response):
    assert response.status_code == 200, response.text
    CompletionResponse.model_validate_json(response.text, strict=True)
    return response.json()


def items(response):
    return [choice["item"]["item_id"] for choice in answered(response)["choices"]]


def plain(tokens=3, hidden=8):
    return dump_tensor(torch.arange(tokens * hidden).view(tokens, hidden).float())


async def test_the_answer_is_as_documented(running):
    body = answered(await complete(running, prompt="<item:B001> <item:B002>", n=2, max_tokens=16))
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "dummy")
    assert body["choices"][1] == {
        "index": 1,
        "text": "<item_L0_C0><item_L1_C0><item_L2_C1>",
        "logprobs": None,
        "finish_reason": "stop",
        "item": {"item_id": "B001", "score": -2.0, "semantic_id": [0, 0, 1]},
    }
    assert body["usage"] == {
        "prompt_tokens": 9,
        "cached_tokens": 0,
        "completion_tokens": 6,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    extension = body["rectokens"]
    assert extension["model_version"] == "model0000000000a"
    assert extension["catalog_version"] == "unsaved"
    (report,) = extension["prompts"]
    assert report["shortfall"] is None
    assert report["seed"] is None
    assert report["timings"]["prefill_ms"] == 1.0


async def test_items_in_text_make_the_prompt_of_a_history(running, engine):
    await complete(running, prompt="<item:B001><item:B002>")
    await running.post({"history": ["B001", "B002"]})
    completion, recommendation = (batch[0] for batch in engine.batches)
    assert completion.prompt == recommendation.prompt
    assert (completion.top_k, completion.beam_width) == (1, 50)
    # A completion says what continues the prompt; a recommendation leaves out what is known.
    assert completion.excluded_items is None
    await complete(running, prompt="<item:B002><item:B001>", exclude_history=True)
    assert engine.batches[-1][0].excluded_items.tolist() == [1, 2]


async def test_an_empty_prompt_is_the_start_prompt(running, engine, dummy):
    assert items(await complete(running, prompt="", n=3)) == ["B000", "B001", "B002"]
    assert engine.batches[-1][0].prompt == (1,)


async def test_unknown_items_are_named(running, engine):
    response = await complete(running, prompt=["<item:B001>", "<item:x><item:B001><item:y>"])
    message = assert_error(response, 422, "invalid_value", "prompt.1")
    assert "'x', 'y'" in message
    many = "".join(f"<item:z{i}>" for i in range(9))
    message = assert_error(await complete(running, prompt=many), 422, "invalid_value", "prompt")
    assert "and 4 more" in message


async def test_text_for_a_model_of_items_is_an_error(running):
    response = await complete(running, prompt="<item:B001> and <item_L0_C1>")
    assert "text" in assert_error(response, 422, "invalid_value", "prompt")


async def test_text_and_items_keep_their_order(start_app, dummy, engine):
    running = await start_app(dummy.make_release(engine, takes_text=True))
    await complete(running, prompt="likes <item:B001> not <item:B002>")
    assert engine.batches[-1][0].prompt == (0, 3, 4, 5, 6, 3, 4, 5, 6)


async def test_token_ids_are_the_whole_prompt(running, engine):
    await complete(running, prompt=[1, 10, 14, 18, 1])
    assert engine.batches[-1][0].prompt == (1, 10, 14, 18, 1)
    response = await complete(running, prompt=[[1], [10, 1]], n=2)
    assert [choice["index"] for choice in answered(response)["choices"]] == [0, 1, 2, 3]
    assert {batch.prompt for batches in engine.batches for batch in batches} >= {(1,), (10, 1)}


@pytest.mark.parametrize(
    ("prompt", "param", "part"),
    [
        ([1, 10], "prompt", "ends with token id 10; an item follows only token id 1"),
        ([24, 1], "prompt", "token id 24 is not one of the model's 0 to 23"),
        ([[1], [-1, 1]], "prompt.1", "token id -1"),
        ([[]], "prompt.0", "no token ids"),
        ([], "prompt", "empty list"),
        ([True], "prompt", ""),
        ([1.5], "prompt", ""),
        (["a"] * 17, "prompt", "17 entries; at most 16"),
        ("x" * 20_001, "prompt", "20001 characters of text; at most 20000"),
        ("<item:B001>" * 1_500 + "<item:" + "a" * 513 + ">", "prompt", "513 characters"),
    ],
)
async def test_bad_prompts(running, prompt, param, part):
    response = await complete(running, prompt=prompt)
    error = response.json()["error"]
    assert response.status_code == 422
    assert error["param"].startswith(param)
    assert part in error["message"]


async def test_a_prompt_longer_than_the_model_takes(running, engine):
    engine.max_prompt_tokens = 6
    assert_error(await complete(running, prompt=[1] * 7), 422, "prompt_too_long", "prompt")
    response = await complete(running, prompt_embeds=plain(7))
    assert "7 tokens" in assert_error(response, 422, "prompt_too_long", "prompt_embeds")
    text = "<item:B001><item:B002>"
    told = (await complete(running, prompt=text)).json()["rectokens"]["prompts"][0]
    assert told["truncated_items"] == 1
    response = await complete(running, prompt=text, long_prompt="reject")
    assert "9 tokens" in assert_error(response, 422, "prompt_too_long", "prompt")


async def test_embeddings_plain_and_compressed_one_and_many(running, engine):
    x = torch.arange(24).view(3, 8).float()
    packed, norms = encode_embeddings(x, bits=8)
    compressed = dump_payload(packed, norms, 8, 8)
    response = await complete(running, prompt="", prompt_embeds=dump_tensor(x))
    assert items(response) == ["B000"]
    request = engine.batches[-1][0]
    assert request.prompt == ()
    assert torch.equal(request.prompt_embeds, x)
    body = answered(await complete(running, prompt_embeds=[compressed, dump_tensor(x)], n=2))
    assert body["usage"]["prompt_tokens"] == 6
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    sent = [request.prompt_embeds for batch in engine.batches[1:] for request in batch]
    assert len(sent) == 2
    for embeds in sent:
        assert torch.allclose(embeds, x, atol=0.6)


@pytest.mark.parametrize(
    ("embeds", "param", "part"),
    [
        ("%%%", "prompt_embeds", "base64"),
        ([plain(), "AAAA"], "prompt_embeds.1", "zip"),
        (plain(hidden=16), "prompt_embeds", "8"),
        ([], "prompt_embeds", "empty list"),
        ([plain()] * 17, "prompt_embeds", "17 entries; at most 16"),
        (dump_tensor(torch.full((1, 8), float("nan"))), "prompt_embeds", "nan or infinity"),
    ],
    ids=["base64", "zip", "hidden", "none", "many", "nan"],
)
async def test_bad_embeddings_are_a_422(running, engine, embeds, param, part):
    message = assert_error(
        await complete(running, prompt_embeds=embeds), 422, "invalid_value", param
    )
    assert part in message.lower()


async def test_limits_on_embeddings(start_app, dummy, engine):
    running = await start_app(
        dummy.make_release(engine),
        limits__max_embeds_tokens=2,
        limits__max_completion_body_bytes=20_000,
        batching__max_queued_embeds=1,
    )
    message = assert_error(
        await complete(running, prompt_embeds=plain(3)), 422, "prompt_too_long", "prompt_embeds"
    )
    assert "allowed are 2" in message
    response = await complete(running, prompt_embeds="A" * 20_000)
    assert_error(response, 413, "body_too_large")
    engine.gate.clear()
    first = asyncio.create_task(complete(running, prompt_embeds=plain(1)))
    await asyncio.to_thread(engine.wait_for_batches, 1)
    refused = await complete(running, prompt_embeds=plain(1))
    assert "at most 1" in assert_error(refused, 429, "overloaded", "prompt_embeds")
    assert refused.headers["Retry-After"]
    engine.gate.set()
    assert (await first).status_code == 200
    assert (await complete(running, prompt_embeds=plain(1))).status_code == 200


async def test_the_body_of_a_recommendation_stays_small(start_app, dummy):
    running = await start_app(dummy.make_release(), limits__max_body_bytes=2_000)
    body = {"history": ["a" * 3_000]}
    assert (await running.post(body)).status_code == 413
    assert (await complete(running, prompt="<item:B001>", user="a" * 3_000)).status_code == 200


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
async def test_a_parameter_that_would_change_the_result_is_refused(running, engine, name):
    for value in (None, *NEUTRAL_VALUES[name]):
        assert (await complete(running, prompt="", **{name: value})).status_code == 200
    batches = len(engine.batches)
    message = assert_error(
        await complete(running, prompt="", **{name: 0.5}), 422, "invalid_value", name
    )
    assert message.startswith(f"{name} is 0.5")
    assert len(engine.batches) == batches


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({}, None, "neither prompt nor prompt_embeds"),
        ({"prompt": "x", "prompt_embeds": "AAAA"}, None, "both prompt and prompt_embeds"),
        ({"prompt": "", "n": 0}, "n", "0"),
        ({"prompt": "", "n": 1_001}, "n", "at most 1000"),
        ({"prompt": "", "n": 9, "beam_width": 8}, "n", "at most beam_width, 8"),
        ({"prompt": "", "max_tokens": 2}, "max_tokens", "max_tokens is 2; an item of this model"),
        ({"prompt": "", "best_of": 3}, "best_of", "must equal n, 1"),
        ({"prompt": "", "temperature": 11}, "temperature", "at most 10"),
        ({"prompt": "", "constraint_set": "odd"}, "constraint_set", "early, even"),
        ({"prompt": "", "timeout_ms": 60_001}, "timeout_ms", "at most 60000"),
        ({"prompt": "", "tempreature": 1}, "tempreature", "did you mean temperature"),
        ({"prompt": [1], "exclude_history": True}, "exclude_history", "give exclude_items"),
        ({"prompt": "", "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    ],
)
async def test_a_bad_value_names_field_value_and_limit(running, fields, param, part):
    message = assert_error(await complete(running, **fields), 422, "invalid_value", param)
    assert part in message


async def test_another_model_is_a_404(running):
    response = await complete(running, prompt="", model="gpt")
    assert "'dummy'" in assert_error(response, 404, "not_found", "model")
    assert (await complete(running, prompt="", model="dummy")).status_code == 200


async def test_the_search_is_as_asked(running, engine):
    response = await complete(
        running,
        prompt="",
        n=3,
        beam_width=7,
        temperature=0.5,
        seed=9,
        exclude_items=["B002", "zzz"],
        constraint_set="even",
        normalization="vocab",
        best_of=3,
        user="someone",
    )
    assert items(response) == ["B000", "B004", "B006"]
    request = engine.batches[-1][0]
    assert (request.top_k, request.beam_width, request.temperature) == (3, 7, 0.5)
    assert (request.seed, request.normalization) == (9, "vocab")
    assert response.json()["rectokens"]["prompts"][0]["seed"] == 9


async def test_a_shortfall_is_told_and_keeps_the_places_of_other_prompts(running):
    exclude = [f"B{i:03d}" for i in range(1, 30)]
    body = answered(await complete(running, prompt=["", ""], n=2, exclude_items=exclude))
    assert [choice["index"] for choice in body["choices"]] == [0, 2]
    for report in body["rectokens"]["prompts"]:
        assert report["shortfall"] == {"reason": "filters", "returned": 1}


async def test_one_faulty_prompt_fails_the_request(running, engine):
    engine.fault_if = lambda request: request.prompt == (10, 1)
    response = await complete(running, prompt=[[1], [10, 1]])
    assert_error(response, 500, "engine_fault")
    assert await running.metric("rectokens_queue_beam_rows") == 0


def events(text):
    chunks = text.split("\n\n")
    assert chunks[-1] == ""
    assert all(chunk.startswith("data: ") for chunk in chunks[:-1])
    payloads = [chunk.removeprefix("data: ") for chunk in chunks[:-1]]
    assert payloads.pop() == "[DONE]"
    return [json.loads(payload) for payload in payloads]


async def test_a_stream_says_the_same(running):
    body = {"prompt": ["<item:B001>", ""], "n": 2}
    whole = answered(await complete(running, **body))
    response = await complete(running, **body, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response.text)
    assert [chunk["choices"][0] for chunk in chunks] == whole["choices"]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [("rectokens" in chunk) for chunk in chunks] == [False, False, False, True]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len(events((await complete(running, **body, stream=True)).text)) == 4


async def test_a_stream_of_nothing_still_tells_why(running):
    exclude = [f"B{i:03d}" for i in range(30)]
    response = await complete(running, prompt="", exclude_items=exclude, stream=True)
    (chunk,) = events(response.text)
    assert chunk["rectokens"]["prompts"][0]["shortfall"]["returned"] == 0


async def test_an_error_has_its_own_status_in_a_stream_too(running):
    assert_error(
        await complete(running, prompt="<item:x>", stream=True), 422, "invalid_value", "prompt"
    )
    assert_error(
        await complete(running, prompt="", timeout_ms=0, stream=True),
        422,
        "invalid_value",
        "timeout_ms",
    )


async def test_the_example_of_the_documentation_works(running):
    spec = (await running.client.get("/openapi.json")).json()
    (example,) = spec["components"]["schemas"]["CompletionRequest"]["examples"]
    body = {**example, "model": "dummy", "prompt": "<item:B001>"}
    assert len(items(await complete(running, **body))) == 10


async def test_embeddings_of_the_ids_give_the_items_of_the_ids(start_app, tiny_lm, dummy):
    """A real model: text, token ids, plain and 8-bit embeddings, one answer."""
    from dataclasses import replace

    from server.engine.loading import build_engine

    model = tiny_lm("qwen3")
    release = replace(dummy.make_release(), engine=build_engine(model, dummy.ITEM_TOKENS))
    running = await start_app(release)
    ids = [1, 10, 14, 19, 1, 10, 15, 18, 1]
    with torch.inference_mode():
        embeds = tiny_lm("qwen3").get_input_embeddings()(torch.tensor(ids))
    packed, norms = encode_embeddings(embeds, bits=8)
    text = answered(await complete(running, prompt="<item:B001><item:B004>", n=5))["choices"]
    for fields, tolerance in (
        ({"prompt": ids}, 0.0),
        ({"prompt_embeds": dump_tensor(embeds)}, 0.0),
        ({"prompt_embeds": dump_payload(packed, norms, 8, 32)}, 0.1),
    ):
        found = answered(await complete(running, **fields, n=5))["choices"]
        assert [c["text"] for c in found] == [c["text"] for c in text]
        assert [c["item"]["score"] for c in found] == pytest.approx(
            [c["item"]["score"] for c in text], abs=tolerance
        )
