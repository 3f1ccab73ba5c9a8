"""Request bodies as the standard has them: UTF-8, no repeated keys, numbers of sane length."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

_MAX_DIGITS = 1_000


class StrictJsonRequest(Request):
    """A request whose body is read strictly; what is wrong is told by a ValueError."""

    async def json(self) -> Any:
        """The body.

        Raises:
            ValueError: not UTF-8, not JSON, a key given twice, or an endless number.
        """
        if not hasattr(self, "_json"):
            # json.loads would guess UTF-16 and UTF-32 from bytes, and keep the last of two keys.
            text = (await self.body()).decode("utf-8")
            try:
                self._json = json.loads(text, object_pairs_hook=_unique, parse_int=_parse_int)
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
        return self._json


class StrictJsonRoute(APIRoute):
    """A route that reads its body with :class:`StrictJsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler FastAPI would use, given the strict request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:60]!r} is given more than once")
    return result


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; at most {_MAX_DIGITS}")
    return int(digits)
