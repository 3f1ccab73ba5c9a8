"""``/admin/drain`` and ``/admin/resume``: taking this process out of the traffic and back."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from server.api.admin.common import BODY_ERRORS, GUARD_ERRORS, admin_router
from server.api.admin.schemas import DrainBody, ServiceState
from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.errors import ErrorKind
from server.service import Service

router = admin_router()

_ERRORS = documented_errors(*GUARD_ERRORS, *BODY_ERRORS, ErrorKind.INVALID_VALUE)


@router.post(
    "/admin/drain",
    summary="Take no more requests",
    response_model=ServiceState,
    responses=_ERRORS,
)
async def drain(request: Request, body: DrainBody | None = None) -> Response:
    """`/ready` is 503 from now on and new requests are refused; running ones are waited for.

    Of this process only. It follows the store all the same, and may then load a model in the
    place of the one served. `/admin/resume` ends it.
    """
    service = service_of(request)
    timeout_s = service.settings.drain_timeout_s
    if body is not None and body.timeout_ms is not None:
        timeout_s = min(body.timeout_ms / 1000, timeout_s)
    await service.hold(timeout_s)
    return _state(service)


@router.post(
    "/admin/resume", summary="Take requests again", response_model=ServiceState, responses=_ERRORS
)
async def resume(request: Request) -> Response:
    """Undo `/admin/drain`. A service that shuts down stays so."""
    service = service_of(request)
    service.resume()
    return _state(service)


def _state(service: Service) -> Response:
    return JSONResponse({"phase": str(service.phase), "idle": service.idle})
