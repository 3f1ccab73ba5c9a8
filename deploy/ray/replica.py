"""One replica of a variant: the whole service, without a socket. Needs no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import FastAPI

from deploy.ray.asgi import Headers, HttpRequest, HttpResponse, ResponseStart, respond, stream
from deploy.ray.autoscaling import BEAM_ROWS
from server.app import create_app
from server.following import StoreLink
from server.release import ReleaseError, load_release
from server.service import Phase, Service
from server.settings import Settings

VARIANT_HEADER = "X-Variant"
REPLICA_HEADER = "X-Replica"

_LOOK_S = 0.02


def create_service_app(settings: Settings) -> FastAPI:
    """The app that ``python -m server serve`` serves, following a store where there is one.

    Raises:
        ReleaseError: the store or the database of the jobs cannot be opened.
    """
    if settings.store.path is not None:
        link = StoreLink.open(settings)
        return create_app(settings, link.load_first, link=link)
    return create_app(settings, lambda: load_release(settings))


class VariantServer:
    """Answers requests with an app, from ``start`` to ``stop``.

    Args:
        variant: its name, told in every answer.
        replica: which of the variant's replicas this is, likewise.
        app: of the service, not started.
    """

    def __init__(self, variant: str, replica: str, app: FastAPI) -> None:
        self._app = app
        self._service: Service = app.state.service
        self._lifespan = app.router.lifespan_context(app)
        self._own: Headers = (
            (VARIANT_HEADER.lower().encode(), variant.encode()),
            (REPLICA_HEADER.lower().encode(), replica.encode()),
        )

    async def start(self) -> None:
        """Load the release; return when requests can be answered.

        Raises:
            ReleaseError: it cannot be loaded.
        """
        await self._lifespan.__aenter__()
        while self._service.phase is not Phase.READY:
            if (error := self._service.load_error) is not None:
                await self.stop()
                raise (
                    error
                    if isinstance(error, ReleaseError)
                    else ReleaseError(f"{type(error).__name__}: {error}")
                ) from error
            await asyncio.sleep(_LOOK_S)

    async def stop(self) -> None:
        """Finish what is being answered, for as long as a drain may take; then end."""
        await self._service.drain(self._service.settings.drain_timeout_s)
        await self._lifespan.__aexit__(None, None, None)

    async def call(self, request: HttpRequest) -> HttpResponse:
        """The answer to a request. Cancelling drops the request."""
        response = await respond(self._app, request)
        return HttpResponse(response.status, response.headers + self._own, response.body)

    async def stream(self, request: HttpRequest) -> AsyncGenerator[ResponseStart | bytes]:
        """The answer as it comes. Closing drops the request."""
        async with aclosing(stream(self._app, request)) as parts:
            async for part in parts:
                if isinstance(part, ResponseStart):
                    part = ResponseStart(part.status, part.headers + self._own)
                yield part

    def check(self) -> None:
        """Raise if only a new process helps.

        Raises:
            ServiceError: the engine has died.
        """
        self._service.check_alive()

    def load(self) -> dict[str, float]:
        """What the number of replicas is decided by."""
        return {BEAM_ROWS: float(self._service.beam_rows)}
