"""``POST /v1/recommend``."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.dependencies import service_of
from server.api.disconnect import unless_disconnected
from server.api.limits import to_query
from server.api.responses import JSONResponse, documented_errors
from server.api.schemas import RecommendRequest, RecommendResponse
from server.api.strict_json import DirectJsonRoute
from server.batching.interfaces import Answer
from server.errors import ErrorKind
from server.queries import RecommendQuery
from server.recommender import Recommendation

router = APIRouter(tags=["recommend"], route_class=DirectJsonRoute)

# What may become of a request for items.
SEARCH_ERRORS = (
    ErrorKind.MALFORMED_JSON,
    ErrorKind.BAD_REQUEST,
    ErrorKind.UNAUTHORIZED,
    ErrorKind.BODY_TIMEOUT,
    ErrorKind.BODY_TOO_LARGE,
    ErrorKind.UNSUPPORTED_MEDIA_TYPE,
    ErrorKind.INVALID_VALUE,
    ErrorKind.NO_KNOWN_ITEMS,
    ErrorKind.PROMPT_TOO_LONG,
    ErrorKind.OVERLOADED,
    ErrorKind.DEADLINE_UNREACHABLE,
    ErrorKind.RATE_LIMITED,
    ErrorKind.ENGINE_FAULT,
    ErrorKind.LOADING,
    ErrorKind.DRAINING,
    ErrorKind.ENGINE_DEAD,
    ErrorKind.DEADLINE_EXCEEDED,
)


@router.post(
    "/v1/recommend",
    summary="Recommend items",
    response_model=RecommendResponse,
    responses=documented_errors(*SEARCH_ERRORS),
)
async def recommend(body: RecommendRequest, request: Request) -> Response:
    """What next for this user? Only items that the catalog has, best first.

    Fewer than `top_k` items come with the reason in `shortfall`. A 429 carries `Retry-After`.
    """
    arrival_s = time.monotonic()
    service = service_of(request)
    release = service.require_release()
    query = to_query(body, service.settings, arrival_s)
    found = await unless_disconnected(request, service.recommend(query, release))
    return JSONResponse(to_wire(found, query, time.monotonic() - arrival_s))


def to_wire(found: Recommendation, query: RecommendQuery, total_s: float) -> dict[str, Any]:
    """The body of a ``RecommendResponse``; plain dicts, as wide answers have many."""
    release, prepared, answer = found.release, found.prepared, found.answer
    items = []
    for item in found.items:
        wire: dict[str, Any] = {
            "item_id": item.item_id,
            "score": item.score,
            "semantic_id": item.semantic_id,
        }
        if query.with_metadata:
            wire["metadata"] = item.metadata
        if query.with_level_scores:
            wire["level_scores"] = item.level_scores
        items.append(wire)
    shortfall = answer.result.shortfall
    return {
        "id": f"rec-{uuid.uuid4().hex}",
        "model": release.model_name,
        "model_version": release.model_version,
        "catalog_version": release.catalog.version,
        "items": items,
        "shortfall": shortfall and {"reason": shortfall.reason, "returned": shortfall.returned},
        "unknown_items": prepared.unknown_items,
        "seed": prepared.search.seed if query.temperature > 0 else None,
        "usage": usage(found),
        "timings": timings(answer, total_s),
    }


def usage(found: Recommendation) -> dict[str, int]:
    """The body of ``Usage``."""
    prompt = found.prepared.prompt
    return {
        "prompt_tokens": len(prompt.token_ids),
        "cached_tokens": found.answer.cached_tokens,
        "history_items": prompt.items_used,
        "truncated_items": prompt.items_truncated,
        "truncated_texts": prompt.texts_truncated,
    }


def timings(answer: Answer, total_s: float) -> dict[str, float]:
    """The body of ``Timings``."""
    return {
        "queue_ms": _ms(answer.queue_s),
        "prefill_ms": _ms(answer.prefill_s),
        "decode_ms": _ms(answer.decode_s),
        "total_ms": _ms(total_s),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
