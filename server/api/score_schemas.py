"""The wire shapes of ``POST /v1/score``."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from server.api.schemas import (
    ONE_OF_HISTORY_AND_INPUT,
    InputPart,
    ItemId,
    StrictRequest,
    StrictResponse,
    Timings,
    Usage,
    require_one_of_history_and_input,
)
from server.settings_serving import LongPrompt, NormalizationName

_EXAMPLE_REQUEST: dict[str, Any] = {"history": ["B001", "B042"], "items": ["B123", "B007", "nope"]}
_EXAMPLE_RESPONSE: dict[str, Any] = {
    "id": "score-7f9c1f0e5b6d4f43",
    "model": "rectokens",
    "model_version": "3f0c9a1b2c3d4e5f",
    "catalog_version": "a41be09c7d2f8e16",
    "items": [
        {
            "item_id": "B123",
            "score": -2.31,
            "semantic_id": [17, 203, 5],
            "level_scores": [-0.6, -1.5, -0.21],
        },
        {
            "item_id": "B007",
            "score": -9.07,
            "semantic_id": [4, 18, 77],
            "level_scores": [-3.2, -3.8, -2.07],
        },
        {"item_id": "nope", "score": None, "semantic_id": None, "level_scores": None},
    ],
    "unscored_items": ["nope"],
    "unknown_items": [],
    "usage": {
        "prompt_tokens": 9,
        "cached_tokens": 0,
        "history_items": 2,
        "truncated_items": 0,
        "truncated_texts": 0,
    },
    "timings": {"queue_ms": 0.1, "prefill_ms": 4.2, "decode_ms": 6.1, "total_ms": 10.8},
}


class ScoreRequest(StrictRequest):
    """How likely are these items next? Give ``history`` or ``input``, not both."""

    model_config = ConfigDict(
        json_schema_extra={**ONE_OF_HISTORY_AND_INPUT, "examples": [_EXAMPLE_REQUEST]}
    )

    history: list[ItemId] | None = Field(default=None, description="As in /v1/recommend.")
    input: list[InputPart] | None = Field(default=None, description="As in /v1/recommend.")
    items: list[ItemId] = Field(
        min_length=1, description="Item ids to score. One given twice is answered twice."
    )
    normalization: NormalizationName | None = Field(
        default=None, description="As in /v1/recommend."
    )
    long_prompt: LongPrompt | None = Field(default=None, description="As in /v1/recommend.")
    timeout_ms: int | None = Field(default=None, ge=1, description="As in /v1/recommend.")

    @model_validator(mode="after")
    def _one_of_history_and_input(self) -> ScoreRequest:
        require_one_of_history_and_input(self.history, self.input)
        return self


class ScoredItem(StrictResponse):
    """One item; nothing but its id where the catalog does not know it."""

    item_id: str
    score: float | None = Field(
        description="Log-probability of the semantic ID, as /v1/recommend tells it; null for an "
        "item that the catalog does not know, or that the model gives no probability at all."
    )
    semantic_id: list[int] | None
    level_scores: list[float] | None = Field(
        description="Log-probability of each code given those before it."
    )


class ScoreResponse(StrictResponse):
    """A score for each item, in the order of the request."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE_RESPONSE]})

    id: str
    model: str
    model_version: str
    catalog_version: str
    items: list[ScoredItem]
    unscored_items: list[str] = Field(description="Items whose score is null, each once.")
    unknown_items: list[str] = Field(
        description="History items that the catalog does not know, each once."
    )
    usage: Usage
    timings: Timings
