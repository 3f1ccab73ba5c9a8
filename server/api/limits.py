"""A wire request against the settings: limits checked, defaults filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from rectokens.prompts.parts import TextPart
from server.api.schemas import MIN_TEMPERATURE, ItemInput, RecommendRequest, TextInput
from server.api.score_schemas import ScoreRequest
from server.errors import ServiceError, invalid
from server.queries import RecommendQuery
from server.settings import Settings
from server.settings_serving import LimitSettings, LongPrompt, NormalizationName

Number = TypeVar("Number", int, float)


class SearchFields(Protocol):
    """How to search: the fields that all requests for items share."""

    beam_width: int | None
    temperature: float | None
    seed: int | None
    exclude_items: list[str]
    allow_items: list[str] | None
    constraint_set: str | list[str] | None
    normalization: NormalizationName | None
    long_prompt: LongPrompt | None
    timeout_ms: int | None


def to_query(body: RecommendRequest, settings: Settings, arrival_s: float) -> RecommendQuery:
    """The query a request asks for.

    Args:
        body: the request; its shape is already checked.
        settings: limits and defaults.
        arrival_s: monotonic time at which it arrived.

    Raises:
        ServiceError: a value over a limit; names the value and the limit.
    """
    param = "history" if body.input is None else "input"
    exclude_history = body.exclude_history
    return build_query(
        body,
        settings,
        arrival_s,
        wanted=("top_k", body.top_k, settings.defaults.top_k),
        parts=_parts(body, param, settings.limits),
        parts_param=param,
        exclude_history=(
            settings.defaults.exclude_history if exclude_history is None else exclude_history
        ),
        with_metadata="metadata" in body.include,
        with_level_scores="level_scores" in body.include,
    )


def to_score_query(body: ScoreRequest, settings: Settings, arrival_s: float) -> RecommendQuery:
    """The search that a request for scores is: one that these items alone pass, all of them.

    Filters never change a score, and a beam as wide as there are items keeps each of them.

    Raises:
        ServiceError: a value over a limit; names the value and the limit.
    """
    limits, defaults = settings.limits, settings.defaults
    param = "history" if body.input is None else "input"
    check_count("items", body.items, min(limits.max_score_items, limits.max_beam_width))
    check_ids("items", body.items, limits.max_item_id_chars)
    timeout_ms = _bounded("timeout_ms", body.timeout_ms, defaults.timeout_ms, limits.max_timeout_ms)
    items = tuple(dict.fromkeys(body.items))
    return RecommendQuery(
        parts=_parts(body, param, limits),
        parts_param=param,
        top_k=len(items),
        beam_width=len(items),
        temperature=0.0,
        seed=None,
        exclude_history=False,
        exclude_items=(),
        allow_items=items,
        constraint_sets=(),
        normalization=body.normalization or defaults.normalization,
        with_metadata=False,
        with_level_scores=True,
        deadline_s=arrival_s + timeout_ms / 1000,
        cut_long_prompt=(body.long_prompt or defaults.long_prompt) == "truncate",
    )


def build_query(
    body: SearchFields,
    settings: Settings,
    arrival_s: float,
    *,
    wanted: tuple[str, int | None, int],
    **rest: Any,
) -> RecommendQuery:
    """The query of a request: what all requests have in common, checked and filled in.

    Args:
        body: its fields on the search.
        settings: limits and defaults.
        arrival_s: monotonic time at which it arrived.
        wanted: the field that says how many items are wanted: name, value, default.
        rest: the other fields of the query.

    Raises:
        ServiceError: a value over a limit; names the value and the limit.
    """
    limits, defaults = settings.limits, settings.defaults
    name, value, default = wanted
    if body.beam_width is not None:
        # Whoever asks for fewer beams only has not asked for more items than that.
        default = min(default, body.beam_width)
    top_k = _bounded(name, value, default, limits.max_top_k)
    beam_width = _bounded(
        "beam_width", body.beam_width, max(defaults.beam_width, top_k), limits.max_beam_width
    )
    if top_k > beam_width:
        raise invalid(name, f"{name} is {top_k}; at most beam_width, {beam_width}")
    temperature = _bounded(
        "temperature", body.temperature, defaults.temperature, limits.max_temperature
    )
    if 0 < temperature < MIN_TEMPERATURE:
        raise invalid(
            "temperature",
            f"temperature is {temperature}; allowed are 0 and {MIN_TEMPERATURE} to "
            f"{limits.max_temperature}",
        )
    timeout_ms = _bounded("timeout_ms", body.timeout_ms, defaults.timeout_ms, limits.max_timeout_ms)
    check_count("exclude_items", body.exclude_items, limits.max_exclude_items)
    check_ids("exclude_items", body.exclude_items, limits.max_item_id_chars)
    check_count("allow_items", body.allow_items or (), limits.max_allow_items)
    check_ids("allow_items", body.allow_items or (), limits.max_item_id_chars)
    return RecommendQuery(
        top_k=top_k,
        beam_width=beam_width,
        temperature=temperature,
        seed=body.seed,
        exclude_items=tuple(body.exclude_items),
        allow_items=None if body.allow_items is None else tuple(body.allow_items),
        constraint_sets=_constraint_sets(body.constraint_set, limits),
        normalization=body.normalization or defaults.normalization,
        deadline_s=arrival_s + timeout_ms / 1000,
        cut_long_prompt=(body.long_prompt or defaults.long_prompt) == "truncate",
        **rest,
    )


def _parts(
    body: RecommendRequest | ScoreRequest, param: str, limits: LimitSettings
) -> tuple[str | TextPart, ...]:
    if body.input is None:
        history = body.history or []
        check_count(param, history, limits.max_history_items)
        check_ids(param, history, limits.max_item_id_chars)
        return tuple(history)
    check_count(param, body.input, limits.max_history_items)
    items = [part.item for part in body.input if isinstance(part, ItemInput)]
    check_ids(param, items, limits.max_item_id_chars)
    check_chars(param, [p.text for p in body.input if isinstance(p, TextInput)], limits)
    return tuple(
        part.item if isinstance(part, ItemInput) else TextPart(part.text) for part in body.input
    )


def _constraint_sets(names: str | list[str] | None, limits: LimitSettings) -> tuple[str, ...]:
    if names is None:
        return ()
    names = [names] if isinstance(names, str) else names
    check_count("constraint_set", names, limits.max_constraint_sets)
    # Sorted without repeats, so that the catalog's cache of intersections hits.
    return tuple(sorted(set(names)))


def _bounded(name: str, value: Number | None, default: Number, limit: Number) -> Number:
    if value is None:
        return default
    if value > limit:
        raise _over(name, f"{name} is {value}", limit)
    return value


def check_count(name: str, values: Sequence[object], limit: int) -> None:
    """Refuse a list that is too long."""
    if len(values) > limit:
        raise _over(name, f"{name} has {len(values)} entries", limit)


def check_ids(name: str, ids: Sequence[str], limit: int) -> None:
    """Refuse an item id that is too long."""
    longest = max(map(len, ids), default=0)
    if longest > limit:
        raise _over(name, f"{name} has an item id of {longest} characters", limit)


def check_chars(name: str, texts: Sequence[str], limits: LimitSettings) -> None:
    """Refuse texts that are too long together."""
    chars = sum(map(len, texts))
    if chars > limits.max_text_chars:
        raise _over(name, f"{name} has {chars} characters of text", limits.max_text_chars)


def _over(param: str, found: str, limit: float) -> ServiceError:
    return invalid(param, f"{found}; at most {limit}")
