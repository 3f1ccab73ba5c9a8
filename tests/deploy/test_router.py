"""The router without Ray: variants made to order."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from typer.testing import CliRunner

from deploy.ray.asgi import HttpRequest, HttpResponse, ResponseStart
from deploy.ray.config import Division, ServeConfig
from deploy.ray.handles import ReplicaLostError
from deploy.ray.replica import VariantServer
from deploy.ray.router import create_router_app
from deploy.ray.routing import choose_variant
from server.app import create_app
from server.cli import app as server_cli
from server.settings import load_settings

WEIGHTS = {"a": 3.0, "b": 1.0, "dark": 0.0}
BODY = {"history": ["B001"], "top_k": 2}


class FakeVariant:
    """Answers with what it was asked; each call takes the next of its replicas' fates.

    A fate is "ok", "lost" (before an answer), "cut" (in the middle of one) or a status.
    """

    def __init__(self, name: str, fates: tuple[str | int, ...] = ("ok",)) -> None:
        self.name = name
        self.asked: list[HttpRequest] = []
        self._fates = itertools.chain(fates, itertools.repeat(fates[-1]))
        self.closed = 0

    async def call(self, request: HttpRequest) -> HttpResponse:
        self.asked.append(request)
        fate = next(self._fates)
        if fate in ("lost", "cut"):
            raise ReplicaLostError("it died")
        status = fate if isinstance(fate, int) else 200
        headers = ((b"content-type", b"application/json"), (b"x-variant", self.name.encode()))
        return HttpResponse(status, (*headers, (b"connection", b"close")), b'{"n": 1}')

    async def stream(self, request: HttpRequest) -> AsyncGenerator[ResponseStart | bytes]:
        self.asked.append(request)
        fate = next(self._fates)
        if fate == "lost":
            raise ReplicaLostError("it died")
        try:
            status = fate if isinstance(fate, int) else 200
            yield ResponseStart(status, ((b"x-variant", self.name.encode()),))
            yield b"one\n"
            if fate == "cut":
                raise ReplicaLostError("it died")
            yield b"two\n"
        finally:
            self.closed += 1

    async def call_all(self, request: HttpRequest) -> list[HttpResponse]:
        if request.path == "/metrics":
            return [HttpResponse(200, (), b"")]
        return [await self.call(request)]


@asynccontextmanager
async def router(*variants: Any, **config: Any) -> AsyncIterator[httpx.AsyncClient]:
    given = {one.name: WEIGHTS.get(one.name, 1.0) for one in variants}
    parsed = ServeConfig.model_validate(
        {
            "variants": [
                {"name": name, "weight": weight, "settings": {"store.path": "s"}}
                for name, weight in given.items()
            ],
            "router": config,
        }
    )
    settings = {one.name: one.load_settings() for one in parsed.variants}
    app = create_router_app(parsed, settings, {one.name: one for one in variants})
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        client.router = app.state.router  # type: ignore[attr-defined]
        yield client


async def metric(client: httpx.AsyncClient, name: str, **labels: str) -> float:
    """Sum of the samples that have these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in (await client.get("/metrics")).text.splitlines()
        if line.startswith(name + "{") and all(one in line for one in wanted)
    )


async def test_users_go_where_the_hash_says() -> None:
    async with router(*map(FakeVariant, WEIGHTS), experiment="e") as client:
        for number in range(50):
            user = f"user-{number}"
            answer = await client.post("/v1/recommend", json=BODY, headers={"x-user-id": user})
            assert answer.headers["x-variant"] == choose_variant(user, WEIGHTS, "e")


async def test_users_are_divided_another_way_while_it_runs() -> None:
    async with router(*map(FakeVariant, WEIGHTS)) as client:
        client.router.divide(Division(weights={"a": 0, "b": 0, "dark": 1}))
        answer = await client.post("/v1/recommend", json=BODY, headers={"x-user-id": "u"})
        assert answer.headers["x-variant"] == "dark"
        with pytest.raises(ValueError, match="the variants are a, b, dark"):
            client.router.divide(Division(weights={"a": 1}))
        answer = await client.post("/v1/recommend", json=BODY, headers={"x-user-id": "u"})
        assert answer.headers["x-variant"] == "dark"


async def test_a_name_goes_before_the_user_and_nobody_goes_to_the_first() -> None:
    async with router(*map(FakeVariant, WEIGHTS)) as client:
        named = {"X-Variant": "dark", "X-User-ID": "u"}
        answer = await client.post("/v1/recommend", json=BODY, headers=named)
        assert answer.headers["x-variant"] == "dark"
        answer = await client.post("/v1/recommend", json=BODY)
        assert answer.headers["x-variant"] == "a"
        bad = await client.post("/v1/recommend", json=BODY, headers={"X-Variant": "c"})
        assert bad.status_code == 422
        assert bad.json()["error"] == {
            "message": "there is no variant 'c'; there are a, b, dark",
            "type": "invalid_request_error",
            "param": "X-Variant",
            "code": "invalid_value",
        }


async def test_names_can_be_switched_off() -> None:
    async with router(*map(FakeVariant, WEIGHTS), named_variants=False) as client:
        answer = await client.post("/v1/recommend", json=BODY, headers={"X-Variant": "dark"})
        assert answer.headers["x-variant"] == "a"


async def test_the_request_arrives_as_it_was_sent() -> None:
    variant = FakeVariant("a")
    async with router(variant) as client:
        answer = await client.post(
            "/v1/recommend?x=1",
            content=b'{"odd":  1}',
            headers={
                "Authorization": "Bearer k",
                "X-Request-ID": "mine-1",
                "Connection": "close",
                "Content-Type": "application/json",
            },
        )
    (request,) = variant.asked
    assert (request.method, request.path, request.query) == ("POST", "/v1/recommend", b"x=1")
    assert request.body == b'{"odd":  1}'
    headers = dict(request.headers)
    assert headers[b"authorization"] == b"Bearer k"
    assert headers[b"x-request-id"] == b"mine-1"
    assert b"connection" not in headers
    assert answer.headers["x-request-id"] == "mine-1"
    assert "connection" not in answer.headers
    assert answer.content == b'{"n": 1}'


async def test_a_request_without_an_id_has_one_on_both_sides() -> None:
    variant = FakeVariant("a")
    async with router(variant) as client:
        answer = await client.post("/v1/recommend", json=BODY)
    assert (
        dict(variant.asked[0].headers)[b"x-request-id"] == answer.headers["x-request-id"].encode()
    )


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/recommend/batch"])
@pytest.mark.parametrize("fate", ["lost", 503])
async def test_another_replica_is_asked_where_one_is_lost(path: str, fate: str | int) -> None:
    variant = FakeVariant("a", (fate, fate, "ok"))
    async with router(variant) as client:
        answer = await client.post(path, json=BODY)
        assert answer.status_code == 200
        assert len(variant.asked) == 3
        assert len(set(variant.asked)) == 1
        retried = await metric(client, "rectokens_router_lost_replicas_total", outcome="retried")
        assert retried == (2 if fate == "lost" else 0)


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/recommend/batch"])
async def test_who_cannot_be_answered_may_try_again(path: str) -> None:
    variant = FakeVariant("a", ("lost",))
    async with router(variant, attempts=2) as client:
        answer = await client.post(path, json=BODY)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "upstream_unavailable"
        assert len(variant.asked) == 2
        assert await metric(client, "rectokens_router_lost_replicas_total", outcome="failed") == 1


@pytest.mark.parametrize("status", [400, 422, 429, 500, 504])
async def test_answers_that_say_no_are_answers(status: int) -> None:
    variant = FakeVariant("a", (status,))
    async with router(variant) as client:
        assert (await client.post("/v1/recommend", json=BODY)).status_code == status
    assert len(variant.asked) == 1


async def test_half_an_answer_does_not_look_whole() -> None:
    """The response is left open, and a server that is left with one closes the connection."""
    variant = FakeVariant("a", ("cut",))
    config = ServeConfig.model_validate({"variants": [{"name": "a"}]})
    app = create_router_app(config, {"a": load_settings({})}, {"a": variant})
    sent: list[Any] = []

    async def receive() -> Any:
        if not sent:
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("nobody leaves")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/recommend/batch", "headers": []}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
    await app({**scope, "client": None, "server": ("test", 80)}, receive, send)
    assert [message.get("body") for message in sent[1:]] == [b"one\n"]
    assert sent[-1]["more_body"] is True
    assert len(variant.asked) == 1
    assert variant.closed == 1


@pytest.mark.parametrize(
    ("body", "streamed"), [({"stream": True}, True), ({"prompt": "x"}, False)], ids=str
)
async def test_completions_are_streamed_where_asked_for(body: Any, streamed: bool) -> None:
    variant = FakeVariant("a")
    async with router(variant) as client:
        answer = await client.post("/v1/completions", json=body)
    assert (answer.content == b"one\ntwo\n") == streamed
    assert (variant.closed == 1) == streamed


@pytest.mark.parametrize("path", ["/admin/jobs", "/v2/recommend", "/proxy/v1/completions", "/"])
async def test_nothing_else_is_passed_on(path: str) -> None:
    variant = FakeVariant("a")
    async with router(variant) as client:
        answer = await client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    assert variant.asked == []


async def test_a_body_over_the_widest_limit_is_refused_here() -> None:
    variant = FakeVariant("a")
    async with router(variant) as client:
        most = load_settings({}).limits.max_body_bytes
        answer = await client.post("/v1/recommend", content=b"x" * (most + 1))
        assert answer.status_code == 413
    assert variant.asked == []


async def test_ready_when_every_variant_with_users_is() -> None:
    waiting, ready = FakeVariant("a", (503,)), FakeVariant("b")
    async with router(waiting, ready) as client:
        answer = await client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "no replica is ready of variant a"
    async with router(FakeVariant("a"), FakeVariant("dark")) as client:
        answer = await client.get("/ready")
        assert answer.status_code == 200
        assert answer.json()["variants"].keys() == {"a", "dark"}
        assert (await client.get("/health")).status_code == 200


class Replicas:
    """Several real replicas of a variant, asked in turn."""

    def __init__(self, name: str, servers: list[VariantServer]) -> None:
        self.name = name
        self._servers = servers
        self._turn = itertools.cycle(servers)

    async def call(self, request: HttpRequest) -> HttpResponse:
        return await next(self._turn).call(request)

    def stream(self, request: HttpRequest) -> AsyncGenerator[ResponseStart | bytes]:
        return next(self._turn).stream(request)

    async def call_all(self, request: HttpRequest) -> list[HttpResponse]:
        return [await one.call(request) for one in self._servers]


@pytest.fixture
async def replicas(dummy: Any) -> AsyncIterator[Callable[[str, int], Any]]:
    started: list[VariantServer] = []

    async def start(variant: str, count: int, **flags: Any) -> Replicas:
        settings = load_settings({key.replace("__", "."): value for key, value in flags.items()})
        servers = [
            VariantServer(variant, f"{variant}{n}", create_app(settings, dummy.make_release))
            for n in range(count)
        ]
        for one in servers:
            await one.start()
        started.extend(servers)
        return Replicas(variant, servers)

    yield start
    for one in started:
        await one.stop()


async def test_through_to_real_replicas(replicas: Any) -> None:
    async with router(await replicas("a", 2), await replicas("b", 1)) as client:
        found = [await client.post("/v1/recommend", json=BODY) for _ in range(4)]
        assert {one.headers["x-replica"] for one in found} == {"a0", "a1"}
        assert [item["item_id"] for item in found[0].json()["items"]] == ["B000", "B002"]
        bad = await client.post("/v1/recommend", json={"historie": []})
        assert bad.status_code == 422
        assert "did you mean history?" in bad.json()["error"]["message"]
        many = await client.post("/v1/recommend/batch", json={"requests": [BODY] * 3})
        assert sorted(orjson.loads(line)["index"] for line in many.content.splitlines()) == [
            0,
            1,
            2,
        ]
        assert (await client.get("/openapi.json")).json()["info"]["title"] == "rectokens"
        ready = (await client.get("/ready")).json()["variants"]
        assert [one["replica"] for one in ready["a"]] == ["a0", "a1"]
        assert {one["catalog_version"] for one in ready["a"]} == {
            found[0].json()["catalog_version"]
        }


async def test_metrics_of_all_on_one_page(replicas: Any) -> None:
    async with router(await replicas("a", 2), await replicas("b", 1)) as client:
        for _ in range(3):
            await client.post("/v1/recommend", json=BODY)
        page = (await client.get("/metrics")).text
        told = [line for line in page.splitlines() if line.startswith("# TYPE ")]
        assert len(told) == len(set(told))
        answered = {
            replica: await metric(
                client, "rectokens_requests_total", variant="a", replica=replica, status="200"
            )
            for replica in ("a0", "a1")
        }
        # Beside /metrics itself, which is counted only once it has answered.
        assert sum(answered.values()) >= 3
        routed = await metric(client, "rectokens_router_routed_total", variant="a", by="default")
        assert routed == 3
        passed_on = {"route": "/v1/{rest:path}", "status": "200"}
        assert await metric(client, "rectokens_router_requests_total", **passed_on) == 3
        assert 'rectokens_queue_beam_rows{replica="b0",variant="b"} 0.0' in page


async def test_keys_are_asked_for_by_the_replicas(replicas: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made = CliRunner().invoke(server_cli, ["new-key", "somebody", "--file", str(file)])
    assert made.exit_code == 0, made.output
    async with router(await replicas("a", 1, access__keys_file=str(file))) as client:
        refused = await client.post("/v1/recommend", json=BODY)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        key = {"Authorization": f"Bearer {made.stdout.strip()}"}
        assert (await client.post("/v1/recommend", json=BODY, headers=key)).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        assert "rectokens_queue_beam_rows" in (await client.get("/metrics")).text
