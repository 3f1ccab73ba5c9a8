"""Upstreams that fail, clients that leave, and many of both: mapped, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import resource

import pytest

from tests.ports import port_of_nobody
from tests.waiting import LIMIT_S, until

URL = "/v1/completions"
CHAT = "/v1/chat/completions"


def assert_error(response, status, code):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    return error["message"]


async def every_way(proxy):
    """One answer of each of the ways that reach the upstream."""
    return [
        await proxy.complete(),
        await proxy.complete(stream=True),
        await proxy.chat(),
        await proxy.chat(stream=True),
        await proxy.client.get("/v1/models"),
    ]


async def test_an_upstream_that_is_down_is_a_502(start_proxy):
    with port_of_nobody() as port:
        proxy = await start_proxy(url=f"http://127.0.0.1:{port}")
        for response in await every_way(proxy):
            assert_error(response, 502, "upstream_unreachable")
        assert_error(await proxy.client.get("/ready"), 503, "upstream_unavailable")
    assert (await proxy.client.get("/health")).status_code == 200
    line = 'rectokens_proxy_rejected_total{reason="upstream_unreachable"}'
    assert await proxy.metric(line) == 5


async def test_an_upstream_that_is_silent_is_a_504(start_proxy, upstream):
    async def behave(call):
        await asyncio.sleep(LIMIT_S)

    upstream.behave = behave
    proxy = await start_proxy(read_timeout_s=0.1)
    for response in await every_way(proxy):
        assert_error(response, 504, "upstream_timeout")
    await until(lambda: upstream.connections == 0)


async def test_an_upstream_that_closes_is_a_502(start_proxy, upstream, mock_tools):
    async def at_once(call):
        raise mock_tools.CloseNowError

    async def in_the_body(call):
        await call.head(**{"content-length": "1000"})
        await call.send(b'{"choices"')
        raise mock_tools.CloseNowError

    proxy = await start_proxy()
    upstream.behave = at_once
    for response in await every_way(proxy):
        assert_error(response, 502, "upstream_failed")
    upstream.behave = in_the_body
    for response in (await proxy.complete(), await proxy.chat()):
        assert_error(response, 502, "upstream_failed")


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b'{"a": ', b"\xff\xfe", b"null", b'{"choices": [1]}'], ids=repr
)
async def test_garbage_is_a_502(start_proxy, upstream, content):
    async def behave(call):
        await call.answer(body=content)

    upstream.behave = behave
    proxy = await start_proxy()
    responses = [await proxy.chat(), await proxy.complete(stream=True)]
    if content not in (b"null", b'{"choices": [1]}'):  # JSON, which a completion passes on
        responses.append(await proxy.complete())
    for response in responses:
        assert_error(response, 502, "upstream_failed")


NESTED = [[]]
for _ in range(300):
    NESTED = [NESTED]
ODD_CHOICES = [
    {"index": [1]},
    {"logprobs": {"tokens": 5}},
    {"logprobs": {"tokens": ["a"], "token_logprobs": 5}},
    {"logprobs": {"tokens": ["a"], "token_logprobs": [1.0], "top_logprobs": [[1]]}},
    {"more": NESTED},
]


@pytest.mark.parametrize("choice", ODD_CHOICES, ids=lambda one: next(iter(one)))
async def test_odd_completions_are_no_chats(start_proxy, upstream, mock_tools, choice):
    answer = mock_tools.completion()
    answer["choices"][0] |= choice

    async def behave(call):
        if not call.body.get("stream"):
            await call.answer(body=answer)
            return
        await call.begin_events()
        await call.chunk(b"data: " + json.dumps(answer).encode() + b"\n\ndata: [DONE]\n\n")
        await call.send(b"0\r\n\r\n")

    upstream.behave = behave
    proxy = await start_proxy()
    assert_error(await proxy.chat(), 502, "upstream_failed")
    (event,) = (await proxy.chat(stream=True)).text.strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "upstream_failed"


async def test_what_is_not_http_is_a_502(start_proxy, upstream):
    async def behave(call):
        await call.send(b"220 smtp.example ESMTP\r\n\r\n")

    upstream.behave = behave
    proxy = await start_proxy()
    assert_error(await proxy.complete(), 502, "upstream_failed")


async def test_an_answer_that_never_ends_is_bounded(start_proxy, upstream):
    async def behave(call):
        await call.head(**{"transfer-encoding": "chunked"})
        while True:
            await call.chunk(b" " * 1_000)

    upstream.behave = behave
    proxy = await start_proxy(max_response_bytes=5_000)
    assert "5000" in assert_error(await proxy.complete(), 502, "upstream_failed")
    await until(lambda: upstream.connections == 0)


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"error": {"message": "no such model", "code": "model_x"}}, "no such model", "model_x"),
        ({"error": {"message": "no", "code": 400}}, "no", None),
        ({"object": "error", "message": "old shape", "type": "T"}, "old shape", None),
        ({"detail": "Not Found"}, "Not Found", None),
        (b"plain words", "plain words", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("status", [400, 401, 429])
async def test_a_4xx_is_passed_on(start_proxy, upstream, status, body, message, code):
    async def behave(call):
        await call.answer(status, body, **{"retry-after": "7"})

    upstream.behave = behave
    proxy = await start_proxy()
    for response in (await proxy.complete(), await proxy.chat(stream=True)):
        error = response.json()["error"]
        assert response.status_code == status
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] == message
        assert code is None or error["code"] == code
        assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("status", "expected", "code"),
    [
        (500, 502, "upstream_failed"),
        (502, 502, "upstream_failed"),
        (302, 502, "upstream_failed"),
        (204, 502, "upstream_failed"),
        (503, 503, "upstream_unavailable"),
        (504, 504, "upstream_timeout"),
    ],
)
async def test_other_statuses_are_mapped(start_proxy, upstream, status, expected, code):
    async def behave(call):
        await call.answer(status, b"" if status == 204 else b"secret trace", **{"retry-after": "3"})

    upstream.behave = behave
    proxy = await start_proxy()
    for response in (await proxy.complete(), await proxy.complete(stream=True)):
        message = assert_error(response, expected, code)
        assert "secret" not in message
        assert response.headers["retry-after"] == "3"


def stream_of(*chunks, end=b"", error=None):
    async def behave(call):
        await call.begin_events()
        for chunk in chunks:
            await call.chunk(chunk)
        await call.send(end)
        if error is not None:
            raise error

    return behave


GOOD = b'data: {"id": "cmpl-1", "choices": [{"index": 0, "text": "x"}]}\n\n'
END = b"0\r\n\r\n"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("chunks", "end", "closes", "code"),
    [
        ([GOOD], b"", True, "upstream_failed"),  # closes mid-stream
        ([GOOD], END, False, "upstream_failed"),  # ends, but has not said so
        ([GOOD, GOOD[:20]], END, False, "upstream_failed"),  # ends inside an event
        ([GOOD, b"data: nonsense\n\n"], END, False, "upstream_failed"),
        ([GOOD], b"nonsense\r\n", False, "upstream_failed"),  # broken framing
        ([GOOD, b"data: " + b"x" * 9_000], b"", False, "upstream_failed"),
        ([GOOD], b"", False, "upstream_timeout"),  # falls silent
    ],
)
async def test_a_stream_that_breaks_ends_with_an_error(
    start_proxy, upstream, mock_tools, chat, chunks, end, closes, code
):
    async def silent(call):
        await stream_of(*chunks, end=end)(call)
        await asyncio.sleep(LIMIT_S)

    error = mock_tools.CloseNowError() if closes else None
    waits = not closes and not end
    upstream.behave = silent if waits else stream_of(*chunks, end=end, error=error)
    # Long enough for the beginning to pass, however slow this machine is just now.
    silence_s = 1.0 if waits else LIMIT_S
    proxy = await start_proxy(read_timeout_s=silence_s, max_response_bytes=5_000)
    response = await (proxy.chat if chat else proxy.complete)(stream=True)
    assert response.status_code == 200
    events = [e.removeprefix("data: ") for e in response.text.split("\n\n") if e]
    assert json.loads(events[0])["choices"]
    assert json.loads(events[-1])["error"]["code"] == code
    assert len(events) == 2
    assert "[DONE]" not in response.text
    assert await proxy.metric(f'rectokens_proxy_rejected_total{{reason="{code}"}}') == 1
    assert await proxy.metric("rectokens_proxy_in_flight") == 0


@pytest.mark.parametrize("path", [URL, CHAT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_cancels_the_upstream_call(
    start_proxy, upstream, path, stream, begun
):
    """Before the answer has begun, and in the middle of a stream that says nothing."""

    async def behave(call):
        if begun and stream:
            await call.begin_events()
            await call.chunk(GOOD)
        await asyncio.sleep(LIMIT_S)

    upstream.behave = behave
    proxy = await start_proxy()
    body = {"prompt": "a", "stream": stream, "messages": [{"role": "user", "content": "a"}]}
    content = json.dumps(body if path == CHAT else {"prompt": "a", "stream": stream}).encode()
    url = proxy.client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await until(lambda: upstream.calls)
    if begun and stream:
        await reader.readuntil(b"cmpl-1")
    writer.close()
    await asyncio.wait_for(upstream.calls[0].gone.wait(), LIMIT_S)
    await until(lambda: upstream.connections == 0)

    async def counted():
        gone = await proxy.metric('rectokens_proxy_rejected_total{reason="client_gone"}')
        return gone == 1 and await proxy.metric("rectokens_proxy_in_flight") == 0

    await until(counted)
    assert (await proxy.client.get("/health")).status_code == 200


async def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(start_proxy):
    proxy = await start_proxy()
    url = proxy.client.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    writer.close()
    await until(lambda: proxy.metric('rectokens_proxy_rejected_total{reason="client_gone"}'))


async def test_too_many_requests_are_a_429(start_proxy, upstream):
    go_on = asyncio.Event()

    async def behave(call):
        await go_on.wait()
        await upstream.ok(call)

    upstream.behave = behave
    proxy = await start_proxy(max_in_flight=2)
    waiting = [asyncio.create_task(proxy.complete()) for _ in range(2)]
    await until(lambda: len(upstream.calls) == 2)
    refused = await proxy.complete()
    assert "at most 2" in assert_error(refused, 429, "overloaded")
    assert refused.headers["retry-after"] == "1"
    go_on.set()
    assert [(await task).status_code for task in waiting] == [200, 200]
    assert (await proxy.complete()).status_code == 200


async def raw_post(url, content, leave):
    """Status of a POST over a connection of its own; 0 where the client left when told to.

    httpx's pool takes time quadratic in its connections, and it is not what is tested.
    """
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    try:
        if leave is not None:
            await leave.wait()
            return 0
        answer = await reader.read()
        return int(answer.split(b" ", 2)[1])
    finally:
        writer.close()


def how_many_at_once():
    """A thousand, or as many as four ends of each request may have open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5_000 if hard == resource.RLIM_INFINITY else min(hard, 5_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return min(1_000, (max(soft, wanted) - 500) // 4 // 5 * 5)


async def test_a_thousand_requests_leave_nothing_behind(start_proxy, upstream, mock_tools):
    """Good, streamed, failing and abandoned ones at once; then no task, connection or place."""
    count = how_many_at_once()
    busy = 0
    everybody = asyncio.Event()

    async def behave(call):
        nonlocal busy
        busy += 1
        if busy == count:
            everybody.set()
        try:
            kind = call.body["n"] % 5
            await everybody.wait()
            if kind == 0:
                await upstream.ok(call)
            elif kind == 1:
                await stream_of(GOOD, b"data: [DONE]\n\n", end=END)(call)
            elif kind == 2:
                raise mock_tools.CloseNowError
            elif kind == 3:
                await call.answer(400, {"error": {"message": "no"}})
            else:
                await asyncio.sleep(LIMIT_S)
        finally:
            busy -= 1

    upstream.behave = behave
    # A thousand connections are made while all of them share one event loop.
    proxy = await start_proxy(connect_timeout_s=LIMIT_S, read_timeout_s=LIMIT_S)
    before = len(asyncio.all_tasks())
    bodies = [{"prompt": [3, 4, 5], "n": n, "stream": n % 5 == 1} for n in range(count)]
    work = [
        raw_post(
            proxy.client.base_url,
            json.dumps(body).encode(),
            everybody if body["n"] % 5 == 4 else None,
        )
        for body in bodies
    ]
    statuses = await asyncio.gather(*work)
    fifth = count // 5
    assert [statuses.count(s) for s in (200, 502, 400, 0)] == [2 * fifth, fifth, fifth, fifth]
    await until(lambda: busy == 0)
    assert await proxy.metric("rectokens_proxy_in_flight") == 0
    await proxy.proxy.upstream.close()
    await until(lambda: upstream.connections == 0)
    await proxy.client.aclose()
    await until(lambda: len(asyncio.all_tasks()) <= before)
