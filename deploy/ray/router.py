"""The router: takes requests from Ray's proxies and gives them to variants. Needs no Ray.

It holds no model. A request goes to the variant of its user; where the replica that has it dies,
to another replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from contextlib import aclosing, asynccontextmanager
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, Counter
from starlette.responses import Response

from deploy.ray.asgi import Headers, HttpRequest, HttpResponse, ResponseStart
from deploy.ray.config import Division, ServeConfig
from deploy.ray.handles import ReplicaLostError, VariantHandle
from deploy.ray.merged_metrics import merge_metrics
from deploy.ray.replica import REPLICA_HEADER, VARIANT_HEADER
from deploy.ray.routing import choose_variant
from server.api.completions import PATH as COMPLETIONS_PATH
from server.api.handlers import install_error_handlers
from server.api.middleware import OPEN_PATHS, REQUEST_ID_HEADER, add_middleware
from server.api.recommend_batch import PATH as BATCH_PATH
from server.api.responses import JSONResponse
from server.api.sse import EventStream
from server.errors import ErrorKind, ServiceError, invalid
from server.metrics import HttpMetrics
from server.settings import Settings
from server.tracing.spans import Spans, make_spans
from server.version import running_version

_log = structlog.get_logger(__name__)

# Between one connection and the next, they say nothing about the request.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"host",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_METHODS = ["GET", "POST", "OPTIONS"]
# A replica that says so has done nothing yet: it is starting, ending or broken.
_UNAVAILABLE = 503
_TRY_AGAIN_S = 0.1


class RouterMetrics(HttpMetrics):
    """What the router counts beside requests and errors."""

    def __init__(self) -> None:
        super().__init__("rectokens_router")
        self._routed = Counter(
            "rectokens_router_routed",
            "Requests given to a variant, by how it was chosen: user, name or default.",
            ["variant", "by"],
            registry=self.registry,
        )
        self._lost = Counter(
            "rectokens_router_lost_replicas",
            "Requests whose replica was lost, by what became of them: retried, failed or cut.",
            ["variant", "outcome"],
            registry=self.registry,
        )

    def routed(self, variant: str, by: str) -> None:
        """A request goes to a variant."""
        self._routed.labels(variant=variant, by=by).inc()

    def lost(self, variant: str, outcome: str) -> None:
        """A request's replica is gone."""
        self._lost.labels(variant=variant, outcome=outcome).inc()


class Router:
    """Chooses variants and calls them.

    Args:
        config: of the deployment.
        variants: by name.
        metrics: told what happens.

    Attributes:
        division: which users go where now.
    """

    def __init__(
        self,
        config: ServeConfig,
        variants: Mapping[str, VariantHandle],
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._variants = variants
        self._metrics = metrics
        self.division = config.division

    def divide(self, division: Division) -> None:
        """Divide users another way from now on.

        Raises:
            ValueError: it does not fit the variants.
        """
        division.check(self._variants)
        self.division = division

    def choose(self, headers: Mapping[str, str]) -> str:
        """The variant of a request: by its name, else its user, else the first.

        Raises:
            ServiceError: 422, there is no variant of that name.
        """
        router = self._config.router
        name = headers.get(VARIANT_HEADER)
        if name is not None and router.named_variants:
            if name not in self._variants:
                raise invalid(
                    VARIANT_HEADER,
                    f"there is no variant {name[:64]!r}; there are {', '.join(self._variants)}",
                )
            chosen, by = name, "name"
        elif user := headers.get(router.user_header):
            division = self.division
            chosen = choose_variant(user, division.weights, division.experiment)
            by = "user"
        else:
            chosen, by = self._config.variants[0].name, "default"
        self._metrics.routed(chosen, by)
        return chosen

    async def call(self, variant: str, request: HttpRequest) -> HttpResponse:
        """The answer of a variant, from another replica where one is lost.

        Raises:
            ServiceError: 503, every replica that was tried is lost.
        """
        handle, attempts = self._variants[variant], self._config.router.attempts
        for attempt in range(1, attempts + 1):
            last = attempt == attempts
            try:
                response = await handle.call(request)
            except ReplicaLostError as error:
                self._lost(variant, error, last)
            else:
                if response.status != _UNAVAILABLE or last:
                    return response
            await asyncio.sleep(_TRY_AGAIN_S if attempt > 1 else 0)
        raise AssertionError("unreachable")

    async def stream(
        self, variant: str, request: HttpRequest
    ) -> tuple[ResponseStart, AsyncGenerator[bytes, None]]:
        """The answer of a variant as it comes; another replica is asked until it has begun.

        Raises:
            ServiceError: 503, every replica that was tried is lost.
        """
        handle, attempts = self._variants[variant], self._config.router.attempts
        for attempt in range(1, attempts + 1):
            last = attempt == attempts
            parts = handle.stream(request)
            try:
                start = await anext(parts)
            except ReplicaLostError as error:
                self._lost(variant, error, last)
            else:
                assert isinstance(start, ResponseStart)
                if start.status != _UNAVAILABLE or last:
                    return start, self._rest(variant, parts)
                await parts.aclose()
            await asyncio.sleep(_TRY_AGAIN_S if attempt > 1 else 0)
        raise AssertionError("unreachable")

    async def call_all(self, request: HttpRequest) -> dict[str, list[HttpResponse]]:
        """What every replica of every variant answers."""
        answers = await asyncio.gather(*(v.call_all(request) for v in self._variants.values()))
        return dict(zip(self._variants, answers, strict=True))

    def _lost(self, variant: str, error: ReplicaLostError, last: bool) -> None:
        _log.warning("replica lost", variant=variant, reason=str(error), retry=not last)
        self._metrics.lost(variant, "failed" if last else "retried")
        if last:
            raise ServiceError(
                ErrorKind.UPSTREAM_UNAVAILABLE,
                f"variant {variant!r} lost the replica that had the request; send it again",
                retry_after_s=1.0,
            ) from error

    async def _rest(
        self, variant: str, parts: AsyncGenerator[ResponseStart | bytes]
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(parts):
            try:
                async for part in parts:
                    assert isinstance(part, bytes)
                    yield part
            except ReplicaLostError as error:
                _log.warning("replica lost in the middle of an answer", variant=variant)
                self._metrics.lost(variant, "cut")
                # Half an answer must not look whole: the connection is broken off.
                raise ConnectionError(f"variant {variant!r} lost its replica") from error


class _PassedOn(EventStream):
    """A streamed answer with the status and the headers of the replica's."""

    def __init__(
        self,
        start: ResponseStart,
        parts: AsyncGenerator[bytes, None],
        on_rejected: Callable[[str], None],
    ) -> None:
        super().__init__(parts, on_rejected)
        self.status_code = start.status
        self.raw_headers = list(_passed_on(start.headers))


def create_router_app(
    config: ServeConfig,
    settings: Mapping[str, Settings],
    variants: Mapping[str, VariantHandle],
    router_pages: Callable[[], Awaitable[list[tuple[str, str]]]] | None = None,
) -> FastAPI:
    """The router's app.

    Args:
        config: of the deployment.
        settings: of the variants; the widest limits of them hold for bodies here.
        variants: by name.
        router_pages: name and page of metrics of every router; None where this is the only one.

    Returns:
        The app; ``app.state.router`` is its router, ``app.state.metrics`` are its metrics.
    """
    metrics = RouterMetrics()
    router = Router(config, variants, metrics)
    own = _own_settings(settings.values())
    spans = make_spans(own, "rectokens-router")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(spans.close)

    app = FastAPI(
        title="rectokens router",
        version=running_version(),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )

    async def pass_on(request: Request) -> Response:
        variant = router.choose(request.headers)
        passed = await _read(request, spans)
        if _is_streamed(passed):
            return _PassedOn(*await router.stream(variant, passed), metrics.rejected)
        answer = await router.call(variant, passed)
        response = Response(answer.body, answer.status)
        response.raw_headers = [
            *_passed_on(answer.headers),
            (b"content-length", str(len(answer.body)).encode()),
        ]
        return response

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        answers = await router.call_all(HttpRequest("GET", "/ready"))
        waiting = [
            name
            for name, weight in router.division.weights.items()
            if weight > 0 and not any(one.status == 200 for one in answers[name])
        ]
        if waiting:
            raise ServiceError(
                ErrorKind.LOADING,
                f"no replica is ready of variant {', '.join(waiting)}",
                retry_after_s=1.0,
            )
        body = {name: [_replica_state(one) for one in found] for name, found in answers.items()}
        return JSONResponse({"status": "ready", "variants": body})

    async def all_metrics(request: Request) -> Response:
        wanted = HttpRequest("GET", "/metrics")
        pages = [
            ({"variant": name, "replica": _header(one.headers, REPLICA_HEADER)}, one.body.decode())
            for name, found in (await router.call_all(wanted)).items()
            for one in found
            if one.status == 200
        ]
        routers = (
            [("", metrics.render().decode())] if router_pages is None else await router_pages()
        )
        pages += [({"replica": name}, page) for name, page in routers]
        # Pages are long; others' requests go on meanwhile.
        body = await asyncio.to_thread(merge_metrics, pages)
        return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    for path, answer_with, methods in (
        ("/v1/{rest:path}", pass_on, _METHODS),
        ("/openapi.json", pass_on, ["GET"]),
        ("/docs", pass_on, ["GET"]),
        ("/docs/{rest:path}", pass_on, ["GET"]),
        ("/health", health, ["GET", "HEAD"]),
        ("/ready", ready, ["GET", "HEAD"]),
        ("/metrics", all_metrics, ["GET"]),
    ):
        app.add_api_route(path, answer_with, methods=methods, response_model=None)
    app.state.router = router
    app.state.metrics = metrics
    install_error_handlers(app, metrics)

    add_middleware(
        app,
        own,
        metrics,
        max_bytes=own.limits.max_body_bytes,
        max_bytes_below={
            BATCH_PATH: own.limits.max_bulk_body_bytes,
            COMPLETIONS_PATH: own.limits.max_completion_body_bytes,
        },
        open_paths=OPEN_PATHS,
        spans=spans,
    )
    return app


def _own_settings(variants: Iterable[Settings]) -> Settings:
    """Of the router: the widest limits of its variants.

    Keys and pages of other sites are a matter of the variants, which answer for themselves.
    """
    every = list(variants)
    first = every[0]
    widest = {
        name: max(getattr(one.limits, name) for one in every)
        for name in ("max_body_bytes", "max_bulk_body_bytes", "max_completion_body_bytes")
    }
    return first.model_copy(
        update={
            "limits": first.limits.model_copy(update=widest),
            "http": first.http.model_copy(update={"cors_origins": ()}),
            "access": first.access.model_copy(update={"keys_file": None}),
            "tracing": any(one.tracing for one in every),
        }
    )


async def _read(request: Request, spans: Spans) -> HttpRequest:
    own = {REQUEST_ID_HEADER: structlog.contextvars.get_contextvars().get("request_id", "")}
    spans.pass_on(own)
    encoded = {name.lower().encode(): value.encode() for name, value in own.items()}
    given = [one for one in _passed_on(request.headers.raw) if one[0] not in encoded]
    client = request.client
    return HttpRequest(
        request.method,
        request.url.path,
        request.scope.get("query_string", b""),
        (*given, *encoded.items()),
        await request.body(),
        None if client is None else (client.host, client.port),
    )


def _passed_on(headers: Any) -> Headers:
    return tuple((name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP)


def _is_streamed(request: HttpRequest) -> bool:
    """Whether the answer may come in parts; a whole one may be taken in parts as well."""
    if request.path == COMPLETIONS_PATH:
        return b'"stream"' in request.body
    return request.path == BATCH_PATH


def _header(headers: Headers, name: str) -> str:
    wanted = name.lower().encode()
    return next((value.decode() for key, value in headers if key == wanted), "")


def _replica_state(answer: HttpResponse) -> dict[str, Any]:
    state: dict[str, Any] = orjson.loads(answer.body)
    return {"replica": _header(answer.headers, REPLICA_HEADER), **state}
