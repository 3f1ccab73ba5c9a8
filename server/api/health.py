"""``/health``, ``/ready`` and ``/metrics``: for orchestrators and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.api.schemas import HealthResponse, ReadyResponse
from server.errors import ErrorKind

router = APIRouter(tags=["operations"])


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    summary="Is the process alive?",
    response_model=HealthResponse,
    responses=documented_errors(ErrorKind.ENGINE_DEAD),
)
async def health(request: Request) -> Response:
    """503 once the engine thread has died: only a restart helps then."""
    service_of(request).check_alive()
    return JSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get(
    "/ready",
    summary="Are requests being answered?",
    response_model=ReadyResponse,
    responses=documented_errors(ErrorKind.LOADING, ErrorKind.DRAINING, ErrorKind.ENGINE_DEAD),
)
async def ready(request: Request) -> Response:
    """503 while loading or draining; else the versions that answer."""
    release = service_of(request).require_release()
    return JSONResponse(
        {
            "status": "ready",
            "model": release.model_name,
            "model_version": release.model_version,
            "catalog_version": release.catalog.version,
            "tokenizer_fingerprint": release.spec.tokenizer_fingerprint,
            "num_items": release.catalog.num_items,
        }
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **documented_errors()},
)
async def metrics(request: Request) -> Response:
    """Everything with the prefix `rectokens_`, beside the process's own figures."""
    body = service_of(request).metrics.render()
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})
