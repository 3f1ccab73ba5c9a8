"""``/admin/releases``: a model and a catalog, activated as one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request
from starlette.responses import Response

from server.api.admin.catalogs import version_to_wire
from server.api.admin.common import (
    ACCEPTED,
    READ_ERRORS,
    SUBMIT_ERRORS,
    IdempotencyKey,
    Version,
    admin_router,
    from_store,
    link_of,
    submit,
)
from server.api.admin.gates import check_gate
from server.api.admin.schemas import ActivateReleaseBody, ReleaseList
from server.api.dependencies import service_of
from server.api.health import store_state
from server.api.responses import JSONResponse, documented_errors
from server.jobs.params import ActivateParams
from server.jobs.types import JobKind

router = admin_router()


@router.get(
    "/admin/releases",
    summary="Releases of the store",
    response_model=ReleaseList,
    responses=documented_errors(*READ_ERRORS),
)
async def list_releases(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Most versions told.")] = 100,
) -> Response:
    """Latest first, the history of activations, and how this process stands to the store, which
    `/ready` does not tell while it is drained."""
    store = link_of(request).store
    versions = await from_store(store.versions, "release")
    history = await from_store(store.history)
    release = service_of(request).release
    return JSONResponse(
        {
            "served": None if release is None else release.version,
            "store": store_state(request),
            "releases": [
                {
                    **version_to_wire(one),
                    "model": one.parts.get("model"),
                    "catalog": one.parts.get("catalog"),
                }
                for one in versions[:limit]
            ],
            "history": [
                {
                    "sequence": one.sequence,
                    "action": one.action,
                    "release": one.release,
                    "at": one.at,
                    "note": one.note,
                }
                for one in reversed(history[-limit:])
            ],
        }
    )


@router.post(
    "/admin/releases/{version}/activate",
    summary="Serve a release",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
async def activate_release(
    version: Version,
    request: Request,
    body: ActivateReleaseBody | None = None,
    key: IdempotencyKey = None,
) -> Response:
    """Model and catalog together, loaded and tried beside what is served.

    Where the memory does not allow that the job fails and names the bytes that are missing,
    unless the service was drained before. The job ends once every service that follows the store
    serves it, or says why not.
    """
    params: dict[str, Any] = {} if body is None else body.model_dump(exclude_unset=True)
    check_gate(None if body is None else body.gate, request)
    return await submit(request, JobKind.ACTIVATE, ActivateParams(release=version, **params), key)
