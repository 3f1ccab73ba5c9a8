"""A sound body goes to its endpoint directly, and is answered as on the framework's own way."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from server.api.handlers import install_error_handlers
from server.api.schemas import RecommendRequest
from server.api.strict_json import DirectJsonRoute, StrictJsonRoute
from server.metrics import Metrics
from tests.server.asgi import http_scope


class FrameworksWay(DirectJsonRoute):
    def direct_call(self) -> None:
        return None


async def echo(body: RecommendRequest, request: Request) -> Response:
    return Response(body.model_dump_json() + str(sorted(body.model_fields_set)))


def make_app(route_class: type[StrictJsonRoute]) -> FastAPI:
    router = APIRouter(route_class=route_class)
    router.post("/echo")(echo)
    app = FastAPI()
    with_key = [Depends(HTTPBearer(auto_error=False))]
    app.include_router(router, dependencies=with_key)
    install_error_handlers(app, Metrics())
    return app


@pytest.fixture(scope="module")
def apps() -> tuple[FastAPI, FastAPI]:
    return make_app(DirectJsonRoute), make_app(FrameworksWay)


async def asked(app: FastAPI, body: bytes, content_type: str | None) -> list[Any]:
    headers = [] if content_type is None else [(b"content-type", content_type.encode("latin-1"))]
    sent: list[Any] = []
    chunks = [body[: len(body) // 2], body[len(body) // 2 :]]
    messages = iter(
        {"type": "http.request", "body": chunk, "more_body": place == 0}
        for place, chunk in enumerate(chunks)
    )

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    await app(http_scope("/echo", headers), receive, send)
    return sent


IDS = st.lists(st.text(max_size=3) | st.just("B001"), max_size=3)
ODD = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | IDS
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "history": IDS | ODD,
        "input": st.lists(st.fixed_dictionaries({"item": st.text(max_size=2)})) | ODD,
        "top_k": st.integers(-1, 20) | ODD,
        "temperature": st.floats(0, 2) | ODD,
        "exclude_items": IDS | ODD,
        "include": st.lists(st.sampled_from(["metadata", "nothing"]), max_size=2) | ODD,
        "constraint_set": IDS | ODD,
        "seed": st.integers(0, 2**65) | ODD,
        "unknown": ODD,
    },
)
BODIES = (
    FIELDS.map(lambda one: json.dumps(one).encode())
    | ODD.map(lambda one: json.dumps(one).encode())
    | FIELDS.map(lambda one: json.dumps(one).encode()[:-1])
    | st.binary(max_size=6)
    | st.just(b'{"history": [], "history": []}')
    | st.just('{"history": []}'.encode("utf-16"))
)
TYPES = st.just("application/json") | st.sampled_from(
    ["application/json; charset=utf-8", "Application/JSON", "application/x+json", "text/plain", ""]
)


@given(BODIES, TYPES | st.none())
def test_both_ways_answer_the_same(
    apps: tuple[FastAPI, FastAPI], body: bytes, content_type: str | None
) -> None:
    direct, slow = (asyncio.run(asked(app, body, content_type)) for app in apps)
    assert direct == slow


def test_a_sound_body_takes_the_short_way(apps: tuple[FastAPI, FastAPI]) -> None:
    body = b'{"history": ["B001"], "top_k": 3}'
    first, second = (asyncio.run(asked(app, body, "application/json")) for app in apps)
    assert first == second
    assert first[0]["status"] == 200
    assert b'"top_k":3' in first[1]["body"]


def test_what_needs_more_than_a_body_is_left_to_the_framework() -> None:
    router = APIRouter(route_class=DirectJsonRoute)

    async def with_query(body: RecommendRequest, request: Request, n: int) -> Response:
        return Response()

    async def with_model(body: RecommendRequest, request: Request) -> RecommendRequest:
        return body

    def no_coroutine(body: RecommendRequest, request: Request) -> Response:
        return Response()

    for endpoint in (with_query, with_model, no_coroutine, echo):
        router.post(f"/{endpoint.__name__}")(endpoint)
    router.post("/guarded", dependencies=[Depends(HTTPBearer())])(echo)
    direct = {
        route.path: route.direct_call() is not None
        for route in router.routes
        if isinstance(route, DirectJsonRoute)
    }
    assert direct == {
        "/with_query": False,
        "/with_model": False,
        "/no_coroutine": False,
        "/echo": True,
        "/guarded": False,
    }
