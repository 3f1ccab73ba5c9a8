"""Options of the gate, checked before a job is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from server.api.dependencies import service_of
from server.api.limits import to_query
from server.api.schemas import RecommendRequest
from server.errors import ServiceError, invalid
from server.rehearsal.types import GateOptions


def check_gate(gate: GateOptions | Mapping[str, Any] | None, request: Request) -> None:
    """Refuse options that are none, and requests to replay that this service would not take.

    Raises:
        ServiceError: naming the field.
    """
    if gate is None:
        return
    if not isinstance(gate, GateOptions):
        try:
            gate = GateOptions.model_validate(gate)
        except ValidationError as error:
            raise _refused("gate", error) from None
    settings = service_of(request).settings
    for place, body in enumerate(gate.requests or ()):
        where = f"gate.requests.{place}"
        try:
            to_query(RecommendRequest.model_validate(body), settings, 0.0)
        except ValidationError as error:
            raise _refused(where, error) from None
        except ServiceError as error:
            path = f"{where}.{error.param}" if error.param else where
            raise invalid(path, f"{where}: {error.message}") from None


def _refused(where: str, error: ValidationError) -> ServiceError:
    first = error.errors(include_url=False)[0]
    path = ".".join([where, *map(str, first["loc"])])
    message = str(first["msg"]).removeprefix("Value error, ")
    return invalid(path, f"{path}: {message}")
