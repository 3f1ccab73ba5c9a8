"""``GET /v1/models``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.api.schemas import ModelList
from server.errors import ErrorKind

router = APIRouter(tags=["models"])


@router.get(
    "/v1/models",
    summary="What is served",
    response_model=ModelList,
    responses=documented_errors(
        ErrorKind.UNAUTHORIZED,
        ErrorKind.RATE_LIMITED,
        ErrorKind.LOADING,
        ErrorKind.DRAINING,
        ErrorKind.ENGINE_DEAD,
    ),
)
async def models(request: Request) -> Response:
    """The model with the versions of its catalog and tokenizer, in the OpenAI list shape."""
    release = service_of(request).require_release()
    catalog = release.catalog
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {
                    "id": release.model_name,
                    "object": "model",
                    "created": release.created_s,
                    "owned_by": "rectokens",
                    "model_version": release.model_version,
                    "catalog_version": catalog.version,
                    "tokenizer_fingerprint": release.spec.tokenizer_fingerprint,
                    "num_items": catalog.num_items,
                    "num_levels": catalog.num_levels,
                    "codebook_size": catalog.codebook_size,
                    "constraint_sets": sorted(catalog.constraint_sets),
                    "max_prompt_tokens": release.engine.max_prompt_tokens,
                }
            ],
        }
    )
