"""The API key of a request, looked at before its body is read."""

from __future__ import annotations

from collections.abc import Collection

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.guard import ApiKeys, set_caller
from server.api.responses import error_response
from server.errors import ServiceError
from server.metrics import HttpMetrics


class ApiKeyMiddleware:
    """Lets a request through that has a key whose caller is below its limit.

    Args:
        keys: that let callers in.
        open_paths: that need none. A path that ends in ``/`` stands for all below it.
    """

    def __init__(
        self, app: ASGIApp, metrics: HttpMetrics, keys: ApiKeys, open_paths: Collection[str]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._open_below = tuple(path for path in open_paths if path.endswith("/"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path in self._open_paths or path.startswith(self._open_below):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._keys.caller(Headers(scope=scope).get("authorization", ""))
            caller.admit()
        except ServiceError as error:
            self._metrics.rejected(error.kind)
            response = error_response(error.kind, error.message, headers=error.headers)
            await response(scope, receive, send)
            return
        set_caller(scope.setdefault("state", {}), caller)
        with structlog.contextvars.bound_contextvars(caller=caller.name):
            await self._app(scope, receive, send)
