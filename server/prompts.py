"""What the model reads: the prompt of a query's history, or the one that its caller made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rectokens.catalog.catalog import Catalog
from rectokens.prompt_embeds import (
    PromptEmbedsError,
    PromptEmbedsTooLargeError,
    load_prompt_embeds,
)
from rectokens.prompts.parts import BuiltPrompt, ItemPart, Part, PromptTooLongError, TextPart
from server.errors import ErrorKind, ServiceError, invalid
from server.queries import EmbedsPrompt, RecommendQuery, TokenPrompt
from server.release import Release

_UNKNOWN_SHOWN = 5

Known = NDArray[np.bool_]


def unknown_items(query: RecommendQuery, is_known: Known, catalog: Catalog) -> tuple[str, ...]:
    """Items of the history that the catalog does not know, each once.

    Raises:
        ServiceError: there are some and the query wants none, or there is nothing else.
    """
    if is_known.all():
        return ()
    ids = query.item_ids
    unknown = dict.fromkeys(itertools.compress(ids, (~is_known).tolist()))
    if query.refuse_unknown_items:
        raise unknown_items_error(query.parts_param, catalog, list(unknown))
    if len(is_known) == len(query.parts) and not is_known.any():
        raise ServiceError(
            ErrorKind.NO_KNOWN_ITEMS,
            f"none of the {len(unknown)} items is in catalog {catalog.version}, "
            f"first of them {next(iter(unknown))!r}; give at least one that is, or text",
            param=query.parts_param,
        )
    return tuple(unknown)


def unknown_items_error(param: str, catalog: Catalog, unknown: Sequence[str]) -> ServiceError:
    """The error for items that a catalog does not have, where every one of them must be known."""
    shown = ", ".join(map(repr, unknown[:_UNKNOWN_SHOWN]))
    more = f" and {len(unknown) - _UNKNOWN_SHOWN} more" if len(unknown) > _UNKNOWN_SHOWN else ""
    return invalid(param, f"items that catalog {catalog.version} does not have: {shown}{more}")


def history_prompt(
    query: RecommendQuery, is_known: Known, codes: NDArray[np.int64], release: Release
) -> BuiltPrompt:
    """The prompt of a history of items and texts.

    Args:
        query: whose history it is.
        is_known: for each of its items, whether the catalog knows it.
        codes: semantic IDs (n, L) of those that are known.
        release: whose model reads it.

    Raises:
        ServiceError: text for a model that takes none, or a prompt that is too long.
    """
    max_tokens = release.engine.max_prompt_tokens if query.cut_long_prompt else None
    try:
        if len(is_known) == len(query.parts):
            prompt = release.prompts.build_items(codes, max_tokens=max_tokens)
        else:
            parts = _known_parts(query.parts, is_known, codes)
            prompt = release.prompts.build(parts, max_tokens=max_tokens)
    except PromptTooLongError as error:
        raise ServiceError(
            ErrorKind.PROMPT_TOO_LONG, str(error), param=query.parts_param
        ) from error
    except ValueError as error:
        raise invalid(query.parts_param, str(error)) from error
    _check_length(len(prompt.token_ids), query.parts_param, release)
    return prompt


def _known_parts(
    given: Sequence[str | TextPart], is_known: Known, codes: NDArray[np.int64]
) -> list[Part]:
    """Parts for the prompt builder, without the unknown items."""
    found, rows = iter(is_known.tolist()), iter(codes.tolist())
    parts: list[Part] = []
    for part in given:
        if isinstance(part, TextPart):
            parts.append(part)
        elif next(found):
            parts.append(ItemPart(tuple(next(rows))))
    return parts


def _check_length(tokens: int, param: str, release: Release) -> None:
    limit = release.engine.max_prompt_tokens
    if tokens > limit:
        raise ServiceError(
            ErrorKind.PROMPT_TOO_LONG,
            f"the prompt has {tokens} tokens; the model takes at most {limit}",
            param=param,
        )


def tokens_prompt(prompt: TokenPrompt, param: str, release: Release) -> BuiltPrompt:
    """A prompt that came as token ids, checked.

    Raises:
        ServiceError: too many, ids that the model does not have, or no item start token at the end.
    """
    ids = prompt.token_ids
    _check_length(len(ids), param, release)
    vocab_size = release.engine.vocab_size
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise invalid(param, f"token id {bad} is not one of the model's 0 to {vocab_size - 1}")
    start = release.spec.item_tokens.start_token_id
    if ids[-1] != start:
        raise invalid(
            param,
            f"the prompt ends with token id {ids[-1]}; an item follows only token id {start}, "
            "the item start token",
        )
    return BuiltPrompt(ids, items_used=0, items_truncated=0)


def embeds_of(prompt: EmbedsPrompt, param: str, release: Release) -> Tensor:
    """A prompt that came as input embeddings, checked: (T, H).

    Raises:
        ServiceError: too large, or not what it claims to be.
    """
    try:
        return load_prompt_embeds(
            prompt.data,
            hidden_size=release.engine.hidden_size,
            max_tokens=min(prompt.max_tokens, release.engine.max_prompt_tokens),
            max_bytes=prompt.max_bytes,
        )
    except PromptEmbedsTooLargeError as error:
        raise ServiceError(ErrorKind.PROMPT_TOO_LONG, str(error), param=param) from error
    except PromptEmbedsError as error:
        raise invalid(param, str(error)) from error
