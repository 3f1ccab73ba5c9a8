"""``/health``, ``/ready`` and ``/metrics``: for orchestrators and Prometheus."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.api.schemas import HealthResponse, ReadyResponse
from server.errors import ErrorKind
from server.release import Release

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
    """503 while loading or draining; else the versions that answer, and how they stand to the
    store that is followed."""
    service = service_of(request)
    release = service.require_release()
    since_s = service.active_since_s
    return JSONResponse(
        {
            "status": "ready",
            "model": release.model_name,
            "model_version": release.model_version,
            "catalog_version": release.catalog.version,
            "tokenizer_fingerprint": release.spec.tokenizer_fingerprint,
            "num_items": release.catalog.num_items,
            "release_version": release.version,
            "active_s": None if since_s is None else round(time.time() - since_s, 3),
            "catalog_age_s": catalog_age_s(release),
            "store": store_state(request),
        }
    )


def catalog_age_s(release: Release) -> float | None:
    """Seconds since the catalog was made, None if nobody knows."""
    made_s = release.catalog_created_s
    return None if made_s is None else round(max(time.time() - made_s, 0.0), 3)


def store_state(request: Request) -> dict[str, Any] | None:
    """The body of a ``StoreState``; None where no store is followed."""
    link = request.app.state.link
    if link is None or link.follower is None:
        return None
    status = link.follower.status
    failure = status.failure
    return {
        "active_release": status.active and status.active.release,
        "activated_at": status.active and status.active.at,
        "loading": link.follower.loading,
        "failure": failure
        and {
            "release": failure.release,
            "message": failure.message,
            "at": failure.at,
            "attempts": failure.attempts,
        },
    }


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
