"""The proxy with API keys: the same file, the same limits as the service."""

from __future__ import annotations

import logging

import pytest

from server.access.keys import ApiKey, digest_of, new_key


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def key(tmp_path):
    key = new_key()
    (tmp_path / "keys").write_text(ApiKey("shop", digest_of(key), 1).line())
    return key


async def test_what_costs_something_needs_a_key(start_proxy, upstream, tmp_path, key):
    proxy = await start_proxy(access__keys_file=str(tmp_path / "keys"))
    for path in ("/v1/completions", "/v1/chat/completions"):
        refused = await proxy.client.post(path, json={"prompt": "the user"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
    assert (await proxy.client.get("/v1/models")).status_code == 401
    assert upstream.calls == []
    assert (await proxy.client.get("/health")).status_code == 200
    answer = await proxy.client.post(
        "/v1/completions", json={"prompt": "the user"}, headers=bearer(key)
    )
    assert answer.status_code == 200
    # It is a key of this proxy, none of the upstream's.
    assert "authorization" not in {name.lower() for name in upstream.calls[0].headers}
    paths = (await proxy.client.get("/openapi.json")).json()["paths"]
    assert paths["/v1/completions"]["post"]["security"] == [{"ApiKey": []}]
    assert "security" not in paths["/health"]["get"]


async def test_every_prompt_counts(start_proxy, tmp_path, key):
    proxy = await start_proxy(access__keys_file=str(tmp_path / "keys"), access__burst_s="360")
    body = {"prompt": ["the user", "the", "user", "likes"]}
    for status in (200, 200, 429):  # six at once, four a call, and a debt may be made
        answer = await proxy.client.post("/v1/completions", json=body, headers=bearer(key))
        assert answer.status_code == status
    assert answer.json()["error"]["code"] == "rate_limited"
    assert 60 <= int(answer.headers["Retry-After"]) <= 180
    assert await proxy.metric('rectokens_proxy_caller_requests_total{caller="shop"}') == 8
    assert await proxy.metric('rectokens_proxy_caller_refused_total{caller="shop"}') == 1


async def test_the_upstream_gets_the_proxy_s_own_key(start_proxy, upstream, tmp_path, key, caplog):
    proxy = await start_proxy(
        access__keys_file=str(tmp_path / "keys"), access__burst_s="360", upstream_key="UPSTREAMKEY"
    )
    with caplog.at_level(logging.DEBUG):
        await proxy.client.post("/v1/completions", json={"prompt": "the"}, headers=bearer(key))
        await proxy.client.get("/v1/models", headers=bearer(key))
        assert (await proxy.client.get("/ready")).status_code == 200
    sent = [call.headers["authorization"] for call in upstream.calls]
    assert sent == ["Bearer UPSTREAMKEY"] * 3
    own = [record.getMessage() for record in caplog.records if record.name.startswith("server")]
    assert "UPSTREAMKEY" not in "".join(own)

    async def refuse(call):
        await call.answer(401, {"error": {"message": "no"}})

    upstream.behave = refuse
    # With a key that is refused no request can be answered.
    assert (await proxy.client.get("/ready")).status_code == 503
    # Nor is it the client's key that is wrong.
    for stream in (False, True):
        body = {"prompt": "the", "stream": stream}
        answer = await proxy.client.post("/v1/completions", json=body, headers=bearer(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
        assert "the proxy's key" in answer.json()["error"]["message"]
        assert "WWW-Authenticate" not in answer.headers
