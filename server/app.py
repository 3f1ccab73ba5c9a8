"""Wiring and lifespan of the HTTP app, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.access.guard import documented_key
from server.api import completions, health, models, recommend, recommend_batch, score
from server.api.admin.auth import AdminGuard
from server.api.admin.routers import ADMIN_PATH, UPLOADS_PATH, include_admin
from server.api.docs_page import add_docs_page
from server.api.handlers import install_error_handlers
from server.api.middleware import OPEN_PATHS, add_middleware
from server.following import StoreLink
from server.proxy.app import mounted_proxy_app
from server.proxy.service import Proxy
from server.release import ReleaseLoader
from server.service import Service
from server.settings import Settings
from server.tracing.spans import make_spans
from server.version import running_version

PROXY_PATH = "/proxy"

_DESCRIPTION = """Recommendations that a language model chose among the items of a catalog.

Every error, on every route, is `{"error": {"message", "type", "param", "code"}}`. Every answer
carries `X-Request-ID`, the caller's own if it sent a usable one.
"""


def create_app(
    settings: Settings,
    load_release: ReleaseLoader,
    proxy: Proxy | None = None,
    link: StoreLink | None = None,
) -> FastAPI:
    """The app of one service.

    Args:
        settings: of the service.
        load_release: loads what is served; runs in the background once the app starts.
        proxy: served below ``/proxy``, started and stopped with the app; None for none.
        link: to the store that is followed, started and stopped with the app; None for none.

    Returns:
        The app; ``app.state.service`` is its :class:`~server.service.Service`.
    """
    spans = make_spans(settings, "rectokens")
    service = Service(settings, load_release, spans)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        if link is not None:
            link.start(service)
        if proxy is not None:
            proxy.start()
        try:
            yield
        finally:
            if link is not None:
                await link.stop()
            if proxy is not None:
                await proxy.stop()
            await service.stop()
            await asyncio.to_thread(spans.close)

    app = FastAPI(
        title="rectokens",
        version=running_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.spans = spans
    app.state.link = link
    app.state.job_watchers = set()
    app.state.admin_guard = AdminGuard(settings.admin, settings.access.reload_s)
    with_key = documented_key(settings)
    for router in (
        recommend.router,
        recommend_batch.router,
        score.router,
        completions.router,
        models.router,
    ):
        app.include_router(router, dependencies=with_key)
    app.include_router(health.router)
    include_admin(app)
    add_docs_page(app)
    install_error_handlers(app, service.metrics)

    max_bytes_below = {
        recommend_batch.PATH: settings.limits.max_bulk_body_bytes,
        completions.PATH: settings.limits.max_completion_body_bytes,
        UPLOADS_PATH: settings.admin.max_upload_bytes,
        ADMIN_PATH: settings.admin.max_body_bytes,
    }
    if proxy is not None:
        app.mount(PROXY_PATH, mounted_proxy_app(settings, proxy, spans))
        max_bytes_below[f"{PROXY_PATH}/"] = settings.proxy.max_body_bytes
    add_middleware(
        app,
        settings,
        service.metrics,
        max_bytes=settings.limits.max_body_bytes,
        max_bytes_below=max_bytes_below,
        timeout_s_below={UPLOADS_PATH: settings.admin.upload_timeout_s},
        # Below /admin/ there is a guard of its own.
        open_paths=(*OPEN_PATHS, *(f"{PROXY_PATH}{path}" for path in OPEN_PATHS), ADMIN_PATH),
        spans=spans,
    )
    return app
