"""``/admin/tokenizers``: trained on a source, and how good they are."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request
from starlette.responses import Response

from rectokens.artifacts.json_fields import read_json
from rectokens.artifacts.release_store import ReleaseStore
from rectokens.artifacts.tokenizer import CONFIG_NAME, REPORT_NAME
from server.api.admin.catalogs import fits_model, version_to_wire
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
from server.api.admin.schemas import TokenizerDetail, TokenizerList
from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.errors import ErrorKind, ServiceError
from server.jobs.params import TrainTokenizerParams
from server.jobs.types import JobKind

router = admin_router()


@router.post(
    "/admin/tokenizers",
    summary="Train a tokenizer",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
async def train_tokenizer(
    body: TrainTokenizerParams, request: Request, key: IdempotencyKey = None
) -> Response:
    """Fit RQ-KMeans or RQ-VAE to a source and measure it there.

    A tokenizer that is not the model's can be trained and looked at; catalogs made with it cannot
    be activated until there is a model for it.
    """
    return await submit(request, JobKind.TRAIN_TOKENIZER, body, key)


@router.get(
    "/admin/tokenizers",
    summary="Tokenizers of the store",
    response_model=TokenizerList,
    responses=documented_errors(*READ_ERRORS),
)
async def list_tokenizers(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Most versions told.")] = 100,
) -> Response:
    """Latest first, with their quality figures."""
    versions = await from_store(link_of(request).store.versions, "tokenizer")
    release = service_of(request).release
    return JSONResponse(
        {
            "tokenizers": [
                {**version_to_wire(one), "fits_model": fits_model(one, release)}
                for one in versions[:limit]
            ]
        }
    )


@router.get(
    "/admin/tokenizers/{version}",
    summary="One tokenizer",
    response_model=TokenizerDetail,
    responses=documented_errors(*READ_ERRORS, ErrorKind.NOT_FOUND),
)
async def get_tokenizer(version: Version, request: Request) -> Response:
    """With its whole quality report: errors and code use by level, collisions."""
    store = link_of(request).store
    found = [one for one in await from_store(store.versions, "tokenizer") if one.version == version]
    if not found:
        raise ServiceError(
            ErrorKind.NOT_FOUND, f"tokenizer {version} is not in the store", param="version"
        )
    release = service_of(request).release
    return JSONResponse(
        {
            **version_to_wire(found[0]),
            "fits_model": fits_model(found[0], release),
            **await from_store(_details, store, version),
        }
    )


def _details(store: ReleaseStore, version: str) -> dict[str, Any]:
    folder = store.fetch("tokenizer", version)
    config = read_json(folder / CONFIG_NAME)
    return {
        "report": read_json(folder / REPORT_NAME).content(),
        "fitted_on": config.mapping("fitted_on"),
    }
