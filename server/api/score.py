"""``POST /v1/score``."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.dependencies import service_of
from server.api.disconnect import unless_disconnected
from server.api.limits import to_score_query
from server.api.recommend import SEARCH_ERRORS, timings, usage
from server.api.responses import JSONResponse, documented_errors
from server.api.score_schemas import ScoreRequest, ScoreResponse
from server.api.strict_json import DirectJsonRoute
from server.recommender import Recommendation

router = APIRouter(tags=["recommend"], route_class=DirectJsonRoute)

_UNSCORED = {"score": None, "semantic_id": None, "level_scores": None}


@router.post(
    "/v1/score",
    summary="Score given items",
    response_model=ScoreResponse,
    responses=documented_errors(*SEARCH_ERRORS),
)
async def score(body: ScoreRequest, request: Request) -> Response:
    """How likely are these items next for this user? All of them, in the order given.

    The scores are those that `/v1/recommend` gives the same items for the same history.
    """
    arrival_s = time.monotonic()
    service = service_of(request)
    release = service.require_release()
    query = to_score_query(body, service.settings, arrival_s)
    found = await unless_disconnected(request, service.score(query, release))
    return JSONResponse(_to_wire(found, body, time.monotonic() - arrival_s))


def _to_wire(found: Recommendation, body: ScoreRequest, total_s: float) -> dict[str, Any]:
    """The body of a ``ScoreResponse``."""
    scored = {
        item.item_id: {
            "score": item.score,
            "semantic_id": item.semantic_id,
            "level_scores": item.level_scores,
        }
        for item in found.items
    }
    release = found.release
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "model": release.model_name,
        "model_version": release.model_version,
        "catalog_version": release.catalog.version,
        "items": [{"item_id": i, **scored.get(i, _UNSCORED)} for i in body.items],
        "unscored_items": [i for i in dict.fromkeys(body.items) if i not in scored],
        "unknown_items": found.prepared.unknown_items,
        "usage": usage(found),
        "timings": timings(found.answer, total_s),
    }
