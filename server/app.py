"""Wiring and lifespan of the HTTP app, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.api import health, models, recommend
from server.api.handlers import install_error_handlers
from server.api.middleware import (
    REQUEST_ID_HEADER,
    BodyLimitMiddleware,
    RequestContextMiddleware,
)
from server.release import ReleaseLoader
from server.service import Service
from server.settings import Settings

_DESCRIPTION = """Recommendations that a language model chose among the items of a catalog.

Every error, on every route, is `{"error": {"message", "type", "param", "code"}}`. Every answer
carries `X-Request-ID`, the caller's own if it sent a usable one.
"""


def create_app(settings: Settings, load_release: ReleaseLoader) -> FastAPI:
    """The app of one service.

    Args:
        settings: of the service.
        load_release: loads what is served; runs in the background once the app starts.

    Returns:
        The app; ``app.state.service`` is its :class:`~server.service.Service`.
    """
    service = Service(settings, load_release)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="rectokens",
        version=version("rectokens"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for router in (recommend.router, models.router, health.router):
        app.include_router(router)
    install_error_handlers(app, service.metrics)

    # The last one added is the outermost.
    app.add_middleware(
        BodyLimitMiddleware,
        metrics=service.metrics,
        max_bytes=settings.limits.max_body_bytes,
        timeout_s=settings.limits.body_timeout_s,
    )
    if settings.http.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.http.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Content-Type", REQUEST_ID_HEADER],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    app.add_middleware(RequestContextMiddleware, metrics=service.metrics)
    return app
