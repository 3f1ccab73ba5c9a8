"""``POST /v1/completions``: OpenAI's completions, where every completion is an item."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from rectokens.prompts.markup import ItemMention, split_mentions
from rectokens.prompts.parts import TextPart
from server.access.guard import charge
from server.api.completion_schemas import (
    NEUTRAL_VALUES,
    CompletionRequest,
    CompletionResponse,
)
from server.api.dependencies import service_of
from server.api.disconnect import unless_disconnected
from server.api.limits import build_query, check_chars, check_count, check_ids
from server.api.recommend import SEARCH_ERRORS, timings
from server.api.responses import JSONResponse, documented_errors
from server.api.sse import DONE, EventStream, event
from server.api.strict_json import DirectJsonRoute
from server.errors import ErrorKind, ServiceError, invalid
from server.item_text import item_text
from server.queries import EmbedsPrompt, RecommendQuery, TokenPrompt
from server.recommender import Recommendation
from server.release import Release
from server.settings import Settings
from server.settings_serving import LimitSettings

PATH = "/v1/completions"

router = APIRouter(tags=["completions"], route_class=DirectJsonRoute)


@router.post(
    PATH,
    summary="Complete a prompt with items",
    response_model=CompletionResponse,
    responses={
        **documented_errors(*SEARCH_ERRORS, ErrorKind.NOT_FOUND),
        200: {"content": {"text/event-stream": {}}, "description": "The answer, or its events."},
    },
)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Items of the catalog that continue each prompt, best first.

    With `stream`, one event a choice; a search knows its items only when it is done, so they
    come together, and an error has its own status.
    """
    arrival_s = time.monotonic()
    service = service_of(request)
    release = service.require_release()
    _check_request(body, release)
    queries = _to_queries(body, service.settings, arrival_s)
    charge(request, len(queries) - 1)
    found = await unless_disconnected(request, service.recommend_all(queries, release))
    answer = _to_wire(found, queries, release, time.monotonic() - arrival_s)
    if not body.stream:
        return JSONResponse(answer)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_events(answer, with_usage), service.metrics.rejected)


def _check_request(body: CompletionRequest, release: Release) -> None:
    """Refuse what is meant for another model, or would ask for something else than items."""
    if body.model is not None and body.model != release.model_name:
        raise ServiceError(
            ErrorKind.NOT_FOUND,
            f"model {body.model[:128]!r} is not served; {release.model_name!r} is",
            param="model",
        )
    for name, neutral in NEUTRAL_VALUES.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            allowed = "".join(f", {one!r}" for one in neutral)
            raise invalid(
                name,
                f"{name} is {repr(value)[:60]}, which a search for items does not know; "
                f"allowed are null{allowed}",
            )
    if body.best_of not in (None, body.n or 1):
        raise invalid("best_of", f"best_of is {body.best_of}; it must equal n, {body.n or 1}")
    levels = release.spec.item_tokens.num_levels
    if body.max_tokens is not None and body.max_tokens < levels:
        raise invalid(
            "max_tokens", f"max_tokens is {body.max_tokens}; an item of this model has {levels}"
        )


def _to_queries(
    body: CompletionRequest, settings: Settings, arrival_s: float
) -> list[RecommendQuery]:
    limits = settings.limits
    fields = _embeds(body, limits) if body.prompt is None else _prompts(body, limits)
    return [
        build_query(
            body,
            settings,
            arrival_s,
            wanted=("n", body.n, 1),
            exclude_history=body.exclude_history,
            refuse_unknown_items=True,
            with_metadata=False,
            with_level_scores=False,
            **one,
        )
        for one in fields
    ]


def _embeds(body: CompletionRequest, limits: LimitSettings) -> Iterator[dict[str, Any]]:
    many = isinstance(body.prompt_embeds, list)
    given = cast(list[str], body.prompt_embeds if many else [body.prompt_embeds])
    _check_prompts("prompt_embeds", given, limits)
    _check_exclusion(body, "prompt_embeds")
    for place, data in enumerate(given):
        yield {
            "parts": (),
            "parts_param": f"prompt_embeds.{place}" if many else "prompt_embeds",
            "prompt": EmbedsPrompt(
                data, limits.max_embeds_tokens, limits.max_completion_body_bytes
            ),
        }


def _prompts(body: CompletionRequest, limits: LimitSettings) -> Iterator[dict[str, Any]]:
    one = isinstance(body.prompt, str) or (
        isinstance(body.prompt, list) and bool(body.prompt) and isinstance(body.prompt[0], int)
    )
    given = cast(list[str | list[int]], [body.prompt] if one else body.prompt)
    _check_prompts("prompt", given, limits)
    check_chars("prompt", [text for text in given if isinstance(text, str)], limits)
    for place, prompt in enumerate(given):
        param = "prompt" if one else f"prompt.{place}"
        if isinstance(prompt, str):
            yield {"parts": _parts(prompt, param, limits), "parts_param": param}
            continue
        _check_exclusion(body, param)
        if not prompt:
            raise invalid(param, f"{param} has no token ids; the model needs at least one")
        yield {"parts": (), "parts_param": param, "prompt": TokenPrompt(tuple(prompt))}


def _parts(text: str, param: str, limits: LimitSettings) -> tuple[str | TextPart, ...]:
    pieces = split_mentions(text)
    check_count(param, pieces, limits.max_history_items)
    check_ids(
        param, [p.item_id for p in pieces if isinstance(p, ItemMention)], limits.max_item_id_chars
    )
    return tuple(
        piece.item_id if isinstance(piece, ItemMention) else TextPart(piece) for piece in pieces
    )


def _check_prompts(param: str, prompts: Sequence[object], limits: LimitSettings) -> None:
    if not prompts:
        raise invalid(param, f"{param} is an empty list; give at least one prompt")
    check_count(param, prompts, limits.max_prompts)


def _check_exclusion(body: CompletionRequest, param: str) -> None:
    if body.exclude_history:
        raise invalid(
            "exclude_history",
            f"exclude_history is true, but {param} does not tell its items; give exclude_items",
        )


def _to_wire(
    found: Sequence[Recommendation],
    queries: Sequence[RecommendQuery],
    release: Release,
    total_s: float,
) -> dict[str, Any]:
    """The body of a ``CompletionResponse``."""
    item_tokens = release.spec.item_tokens
    choices = [
        {
            "index": place * query.top_k + rank,
            "text": item_text(item.semantic_id, item_tokens, release.text_tokenizer),
            "logprobs": None,
            "finish_reason": "stop",
            "item": {
                "item_id": item.item_id,
                "score": item.score,
                "semantic_id": item.semantic_id,
            },
        }
        for place, (one, query) in enumerate(zip(found, queries, strict=True))
        for rank, item in enumerate(one.items)
    ]
    prompt_tokens = sum(one.prepared.search.prompt_length for one in found)
    cached_tokens = sum(one.answer.cached_tokens for one in found)
    completion_tokens = len(choices) * item_tokens.num_levels
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": release.model_name,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        },
        "rectokens": {
            "model_version": release.model_version,
            "catalog_version": release.catalog.version,
            "prompts": [_report(one, total_s) for one in found],
        },
    }


def _report(one: Recommendation, total_s: float) -> dict[str, Any]:
    shortfall, search = one.answer.result.shortfall, one.prepared.search
    return {
        "shortfall": shortfall and {"reason": shortfall.reason, "returned": shortfall.returned},
        "seed": search.seed if search.temperature > 0 else None,
        "truncated_items": one.prepared.prompt.items_truncated,
        "truncated_texts": one.prepared.prompt.texts_truncated,
        "timings": timings(one.answer, total_s),
    }


async def _events(answer: dict[str, Any], with_usage: bool) -> AsyncGenerator[bytes, None]:
    """An answer as OpenAI streams one: a chunk a choice, then the usage if asked for."""
    choices, usage, extension = (answer.pop(name) for name in ("choices", "usage", "rectokens"))
    for place, choice in enumerate(choices):
        last = {"rectokens": extension} if place == len(choices) - 1 else {}
        yield event({**answer, "choices": [choice], **last})
    if not choices:
        yield event({**answer, "choices": [], "rectokens": extension})
    if with_usage:
        yield event({**answer, "choices": [], "usage": usage})
    yield DONE
