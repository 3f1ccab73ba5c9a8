"""Wiring and lifespan of the proxy's HTTP app, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.access.guard import documented_key
from server.api.docs_page import add_docs_page
from server.api.handlers import install_error_handlers
from server.api.middleware import OPEN_PATHS, add_middleware
from server.proxy import routes
from server.proxy.service import Proxy
from server.settings import Settings
from server.tracing.spans import Spans, make_spans
from server.version import running_version

_DESCRIPTION = """Completions and chats for an upstream that takes prompts as embeddings.

Every error, on every route, is `{"error": {"message", "type", "param", "code"}}`.
"""


def create_proxy_app(settings: Settings, proxy: Proxy) -> FastAPI:
    """The app of a proxy that is a process of its own.

    Args:
        settings: of HTTP and of the proxy.
        proxy: started and stopped with the app.
    """
    spans = make_spans(settings, "rectokens-proxy")
    app = mounted_proxy_app(settings, proxy, spans)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        proxy.start()
        try:
            yield
        finally:
            await proxy.stop()
            await asyncio.to_thread(spans.close)

    app.router.lifespan_context = lifespan
    add_middleware(
        app,
        settings,
        proxy.metrics,
        max_bytes=settings.proxy.max_body_bytes,
        open_paths=OPEN_PATHS,
        spans=spans,
    )
    return app


def mounted_proxy_app(settings: Settings, proxy: Proxy, spans: Spans) -> FastAPI:
    """The proxy's routes for an app that has its own middleware, and that starts and stops the
    proxy.
    """
    app = FastAPI(
        title="rectokens proxy",
        version=running_version(),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.proxy = proxy
    app.state.spans = spans
    app.include_router(routes.router, dependencies=documented_key(settings))
    app.include_router(routes.open_router)
    add_docs_page(app)
    install_error_handlers(app, proxy.metrics)
    return app
