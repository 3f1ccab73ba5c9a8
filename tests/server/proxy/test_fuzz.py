"""The proxy asked at random, by its own OpenAPI document."""

from __future__ import annotations

import asyncio

from server.access.keys import ApiKey, digest_of, new_key


async def test_every_answer_is_documented_and_none_is_a_5xx(
    start_proxy, upstream, tmp_path, mock_tools, fuzzing
):
    async def behave(call):
        if call.method == "GET":
            await call.answer(body={"object": "list", "data": []})
        elif call.body.get("stream") is True:
            await call.begin_events()
            await call.chunk(b'data: {"choices": []}\n\n')
            await call.chunk(b"data: [DONE]\n\n")
            await call.send(b"0\r\n\r\n")
        else:
            await call.answer(body=mock_tools.completion())

    upstream.behave = behave
    key = new_key()
    (tmp_path / "keys").write_text(ApiKey("shop", digest_of(key)).line())
    proxy = await start_proxy(access__keys_file=str(tmp_path / "keys"))

    def known(case):
        if isinstance(case.body, dict):
            case.body["prompt"] = "the user likes"
            case.body["messages"] = [{"role": "user", "content": "lipstick"}]

    statuses = await asyncio.to_thread(
        fuzzing.fuzz, str(proxy.client.base_url).rstrip("/"), key=key, known=known
    )
    for label in ("POST /v1/completions", "POST /v1/chat/completions"):
        assert {200, 422} <= statuses[label].keys(), statuses
    assert statuses["GET /v1/models"][200] > 0
    assert upstream.calls
