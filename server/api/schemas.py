"""The wire shapes of the HTTP API. Bounds that are settings are checked in ``limits.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from server.settings_serving import LongPrompt, NormalizationName

Json = dict[str, Any]
Include = Literal["semantic_id", "metadata", "level_scores"]

# A seed is any non-negative signed 64-bit integer.
MAX_SEED = 2**63 - 1
# Below this the perturbed scores overflow; 0 says what such a caller means.
MIN_TEMPERATURE = 1e-3

_EXAMPLE_REQUEST: Json = {
    "history": ["B001", "B042"],
    "top_k": 10,
    "beam_width": 50,
    "exclude_items": ["B007"],
    "temperature": 0.5,
    "seed": 7,
    "include": ["metadata"],
}
_EXAMPLE_RESPONSE: Json = {
    "id": "rec-7f9c1f0e5b6d4f43",
    "model": "rectokens",
    "model_version": "3f0c9a1b2c3d4e5f",
    "catalog_version": "a41be09c7d2f8e16",
    "items": [
        {
            "item_id": "B123",
            "score": -2.31,
            "semantic_id": [17, 203, 5],
            "metadata": {"title": "Matte lipstick"},
        }
    ],
    "shortfall": {"reason": "filters", "returned": 1},
    "unknown_items": ["B042"],
    "seed": 7,
    "usage": {
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "history_items": 1,
        "truncated_items": 0,
        "truncated_texts": 0,
    },
    "timings": {"queue_ms": 0.1, "prefill_ms": 4.2, "decode_ms": 9.8, "total_ms": 14.6},
}

# Exactly one of the two; null counts as left out.
ONE_OF_HISTORY_AND_INPUT: Json = {
    "oneOf": [
        {
            "required": ["history"],
            "properties": {"history": {"type": "array"}, "input": {"type": "null"}},
        },
        {
            "required": ["input"],
            "properties": {"input": {"type": "array"}, "history": {"type": "null"}},
        },
    ]
}


class StrictRequest(BaseModel):
    """A request body: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StrictResponse(BaseModel):
    """A response body: nothing that is not documented."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ItemInput(StrictRequest):
    """An item of the user's history."""

    item: str = Field(min_length=1, description="Item id.")


class TextInput(StrictRequest):
    """Words about the user, for models that take text."""

    text: str = Field(min_length=1, description="Free text.")


def _input_kind(value: Any) -> str:
    if isinstance(value, TextInput) or (isinstance(value, dict) and "text" in value):
        return "text"
    return "item"


InputPart = Annotated[
    Annotated[ItemInput, Tag("item")] | Annotated[TextInput, Tag("text")],
    Discriminator(_input_kind),
]
ItemId = Annotated[str, Field(min_length=1)]


def require_one_of_history_and_input(history: object, given: object) -> None:
    """Refuse both and neither; None is what was left out.

    Raises:
        ValueError: with what to do instead.
    """
    if history is not None and given is not None:
        raise ValueError("both history and input are given; give one of them")
    if history is None and given is None:
        raise ValueError(
            "neither history nor input is given; give one of them "
            "(an empty list asks for the model's start prompt)"
        )


class RecommendRequest(StrictRequest):
    """What next for this user? Give ``history`` or ``input``, not both.

    An empty list asks for what the model recommends to a user it knows nothing about.
    """

    model_config = ConfigDict(
        json_schema_extra={**ONE_OF_HISTORY_AND_INPUT, "examples": [_EXAMPLE_REQUEST]}
    )

    history: list[ItemId] | None = Field(
        default=None,
        description="Item ids, oldest first. Ids the catalog does not know are skipped and listed "
        "in `unknown_items`.",
    )
    input: list[InputPart] | None = Field(
        default=None, description="Items and texts, oldest first, for models that take text."
    )
    top_k: int | None = Field(default=None, ge=1, description="Items wanted; at most `beam_width`.")
    beam_width: int | None = Field(
        default=None,
        ge=1,
        description="Beams kept: wider finds better items and costs more. Left out, it is the "
        "server's default, or `top_k` where that is more.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        description="0 is beam search. Above 0 (at least 0.001) is stochastic beam search: the "
        "items are a sample without replacement.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the sample; the server draws one if left out, and tells.",
    )
    exclude_history: bool | None = Field(
        default=None, description="Keep the history's items out of the answer."
    )
    exclude_items: list[ItemId] = Field(
        default=[], description="Item ids to keep out. Ids the catalog does not know are ignored."
    )
    allow_items: list[ItemId] | None = Field(
        default=None,
        description="Only these items are returned. Ids the catalog does not know are ignored; "
        "an empty list allows nothing. Holds together with the other filters.",
    )
    constraint_set: str | list[str] | None = Field(
        default=None,
        description="Name of a constraint set of the catalog; only its items are returned. "
        "Several names mean items that are in all of them.",
    )
    normalization: NormalizationName | None = Field(
        default=None,
        description="Over what a code's log-probability is taken: `vocab` (the whole vocabulary), "
        "`level` (the level's codes) or `children` (the codes that lead to an item; the only "
        "child of a node therefore costs nothing).",
    )
    include: list[Include] = Field(
        default=[],
        description="More to tell about each item. `semantic_id` is always there; asking for it "
        "changes nothing.",
    )
    long_prompt: LongPrompt | None = Field(
        default=None,
        description="What becomes of a history whose prompt is longer than the model takes: "
        "`truncate` leaves its oldest items out, `reject` answers with a 422.",
    )
    timeout_ms: int | None = Field(
        default=None, ge=1, description="Milliseconds after which the answer is no longer wanted."
    )

    @model_validator(mode="after")
    def _one_of_history_and_input(self) -> RecommendRequest:
        require_one_of_history_and_input(self.history, self.input)
        return self


class RecommendedItem(StrictResponse):
    """One item. ``metadata`` and ``level_scores`` are there if asked for with ``include``."""

    item_id: str
    score: float = Field(description="Log-probability of the semantic ID, without temperature.")
    semantic_id: list[int]
    metadata: dict[str, Any] | None = Field(
        default=None, description="The catalog's columns for the item; null where it carries none."
    )
    level_scores: list[float] | None = Field(
        default=None, description="Log-probability of each code given those before it."
    )


class ShortfallInfo(StrictResponse):
    """Why fewer than ``top_k`` items came back."""

    reason: Literal["catalog_exhausted", "filters"]
    returned: int


class Usage(StrictResponse):
    """What the request cost."""

    prompt_tokens: int
    cached_tokens: int = Field(
        description="Tokens of the prompt's beginning that an earlier prompt had paid for."
    )
    history_items: int = Field(description="Known items that made it into the prompt.")
    truncated_items: int = Field(description="Known items left out, the oldest.")
    truncated_texts: int = Field(description="Texts left out or cut short.")


class Timings(StrictResponse):
    """Where the time went, in milliseconds."""

    queue_ms: float = Field(description="Waiting for the engine.")
    prefill_ms: float = Field(description="The batch's prompts.")
    decode_ms: float = Field(description="The batch's beam steps.")
    total_ms: float = Field(description="From the request's arrival to its answer.")


class RecommendResponse(StrictResponse):
    """Items, best first, and which model and catalog chose them."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE_RESPONSE]})

    id: str
    model: str
    model_version: str
    catalog_version: str
    items: list[RecommendedItem]
    shortfall: ShortfallInfo | None
    unknown_items: list[str] = Field(
        description="History items that the catalog does not know, each once."
    )
    seed: int | None = Field(description="Seed of the sample; null at temperature 0.")
    usage: Usage
    timings: Timings


class HealthResponse(StrictResponse):
    """The process is alive and so is its engine thread."""

    status: Literal["ok"]


class StoreFailure(StrictResponse):
    """Why the active release of the store is not the one that is served."""

    release: str | None = Field(description="Null if the store itself cannot be read.")
    message: str
    at: str = Field(description="Of the last attempt, UTC.")
    attempts: int


class StoreState(StrictResponse):
    """How the service stands to the store that it follows."""

    active_release: str | None = Field(description="What is active in the store.")
    activated_at: str | None = Field(description="Since when, UTC.")
    loading: str | None = Field(description="The release being loaded beside the one served.")
    failure: StoreFailure | None


class ReadyResponse(StrictResponse):
    """Requests are being answered, by these versions."""

    status: Literal["ready"]
    model: str
    model_version: str
    catalog_version: str
    tokenizer_fingerprint: str
    num_items: int
    release_version: str | None = Field(description="Null for a model and a catalog named singly.")
    active_s: float | None = Field(description="Seconds since this process serves it.")
    catalog_age_s: float | None = Field(description="Seconds since the catalog was made.")
    store: StoreState | None = Field(description="Null where no store is followed.")


class ModelInfo(StrictResponse):
    """One model that is served, in the OpenAI shape with our fields beside."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the model artifact was written, in Unix seconds.")
    owned_by: str
    model_version: str
    catalog_version: str
    tokenizer_fingerprint: str
    num_items: int
    num_levels: int
    codebook_size: int
    constraint_sets: list[str]
    max_prompt_tokens: int


class ModelList(StrictResponse):
    """What is served."""

    object: Literal["list"]
    data: list[ModelInfo]


class ErrorDetail(StrictResponse):
    """What went wrong."""

    message: str = Field(description="For people: the value found and the value allowed.")
    type: str = Field(description="Broad class of the error.")
    param: str | None = Field(description="The field at fault, dotted, if there is one.")
    code: str = Field(description="Precise kind of the error.")


class ErrorResponse(StrictResponse):
    """The shape of every error on every route."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "top_k is 2000; at most 1000",
                        "type": "invalid_request_error",
                        "param": "top_k",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )

    error: ErrorDetail
