"""``/admin/reindex`` and ``/admin/catalogs``: new catalogs, and which one is served."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request
from starlette.responses import Response

from rectokens.artifacts.retention import StoredVersion
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
from server.api.admin.schemas import ActivateCatalogBody, CatalogList, RollbackBody
from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.jobs.params import ActivateParams, ReindexParams, RollbackParams
from server.jobs.types import JobKind
from server.release import Release

router = admin_router()


@router.post(
    "/admin/reindex",
    summary="Make a catalog of a source",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
async def reindex(body: ReindexParams, request: Request, key: IdempotencyKey = None) -> Response:
    """Encode a whole source with the active catalog's tokenizer, or a named one.

    A source is a file below a registered folder (`admin.sources`), or one that was sent to
    `/admin/uploads`.
    """
    check_gate(body.gate, request)
    return await submit(request, JobKind.REINDEX, body, key)


@router.get(
    "/admin/catalogs",
    summary="Catalogs of the store",
    response_model=CatalogList,
    responses=documented_errors(*READ_ERRORS),
)
async def list_catalogs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Most versions told.")] = 100,
) -> Response:
    """Latest first, with counts, collisions and state."""
    versions = await from_store(link_of(request).store.versions, "catalog")
    release = service_of(request).release
    return JSONResponse(
        {
            "served": None if release is None else release.catalog.version,
            "catalogs": [
                {**version_to_wire(one), "fits_model": fits_model(one, release)}
                for one in versions[:limit]
            ],
        }
    )


@router.post(
    "/admin/catalogs/rollback",
    summary="Go back to what was active before",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
@router.post(
    "/admin/releases/rollback",
    summary="Go back to what was active before",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
async def rollback(
    request: Request, body: RollbackBody | None = None, key: IdempotencyKey = None
) -> Response:
    """The release before the active one, model and catalog; twice goes back two."""
    params: dict[str, Any] = {} if body is None else body.model_dump(exclude_unset=True)
    check_gate(None if body is None else body.gate, request)
    return await submit(request, JobKind.ROLLBACK, RollbackParams(**params), key)


@router.post(
    "/admin/catalogs/{version}/activate",
    summary="Serve a catalog",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
async def activate_catalog(
    version: Version,
    request: Request,
    body: ActivateCatalogBody | None = None,
    key: IdempotencyKey = None,
) -> Response:
    """With the model of the active release, or a named one; refused if they do not belong
    together.

    The job ends once every service that follows the store serves it, or says why not.
    """
    params: dict[str, Any] = {} if body is None else body.model_dump(exclude_unset=True)
    check_gate(None if body is None else body.gate, request)
    return await submit(request, JobKind.ACTIVATE, ActivateParams(catalog=version, **params), key)


def version_to_wire(one: StoredVersion) -> dict[str, Any]:
    """The body of an ``ArtifactVersion``."""
    return {
        "version": one.version,
        "state": one.state,
        "created": one.created,
        "bytes": one.num_bytes,
        "tokenizer_fingerprint": one.tokenizer,
        "numbers": dict(one.numbers),
        "problem": one.problem,
    }


def fits_model(one: StoredVersion, release: Release | None) -> bool | None:
    """Whether its tokenizer is that of the model served."""
    if release is None or one.tokenizer is None:
        return None
    return one.tokenizer == release.spec.tokenizer_fingerprint
