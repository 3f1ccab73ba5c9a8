"""The service with API keys: who is let in, how often, and what happens when the file changes."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import structlog
from structlog.contextvars import merge_contextvars

from server.access.guard import ApiKeys
from server.access.keys import ApiKey, digest_of, new_key
from server.errors import ErrorKind, ServiceError
from server.settings import SettingsError, load_settings
from server.settings_operating import AccessSettings

ADMIN = "the-key-of-the-admin"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys_file(tmp_path):
    return tmp_path / "keys"


def write(path, *entries: ApiKey) -> None:
    path.write_text("".join(entry.line() + "\n" for entry in entries))


def entry(name: str, key: str, **rest) -> ApiKey:
    return ApiKey(name, digest_of(key), **rest)


async def recommend(running, headers=None) -> httpx.Response:
    return await running.post({"history": ["B001"], "top_k": 2}, headers=headers)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


ROUTES = [
    ("POST", "/v1/recommend"),
    ("POST", "/v1/recommend/batch"),
    ("POST", "/v1/score"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/nothing"),
    ("GET", "/nothing"),
    ("GET", "//health"),
    ("GET", "/health/"),
    ("GET", "/health/../v1/models"),
    ("GET", "/adminx"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_but_the_open_ones_needs_a_key(start_app, dummy, keys_file, method, path):
    key = new_key()
    write(keys_file, entry("shop", key))
    running = await start_app(
        dummy.make_release(), access__keys_file=str(keys_file), admin__keys=ADMIN
    )
    for headers in (
        {},
        bearer(new_key()),
        bearer(""),
        bearer(ADMIN),
        bearer(keys_file.read_text().split(":")[1].strip()),
        {"Authorization": f"Basic {key}"},
        {"Authorization": key},
        {"X-Api-Key": key},
    ):
        response = await running.client.request(method, path, headers=headers)
        assert code(response) == (401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["X-Request-ID"]
        assert key not in response.text
    passed = await running.client.request(method, path, headers=bearer(key), json={})
    assert passed.status_code != 401
    assert await running.metric('rectokens_rejected_total{reason="unauthorized"}') == 8


async def test_every_route_that_is_not_open_documents_the_refusals(start_app, dummy, keys_file):
    write(keys_file, entry("shop", new_key()))
    running = await start_app(dummy.make_release(), access__keys_file=str(keys_file))
    spec = (await running.client.get("/openapi.json")).json()
    for path, methods in spec["paths"].items():
        if path.startswith("/v1/"):
            for operation in methods.values():
                assert {"401", "429"} <= set(operation["responses"])
                assert operation["security"] == [{"ApiKey": []}]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/openapi.json"])
async def test_orchestrators_need_no_key(start_app, dummy, keys_file, path):
    write(keys_file, entry("shop", new_key()))
    running = await start_app(dummy.make_release(), access__keys_file=str(keys_file))
    assert (await running.client.get(path)).status_code == 200


async def test_the_keys_of_callers_and_of_operators_are_not_each_other_s(
    start_app, dummy, keys_file
):
    key = new_key()
    write(keys_file, entry("shop", key))
    running = await start_app(
        dummy.make_release(), access__keys_file=str(keys_file), admin__keys=ADMIN
    )
    drain = "/admin/drain"
    assert code(await running.client.post(drain, headers=bearer(key))) == (401, "unauthorized")
    assert (await running.client.post(drain, headers=bearer(ADMIN))).status_code == 200


async def test_without_a_file_everybody_is_let_in(start_app, dummy):
    running = await start_app(dummy.make_release())
    assert (await recommend(running)).status_code == 200
    spec = (await running.client.get("/openapi.json")).json()
    assert "security" not in spec["paths"]["/v1/recommend"]["post"]


def test_settings_that_would_mean_nothing_stop_the_start(keys_file):
    with pytest.raises(SettingsError, match="REQUESTS_PER_MINUTE is 5, but there are no callers"):
        load_settings({"access.requests_per_minute": "5"})
    same = {"access.keys_file": str(keys_file), "admin.keys_file": str(keys_file)}
    with pytest.raises(SettingsError, match="callers would be operators"):
        load_settings(same)
    link = keys_file.with_name("link")
    link.symlink_to(keys_file)
    for spelling in (link, keys_file.parent / ".." / keys_file.parent.name / keys_file.name):
        with pytest.raises(SettingsError, match="callers would be operators"):
            load_settings({**same, "admin.keys_file": str(spelling)})


async def test_a_key_is_looked_at_before_the_body_is_read(start_app, dummy, keys_file):
    write(keys_file, entry("shop", new_key()))
    running = await start_app(dummy.make_release(), access__keys_file=str(keys_file))

    async def endless():
        raise AssertionError("the body was read")
        yield b""

    response = await running.client.post("/v1/recommend", content=endless())
    assert code(response) == (401, "unauthorized")


async def test_a_caller_over_its_limit_waits_and_others_do_not(start_app, dummy, keys_file):
    slow, slow_too, fast = new_key(), new_key(), new_key()
    write(
        keys_file,
        entry("slow", slow, requests_per_minute=1),
        entry("slow", slow_too, requests_per_minute=1),
        entry("fast", fast),
    )
    running = await start_app(
        dummy.make_release(), access__keys_file=str(keys_file), access__burst_s="120"
    )
    assert (await recommend(running, bearer(slow))).status_code == 200
    assert (await recommend(running, bearer(slow_too))).status_code == 200
    refused = await recommend(running, bearer(slow))
    assert code(refused) == (429, "rate_limited")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert await running.metric('rectokens_rejected_total{reason="rate_limited"}') == 1
    for _ in range(5):
        assert (await recommend(running, bearer(fast))).status_code == 200
    assert await running.metric('rectokens_caller_requests_total{caller="slow"}') == 2
    assert await running.metric('rectokens_caller_refused_total{caller="slow"}') == 1
    assert await running.metric('rectokens_caller_limit_per_minute{caller="slow"}') == 1
    assert await running.metric('rectokens_caller_requests_total{caller="fast"}') == 5
    assert 'per_minute{caller="fast"}' not in (await running.client.get("/metrics")).text


async def test_a_call_that_carries_many_requests_counts_as_many(start_app, dummy, keys_file):
    key = new_key()
    write(keys_file, entry("shop", key))
    running = await start_app(
        dummy.make_release(),
        access__keys_file=str(keys_file),
        access__requests_per_minute="1",
        access__burst_s="600",
    )
    batch = {"requests": [{"history": ["B001"]}] * 40}
    answer = await running.client.post("/v1/recommend/batch", json=batch, headers=bearer(key))
    assert (answer.status_code, len(answer.text.splitlines())) == (200, 40)
    refused = await recommend(running, bearer(key))
    assert code(refused) == (429, "rate_limited")
    assert 1_200 <= int(refused.headers["Retry-After"]) <= 1_860  # one a minute, 10 at once


async def test_every_log_line_of_a_request_has_its_caller(start_app, dummy, keys_file):
    key, engine = new_key(), dummy.DummyEngine()
    write(keys_file, entry("shop", key))
    running = await start_app(dummy.make_release(engine), access__keys_file=str(keys_file))

    def fail(requests):
        raise ValueError("a batch that cannot be run")

    engine.on_search = fail
    with structlog.testing.capture_logs(processors=[merge_contextvars]) as lines:
        failed = await recommend(running, bearer(key))
        unknown = await running.client.get("/v1/nothing", headers=bearer(key))
    assert (failed.status_code, unknown.status_code) == (500, 404)
    own = {answer.headers["X-Request-ID"] for answer in (failed, unknown)}
    told = [line for line in lines if line.get("request_id") in own]
    assert {line["event"] for line in told} >= {"request"}
    assert {line.get("caller") for line in told} == {"shop"}


async def test_a_call_that_finds_no_room_counts_as_one(start_app, dummy, keys_file):
    key, engine = new_key(), dummy.DummyEngine()
    write(keys_file, entry("shop", key))
    running = await start_app(
        dummy.make_release(engine),
        access__keys_file=str(keys_file),
        access__requests_per_minute="60",
        batching__max_bulk_streams=1,
    )

    async def batch(count: int):
        body = {"requests": [{"history": ["B001"]}] * count}
        return await running.client.post("/v1/recommend/batch", json=body, headers=bearer(key))

    engine.gate.clear()
    first = asyncio.create_task(batch(1))
    await asyncio.to_thread(engine.wait_for_batches, 1)
    assert code(await batch(500)) == (429, "overloaded")
    engine.gate.set()
    assert (await first).status_code == 200
    assert await running.metric('rectokens_caller_requests_total{caller="shop"}') == 2
    assert (await recommend(running, bearer(key))).status_code == 200


async def test_prompts_of_a_completion_count_each(start_app, dummy, keys_file):
    key = new_key()
    write(keys_file, entry("shop", key))
    running = await start_app(
        dummy.make_release(takes_text=True),
        access__keys_file=str(keys_file),
        access__requests_per_minute="1",
        access__burst_s="600",
    )
    body = {"model": "dummy", "prompt": ["a"] * 15}
    answer = await running.client.post("/v1/completions", json=body, headers=bearer(key))
    assert answer.status_code == 200
    assert code(await recommend(running, bearer(key))) == (429, "rate_limited")


async def test_keys_are_replaced_while_the_service_runs(start_app, dummy, keys_file):
    old, new = new_key(), new_key()
    write(keys_file, entry("shop", old))
    running = await start_app(
        dummy.make_release(), access__keys_file=str(keys_file), access__reload_s="0"
    )
    assert (await recommend(running, bearer(new))).status_code == 401
    write(keys_file, entry("shop", old), entry("shop", new))
    assert (await recommend(running, bearer(old))).status_code == 200
    assert (await recommend(running, bearer(new))).status_code == 200
    write(keys_file, entry("shop", new))
    assert (await recommend(running, bearer(old))).status_code == 401
    assert (await recommend(running, bearer(new))).status_code == 200
    # What cannot be used changes nothing.
    keys_file.write_text("half a li")
    assert (await recommend(running, bearer(new))).status_code == 200
    assert (await recommend(running, bearer(old))).status_code == 401
    keys_file.unlink()
    assert (await recommend(running, bearer(new))).status_code == 200
    # The last key taken out lets nobody in.
    keys_file.write_text("")
    assert (await recommend(running, bearer(new))).status_code == 401


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def test_a_key_ends_at_its_time(keys_file):
    key, now = new_key(), Clock(1_000.0)
    write(keys_file, entry("shop", key, expires_s=2_000.0))
    keys = ApiKeys(AccessSettings(keys_file=keys_file), now=now)
    assert keys.caller(f"Bearer {key}").name == "shop"
    now.now_s = 2_000.0
    with pytest.raises(ServiceError, match="of shop has expired") as error:
        keys.caller(f"Bearer {key}")
    assert error.value.kind is ErrorKind.UNAUTHORIZED


def test_the_file_is_not_looked_at_for_every_request(keys_file):
    old, new, clock = new_key(), new_key(), Clock(0.0)
    write(keys_file, entry("shop", old))
    keys = ApiKeys(AccessSettings(keys_file=keys_file, reload_s=5), clock=clock)
    write(keys_file, entry("shop", new))
    assert keys.caller(f"bearer {old}").name == "shop"
    clock.now_s = 5.0
    with pytest.raises(ServiceError, match="missing or wrong"):
        keys.caller(f"bearer {old}")


def test_a_caller_keeps_its_count_through_a_change_of_the_file(keys_file):
    old, new, clock = new_key(), new_key(), Clock(0.0)
    write(keys_file, entry("shop", old, requests_per_minute=6))
    keys = ApiKeys(AccessSettings(keys_file=keys_file, reload_s=0), clock=clock)
    keys.caller(f"Bearer {old}").admit()
    write(keys_file, entry("shop", new, requests_per_minute=6))
    with pytest.raises(ServiceError, match="the next one passes in"):
        keys.caller(f"Bearer {new}").admit()
    clock.now_s = 10.0
    keys.caller(f"Bearer {new}").admit()


def test_only_callers_of_the_file_are_remembered(keys_file):
    keys_of = {name: new_key() for name in ("a", "b", "c")}
    write(keys_file, *(entry(name, key) for name, key in keys_of.items()))
    keys = ApiKeys(AccessSettings(keys_file=keys_file, reload_s=0))
    for key in keys_of.values():
        keys.caller(f"Bearer {key}").admit()
    write(keys_file, entry("b", keys_of["b"]), entry("d", new_key()))
    keys.caller(f"Bearer {keys_of['b']}").admit()
    requests = next(metric for metric in keys.collect() if metric.name.endswith("requests"))
    counted = {sample.labels["caller"]: sample.value for sample in requests.samples}
    assert counted == {"b": 2, "d": 0}


def test_a_file_that_cannot_be_used_stops_the_start(keys_file, tmp_path):
    with pytest.raises(SettingsError, match=r"RECTOKENS_ACCESS__KEYS_FILE .*No such file"):
        ApiKeys(AccessSettings(keys_file=keys_file))
    keys_file.write_text("shop sha256:ab")
    with pytest.raises(SettingsError, match=r"RECTOKENS_ACCESS__KEYS_FILE .*line 1"):
        ApiKeys(AccessSettings(keys_file=keys_file))
    with pytest.raises(SettingsError, match="Is a directory"):
        ApiKeys(AccessSettings(keys_file=tmp_path))


async def test_a_browser_may_send_its_key(start_app, dummy, keys_file):
    write(keys_file, entry("shop", new_key()))
    running = await start_app(
        dummy.make_release(),
        access__keys_file=str(keys_file),
        http__cors_origins="https://a.example",
    )
    headers = {"Origin": "https://a.example"}
    preflight = await running.client.options(
        "/v1/recommend",
        headers={
            **headers,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        },
    )
    assert preflight.status_code == 200
    refused = await recommend(running, headers)
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://a.example"
