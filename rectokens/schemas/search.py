"""What a catalog search is asked and what it answers, for one user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Normalization = Literal["vocab", "level", "children"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

ShortfallReason = Literal["catalog_exhausted", "filters"]


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """One prompt and how to search the catalog from it.

    Attributes:
        prompt: token ids, ready for the model (the recipe's work is done); empty where
            ``prompt_embeds`` takes their place.
        beam_width: W, beams kept at every level.
        top_k: items wanted, at most ``beam_width``.
        temperature: 0 is beam search; above 0 stochastic beam search at that temperature.
        seed: of the noise, used only when temperature > 0; any 64-bit integer.
        normalization: over what a code's log-probability is taken.
        excluded_items: int64 (X,), item indices, sorted and unique, never returned.
        allowed_prefix: int32 (N + 1,), entry i = allowed items among the first i; None allows
            all. Several constraint sets are intersected before they get here.
        allowed_items: int64 (A,), item indices, sorted and unique, the only ones that may be
            returned; None allows all, an empty list none. The filters that a request has hold
            together: an item must pass every one of them.
        prompt_embeds: floating point (T, H), the prompt as input embeddings instead of token
            ids; None for a prompt of token ids.
    """

    prompt: tuple[int, ...]
    beam_width: int
    top_k: int
    temperature: float = 0.0
    seed: int = 0
    normalization: Normalization = "children"
    excluded_items: Tensor | None = None
    allowed_prefix: Tensor | None = None
    prompt_embeds: Tensor | None = None
    allowed_items: Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt_embeds is not None:
            if self.prompt:
                raise ValueError("prompt and prompt_embeds are both given; give one of them")
            embeds = self.prompt_embeds
            if embeds.ndim != 2 or not embeds.is_floating_point():
                raise ValueError(
                    f"prompt_embeds is {embeds.dtype} of shape {tuple(embeds.shape)}; "
                    "expected floating point (T, H)"
                )
        if self.prompt_length < 1:
            raise ValueError("prompt is empty; the model needs at least one token")
        if self.beam_width < 1:
            raise ValueError(f"beam_width is {self.beam_width}; it must be at least 1")
        if not 1 <= self.top_k <= self.beam_width:
            raise ValueError(
                f"top_k is {self.top_k}; allowed are 1 to beam_width {self.beam_width}"
            )
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be finite and >= 0")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization is {self.normalization!r}; allowed are {', '.join(NORMALIZATIONS)}"
            )

    @property
    def prompt_length(self) -> int:
        """T, tokens of the prompt, in whichever form it is."""
        return len(self.prompt) if self.prompt_embeds is None else self.prompt_embeds.shape[0]


class SearchHit(NamedTuple):
    """One item found.

    Attributes:
        item_index: row in the catalog.
        semantic_id: its codes, (L,).
        score: sum of the level scores: the log-probability of the semantic ID, no temperature.
        level_scores: log-probability of each code given those before it, (L,).
    """

    item_index: int
    semantic_id: tuple[int, ...]
    score: float
    level_scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why fewer items than ``top_k`` came back.

    ``filters``: exclusions and constraint sets leave fewer. ``catalog_exhausted``: the catalog
    itself has fewer. (An exact search with beam_width >= top_k knows no other reason.)
    """

    reason: ShortfallReason
    returned: int


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Items found for one request, best first.

    A tuple, or what is equal to it and made when it is looked at.

    Order: by score, or with temperature > 0 by the perturbed score; items that share a
    semantic ID follow one another in the catalog's order.
    """

    hits: Sequence[SearchHit]
    shortfall: Shortfall | None = None
