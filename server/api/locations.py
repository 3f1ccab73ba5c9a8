"""Where in a body an error lies, as a caller would write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

_PLACES = ("body", "query", "path", "header")


def param_of(loc: Sequence[str | int], model: type[BaseModel] | None) -> str | None:
    """``input.3.text`` of a pydantic location, without the names of union members in it.

    Args:
        loc: of the error, the part of the request first.
        model: of the body; None for none.
    """
    parts, _ = _walk(loc, model)
    return ".".join(parts) or None


def known_fields(loc: Sequence[str | int], model: type[BaseModel] | None) -> list[str]:
    """Fields of the model, or of any of a union's models, that holds what a location names."""
    _, holders = _walk(loc, model)
    return [name for holder in holders for name in holder.model_fields]


def models_within(annotation: Any) -> list[type[BaseModel]]:
    """Models that a value of this type may be, or be made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_within(part)]


def _walk(
    loc: Sequence[str | int], model: type[BaseModel] | None
) -> tuple[list[str], list[type[BaseModel]]]:
    """The parts that a caller would write, and the models that may hold the last of them."""
    path = list(loc[1:]) if loc and loc[0] in _PLACES else list(loc)
    candidates = holders = [] if model is None else [model]
    parts: list[str] = []
    member = False  # whether what comes is the name of a union's member, not of a field
    for place, part in enumerate(path):
        if isinstance(part, int):
            parts.append(str(part))
        elif member:
            member = False
        elif fitting := [one for one in candidates if part in one.model_fields]:
            parts.append(part)
            holders = candidates
            candidates = models_within(fitting[0].model_fields[part].annotation)
            member = len(candidates) > 1
        elif place == 0 or candidates:
            # A field that no model has, or a parameter that is in no body.
            parts.append(part)
            holders, candidates = candidates, []
    return parts, holders
