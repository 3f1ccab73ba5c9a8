"""What the upstream gets, and what the client gets of its answer."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
import torch

from rectokens.prompt_embeds import load_prompt_embeds

URL = "/v1/completions"


def loaded(text, hidden=32):
    return load_prompt_embeds(text, hidden_size=hidden, max_tokens=10_000, max_bytes=1 << 26)


def table(store):
    return store.lm.get_input_embeddings().weight.detach()


def assert_error(response, status, code, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return error["message"]


async def test_a_prompt_travels_as_embeddings_and_all_else_as_it_is(start_proxy, upstream, store):
    proxy = await start_proxy(embedding_compression="none")
    response = await proxy.complete(
        "the user likes", model="m", temperature=0.5, stop=["x"], unheard_of={"a": [1]}
    )
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "hello"
    (call,) = upstream.calls
    assert (call.method, call.path) == ("POST", "/v1/completions")
    sent = call.body.pop("prompt_embeds")
    expected = {"model": "m", "temperature": 0.5, "stop": ["x"], "unheard_of": {"a": [1]}}
    assert call.body == expected
    assert torch.equal(loaded(sent), table(store)[[3, 4, 5]])


@pytest.mark.parametrize("bits", [1, 4, 8])
async def test_embeddings_are_compressed(start_proxy, upstream, store, bits):
    proxy = await start_proxy(embedding_bits=bits)
    assert (await proxy.complete([3, 4, 5])).status_code == 200
    found, exact = loaded(upstream.calls[0].body["prompt_embeds"]), table(store)[[3, 4, 5]]
    error = ((found - exact).norm() / exact.norm()).item()
    assert error < {1: 0.9, 4: 0.2, 8: 0.02}[bits]
    assert error > 0


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("a b", [[9, 10]]),
        (["a b", "c"], [[9, 10], [11]]),
        ([9, 10], [[9, 10]]),
        ([[9, 10], [11]], [[9, 10], [11]]),
        (["a", [11]], [[9], [11]]),
    ],
)
async def test_one_prompt_or_many(start_proxy, upstream, store, prompt, rows):
    proxy = await start_proxy(embedding_compression="none")
    assert (await proxy.complete(prompt)).status_code == 200
    sent = upstream.calls[0].body["prompt_embeds"]
    assert isinstance(sent, list) == (prompt not in ("a b", [9, 10]))
    for text, ids in zip(sent if isinstance(sent, list) else [sent], rows, strict=True):
        assert torch.equal(loaded(text), table(store)[ids])


async def test_item_tokens_spelled_out_stay_text(start_proxy, upstream, store):
    """Neither in a completion nor in a chat; special tokens of the text remain special."""
    proxy = await start_proxy(embedding_compression="none")
    literal = "a <item_L0_C1> <|item_start|> </s>"
    item = store.tokenizer.item_tokens
    assert item.offset + 1 in store.tokenizer(literal)["input_ids"]
    await proxy.complete(literal)
    await proxy.chat(literal)
    completion, chat = (loaded(call.body["prompt_embeds"]) for call in upstream.calls)
    assert torch.equal(completion, table(store)[[9, 0, 0, 2]])
    assert torch.equal(chat, table(store)[[4, 12, 9, 0, 0, 2, 2, 13, 12]])


async def test_items_are_named_in_a_completion(start_proxy, upstream, store):
    """With a catalog, the prompt is the one that the model's recipe makes."""
    proxy = await start_proxy(catalog=True, embedding_compression="none")
    assert (await proxy.complete("likes <item:B001> and <item:B006>")).status_code == 200
    item = store.tokenizer.item_tokens
    start, end = item.start_token_id, item.end_token_id
    expected = [1, 5, start, *item.encode([0, 0, 1]), end, 8, start, *item.encode([0, 1, 2]), end]
    found = loaded(upstream.calls[0].body["prompt_embeds"])
    assert torch.equal(found, table(store)[[*expected, start]])
    response = await proxy.complete(["a", "<item:x>"])
    message = assert_error(response, 422, "invalid_value", "prompt.1")
    assert "'x'" in message
    assert len(upstream.calls) == 1


async def test_items_are_named_in_a_chat(start_proxy, upstream, store):
    proxy = await start_proxy(catalog=True, embedding_compression="none")
    assert (await proxy.chat("likes <item:B001>")).status_code == 200
    item = store.tokenizer.item_tokens
    codes = [item.start_token_id, *item.encode([0, 0, 1]), item.end_token_id]
    found = loaded(upstream.calls[0].body["prompt_embeds"])
    assert torch.equal(found, table(store)[[4, 12, 5, *codes, 2, 13, 12]])
    assert_error(await proxy.chat("<item:x>"), 422, "invalid_value", "messages")


async def test_without_a_catalog_items_are_text(start_proxy, upstream, store):
    proxy = await start_proxy(embedding_compression="none")
    await proxy.complete("a <item:B001>")
    assert torch.equal(loaded(upstream.calls[0].body["prompt_embeds"]), table(store)[[9, 0]])


async def test_a_chat_comes_back_as_a_chat(start_proxy, upstream, mock_tools):
    given = mock_tools.completion("hi", usage={"total_tokens": 3}, rectokens={"x": 1})
    given["choices"][0] |= {
        "item": {"item_id": "B001"},
        "logprobs": {
            "tokens": ["hi"],
            "token_logprobs": [-0.5],
            "top_logprobs": [{"hi": -0.5, "ho": -1.5}],
        },
    }

    async def behave(call):
        await call.answer(body=given)

    upstream.behave = behave
    proxy = await start_proxy()
    response = await proxy.chat(
        [{"type": "text", "text": "the "}, {"type": "text", "text": "user"}],
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=7,
        n=1,
    )
    body = response.json()
    assert (body["id"], body["object"]) == ("chatcmpl-1", "chat.completion")
    assert (body["usage"], body["rectokens"]) == ({"total_tokens": 3}, {"x": 1})
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hi"}
    assert (choice["finish_reason"], choice["item"]) == ("stop", {"item_id": "B001"})
    assert "text" not in choice
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("hi", -0.5, [104, 105])
    assert [top["token"] for top in entry["top_logprobs"]] == ["hi", "ho"]
    sent = upstream.calls[0].body
    assert set(sent) == {"prompt_embeds", "max_tokens", "logprobs", "n"}
    assert (sent["max_tokens"], sent["logprobs"]) == (7, 2)


async def test_a_chat_without_a_limit_gets_one(start_proxy, upstream):
    proxy = await start_proxy(chat_max_tokens=77)
    await proxy.chat()
    await proxy.chat(max_tokens=5)
    assert [call.body["max_tokens"] for call in upstream.calls] == [77, 5]


BAD_COMPLETIONS = [
    ({}, "prompt", "text or a list of token ids"),
    ({"prompt": None}, "prompt", "text"),
    ({"prompt": 3}, "prompt", "text"),
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": [[]]}, "prompt.0", "token ids"),
    ({"prompt": ["a", None]}, "prompt.1", "token ids"),
    ({"prompt": [1, True]}, "prompt.0", "token ids"),
    ({"prompt": [10**12]}, "prompt", "1000000000000 is not one of the model's 0 to"),
    ({"prompt": [[1], [-1]]}, "prompt.1", "-1"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": ["a"] * 33}, "prompt", "33 entries; at most 32"),
    ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds", "makes them itself"),
    ({"prompt": "a", "use_beam_search": True}, "use_beam_search", "not possible"),
    ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
    ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "true or false"),
]


@pytest.mark.parametrize(("body", "param", "part"), BAD_COMPLETIONS, ids=str)
async def test_bad_completions_do_not_reach_the_upstream(start_proxy, upstream, body, param, part):
    proxy = await start_proxy()
    response = await proxy.client.post(URL, json=body)
    assert part in assert_error(response, 422, "invalid_value", param)
    assert upstream.calls == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user"}], "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user"}], "chat_template": "{{x}}"}, "chat_template"),
        ({"messages": [{"role": "user"}], "logprobs": 3}, "logprobs"),
        ({"messages": [{"role": "user"}], "prompt_embeds": "A"}, "prompt_embeds"),
        ({"messages": [{"role": "user"}], "use_beam_search": True}, "use_beam_search"),
        (
            {"messages": [{"role": "user"}], "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs",
        ),
    ],
    ids=str,
)
async def test_bad_chats_do_not_reach_the_upstream(start_proxy, upstream, body, param):
    proxy = await start_proxy()
    response = await proxy.client.post("/v1/chat/completions", json=body)
    assert_error(response, 422, "invalid_value", param)
    assert upstream.calls == []


async def test_a_template_s_own_trouble_with_messages_is_the_client_s(start_proxy, upstream):
    deep = "x"
    for _ in range(900):
        deep = [deep]
    message = {"role": "user", "content": "a", "more": deep}
    proxy = await start_proxy()
    response = await proxy.client.post("/v1/chat/completions", json={"messages": [message]})
    assert "template refuses" in assert_error(response, 422, "invalid_value", "messages")
    response = await proxy.complete(more=deep)
    assert "nested too deeply" in assert_error(response, 400, "malformed_json")
    assert upstream.calls == []


async def test_what_is_no_json_object_is_refused(start_proxy):
    proxy = await start_proxy(max_body_bytes=2_000)
    headers = {"Content-Type": "application/json"}
    response = await proxy.client.post(URL, content=b"{", headers=headers)
    assert_error(response, 400, "malformed_json")
    response = await proxy.client.post(URL, content=b"[]", headers=headers)
    assert_error(response, 422, "invalid_value")
    response = await proxy.client.post(URL, content=b"{}", headers={"Content-Type": "text/plain"})
    assert_error(response, 415, "unsupported_media_type")
    response = await proxy.complete("a" * 2_000)
    assert_error(response, 413, "body_too_large")
    assert_error(await proxy.client.get("/nowhere"), 404, "not_found")


async def test_a_prompt_that_is_too_long(start_proxy):
    proxy = await start_proxy(max_prompt_tokens=4)
    message = assert_error(await proxy.complete(["a b c", "a b"]), 422, "prompt_too_long", "prompt")
    assert "5 tokens" in message
    assert (await proxy.complete("a b c c")).status_code == 200


async def test_a_client_s_own_embeddings_where_allowed(start_proxy, upstream):
    proxy = await start_proxy(accept_prompt_embeds=True)
    response = await proxy.client.post(URL, json={"prompt_embeds": "AAAA", "n": 2, "prompt": ""})
    assert response.status_code == 200
    assert upstream.calls[0].body == {"prompt_embeds": "AAAA", "n": 2}
    response = await proxy.complete("a", prompt_embeds="AAAA")
    assert_error(response, 422, "invalid_value", "prompt")


async def test_keys_are_forwarded_only_when_told_and_never_logged(start_proxy, upstream, caplog):
    key = {"Authorization": "Bearer SECRETKEY", "X-Request-ID": "abc-7"}
    with caplog.at_level(logging.DEBUG):
        for forward in (False, True):
            proxy = await start_proxy(forward_authorization=forward)
            await proxy.client.post(URL, json={"prompt": "a"}, headers=key)
            await proxy.client.get("/v1/models", headers=key)
    found = [call.headers.get("authorization") for call in upstream.calls]
    assert found == [None, None, "Bearer SECRETKEY", "Bearer SECRETKEY"]
    assert {call.headers["x-request-id"] for call in upstream.calls} == {"abc-7"}
    own = [record for record in caplog.records if record.name.startswith("server")]
    assert "SECRETKEY" not in "".join(record.getMessage() for record in own)


async def test_headers_are_passed_on_whatever_bytes_they_are(start_proxy, upstream):
    async def refuse(call):
        await call.answer(401, {"error": "no"}, **{"www-authenticate": 'Bearer realm="Ł€"'})

    upstream.behave = refuse
    proxy = await start_proxy(forward_authorization=True)
    for method, path in [("POST", URL), ("GET", "/v1/models")]:
        headers = {"Authorization": "Bearer Schlüssel".encode()}
        body = {"json": {"prompt": "a"}} if method == "POST" else {}
        response = await proxy.client.request(method, path, headers=headers, **body)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == 'Bearer realm="Ł€"'
        assert upstream.calls[-1].headers["authorization"] == "Bearer Schlüssel"


async def test_models_health_and_ready(start_proxy, upstream):
    proxy = await start_proxy(catalog=True)
    models = {"object": "list", "data": [{"id": "m"}]}

    async def behave(call):
        assert call.path == "/v1/models"
        await call.answer(body=models)

    upstream.behave = behave
    assert (await proxy.client.get("/v1/models")).json() == models
    assert (await proxy.client.get("/health")).json() == {"status": "ok"}
    ready = await proxy.client.get("/ready")
    assert ready.json() == {
        "status": "ready",
        "hidden_size": 32,
        "embedding_compression": "turboquant",
        "embedding_bits": 4,
    }


async def test_metrics_tell_what_was_saved(start_proxy, store):
    proxy = await start_proxy()
    await proxy.complete([3] * 1_000)
    plain = await proxy.metric("rectokens_proxy_plain_bytes_total")
    sent = await proxy.metric("rectokens_proxy_sent_bytes_total")
    assert plain == -(-1_000 * 32 * 4 // 3) * 4
    assert 4 < plain / sent < 6.4
    assert await proxy.metric("rectokens_proxy_prompt_tokens_total") == 1_000
    assert await proxy.metric("rectokens_proxy_encode_seconds_count") == 1
    assert await proxy.metric("rectokens_proxy_upstream_seconds_count") == 1
    assert await proxy.metric("rectokens_proxy_compression_ratio_count") == 1
    route = 'rectokens_proxy_requests_total{route="/v1/completions",status="200"}'
    assert await proxy.metric(route) == 1


async def stream_lines(proxy, path, body):
    async with proxy.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                yield line


async def test_events_pass_as_they_arrive(start_proxy, upstream, mock_tools):
    """An event is with the client before the upstream has the next; split ones are put together."""
    go_on = asyncio.Event()
    first = b"data: " + json.dumps(mock_tools.completion("one")).encode() + b"\n\n"

    async def behave(call):
        await call.begin_events()
        await call.chunk(b": keep-alive\n\n" + first[:7])
        await call.chunk(first[7:-1])
        await call.chunk(first[-1:])
        await go_on.wait()
        await call.chunk(first.replace(b"one", b"two").replace(b"\n", b"\r\n") + b"data: [DO")
        await call.chunk(b"NE]\n\n")
        await call.send(b"0\r\n\r\n")

    upstream.behave = behave
    proxy = await start_proxy()
    lines = stream_lines(proxy, URL, {"prompt": "a", "stream": True})
    assert await anext(lines) == ": keep-alive"
    assert "one" in await anext(lines)
    go_on.set()
    assert "two" in await anext(lines)
    assert [line async for line in lines] == ["data: [DONE]"]
    assert upstream.calls[0].body["stream"] is True
    # Read to its end, the connection is used again.
    upstream.behave = upstream.ok
    await proxy.complete()
    assert upstream.opened == 1


async def test_chat_events_have_the_shape_of_a_chat(start_proxy, upstream, mock_tools):
    async def behave(call):
        await call.begin_events()
        for text in ("one", "two"):
            body = json.dumps(mock_tools.completion(text)).encode()
            await call.chunk(b"data: " + body + b"\n\n")
        usage = json.dumps({**mock_tools.completion(), "choices": [], "usage": {"a": 1}}).encode()
        await call.chunk(b"data: " + usage + b"\n\ndata: [DONE]\n\n")
        await call.send(b"0\r\n\r\n")

    upstream.behave = behave
    proxy = await start_proxy()
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    lines = [line async for line in stream_lines(proxy, "/v1/chat/completions", body)]
    assert lines.pop() == "data: [DONE]"
    one, two, usage = (json.loads(line.removeprefix("data: ")) for line in lines)
    assert {chunk["object"] for chunk in (one, two, usage)} == {"chat.completion.chunk"}
    assert one["id"] == "chatcmpl-1"
    assert one["choices"][0]["delta"] == {"role": "assistant", "content": "one"}
    assert two["choices"][0]["delta"] == {"content": "two"}
    assert (usage["choices"], usage["usage"]) == ([], {"a": 1})
