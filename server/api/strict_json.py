"""Request bodies as the standard has them: UTF-8, no repeated keys, numbers of sane length."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

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


@dataclass(frozen=True, slots=True)
class _DirectCall:
    """An endpoint that takes a body and the request, and answers with a response of its own.

    Attributes:
        endpoint: of the route.
        model: of the body.
        body: name of its parameter.
        request: likewise.
    """

    endpoint: Callable[..., Coroutine[Any, Any, Response]]
    model: type[BaseModel]
    body: str
    request: str

    async def parsed(self, request: StrictJsonRequest) -> BaseModel | None:
        """The body; None where anything about it is not as it should be, or unusual."""
        if request.headers.get("content-type") != "application/json":
            return None
        try:
            return self.model.model_validate(await request.json())
        except HTTPException:
            raise
        except Exception:  # whatever it is, the framework meets it again and says what is wrong
            return None

    async def __call__(self, body: BaseModel, request: Request) -> Response:
        """What the endpoint answers."""
        return await self.endpoint(**{self.body: body, self.request: request})


class StrictJsonRoute(APIRoute):
    """A route that reads its body with :class:`StrictJsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler FastAPI would use, given the strict request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_strict(request))

        return strict


class DirectJsonRoute(StrictJsonRoute):
    """A strict route whose endpoint gets a sound body without the framework's help.

    That saves a fifth of the time of the HTTP layers. Any other body takes the framework's own way,
    which words the errors, and so do all bodies of an endpoint that needs more than its body and
    the request. Dependencies that a router adds when it is included are there for OpenAPI alone:
    they are not run.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a strict route, for what cannot be done directly."""
        handler = super().get_route_handler()
        direct = self.direct_call()
        if direct is None:
            return handler

        async def at_once(request: Request) -> Response:
            strict_request = _strict(request)
            body = await direct.parsed(strict_request)
            return await (handler(strict_request) if body is None else direct(body, strict_request))

        return at_once

    def direct_call(self) -> _DirectCall | None:
        """The endpoint, if all that it needs is its body and the request."""
        needs = self.dependant
        if (
            needs.path_params
            or needs.query_params
            or needs.header_params
            or needs.cookie_params
            or len(needs.body_params) != 1
            or needs.request_param_name is None
            or not all(_is_for_documentation(one.call) for one in needs.dependencies)
            or not inspect.iscoroutinefunction(self.endpoint)
        ):
            return None
        hints = get_type_hints(self.endpoint)
        name = needs.body_params[0].name
        taken = {name, needs.request_param_name, "return"}
        if set(hints) != taken or not (_is_a(hints[name], BaseModel) and _is_a(hints["return"])):
            return None
        return _DirectCall(self.endpoint, hints[name], name, needs.request_param_name)


def _strict(request: Request) -> StrictJsonRequest:
    """The same request, which keeps a body that was read."""
    if isinstance(request, StrictJsonRequest):
        return request
    return StrictJsonRequest(request.scope, request.receive)


def _is_a(hint: Any, kind: type[Any] = Response) -> bool:
    return isinstance(hint, type) and issubclass(hint, kind)


def _is_for_documentation(dependency: Any) -> bool:
    """Whether it is there for OpenAPI alone."""
    return isinstance(dependency, HTTPBearer) and not dependency.auto_error


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
