"""The wire shapes of ``POST /v1/completions``: OpenAI's, with our fields beside."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from server.api.schemas import (
    MAX_SEED,
    ItemId,
    Json,
    ShortfallInfo,
    StrictRequest,
    StrictResponse,
    Timings,
)
from server.settings_serving import LongPrompt, NormalizationName

_EXAMPLE_REQUEST: Json = {
    "model": "rectokens",
    "prompt": "<item:B001><item:B042>",
    "n": 10,
    "max_tokens": 16,
    "exclude_items": ["B007"],
}

TokenIds = list[int]
# Parameters of OpenAI and vLLM that would change the result in ways a search for items does not
# know, and the values at which they change nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop": ([], ""),
    "suffix": ("",),
    "top_k": (-1, 0),
    "top_p": (1,),
}
Neutral = Annotated[Any, Field(description="Only values that change nothing are accepted.")]


class StreamOptions(StrictRequest):
    """OpenAI's options of a stream."""

    include_usage: bool = False


class CompletionRequest(StrictRequest):
    """Which items continue this prompt? Give ``prompt`` or ``prompt_embeds``, not both."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE_REQUEST]})

    model: str | None = Field(default=None, description="Name of the served model.")
    prompt: str | list[str] | TokenIds | list[TokenIds] | None = Field(
        default=None,
        description="Text, in which `<item:ID>` stands for an item of the catalog; the model's "
        "recipe makes a prompt of it. Or token ids, which are the whole prompt and end with the "
        "item start token. Or a list of either.",
    )
    prompt_embeds: str | list[str] | None = Field(
        default=None,
        description="Input embeddings of a whole prompt instead: base64 of `torch.save` of a "
        "tensor or of a TurboQuant payload. Or a list of them.",
    )
    n: int | None = Field(
        default=None, ge=1, description="Items wanted for each prompt, 1 if left out."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="At least the tokens of an item; more changes nothing."
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        description="0 is beam search. Above 0 (at least 0.001) the items are a sample without "
        "replacement.",
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Seed of the sample.")
    stream: bool | None = Field(default=None, description="Answer by server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Ignored.")
    best_of: int | None = Field(default=None, description="Only a value equal to `n`.")
    use_beam_search: bool | None = Field(
        default=None, description="Ignored: items are found by beam search in any case."
    )

    echo: Neutral = None
    frequency_penalty: Neutral = None
    ignore_eos: Neutral = None
    length_penalty: Neutral = None
    logit_bias: Neutral = None
    logprobs: Neutral = None
    min_p: Neutral = None
    min_tokens: Neutral = None
    presence_penalty: Neutral = None
    repetition_penalty: Neutral = None
    response_format: Neutral = None
    stop: Neutral = None
    suffix: Neutral = None
    top_k: Neutral = None
    top_p: Neutral = None

    beam_width: int | None = Field(default=None, ge=1, description="As in /v1/recommend.")
    exclude_items: list[ItemId] = Field(default=[], description="As in /v1/recommend.")
    allow_items: list[ItemId] | None = Field(default=None, description="As in /v1/recommend.")
    exclude_history: bool = Field(
        default=False, description="Keep the items that the prompt's text names out."
    )
    constraint_set: str | list[str] | None = Field(default=None, description="As in /v1/recommend.")
    long_prompt: LongPrompt | None = Field(
        default=None,
        description="As in /v1/recommend, for text. Token ids and embeddings are never cut.",
    )
    normalization: NormalizationName | None = Field(
        default=None, description="As in /v1/recommend."
    )
    timeout_ms: int | None = Field(default=None, ge=1, description="As in /v1/recommend.")

    @model_validator(mode="after")
    def _one_prompt(self) -> CompletionRequest:
        # OpenAI's client cannot leave prompt out; an empty one beside embeddings is none.
        if self.prompt_embeds is not None and self.prompt in ("", []):
            self.prompt = None
        if self.prompt is not None and self.prompt_embeds is not None:
            raise ValueError("both prompt and prompt_embeds are given; give one of them")
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("neither prompt nor prompt_embeds is given; give one of them")
        return self


class CompletionItem(StrictResponse):
    """The item of a choice."""

    item_id: str
    score: float = Field(description="Log-probability of the semantic ID, without temperature.")
    semantic_id: list[int]


class CompletionChoice(StrictResponse):
    """One item. ``index`` is n times the prompt's place in the request plus the item's."""

    index: int
    text: str = Field(description="The item's tokens.")
    logprobs: None = None
    finish_reason: Literal["stop"] = Field(description="An item is always complete.")
    item: CompletionItem


class PromptTokensDetails(StrictResponse):
    """What the prompt tokens were."""

    cached_tokens: int


class CompletionUsage(StrictResponse):
    """Tokens of all prompts and of all choices."""

    prompt_tokens: int
    cached_tokens: int = Field(description="As in /v1/recommend, all prompts together.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = Field(
        description="The same where OpenAI's clients look for it."
    )


class PromptReport(StrictResponse):
    """What there is to tell about one prompt."""

    shortfall: ShortfallInfo | None
    seed: int | None = Field(description="Seed of the sample; null at temperature 0.")
    truncated_items: int
    truncated_texts: int
    timings: Timings


class CompletionExtension(StrictResponse):
    """What OpenAI's shape has no place for."""

    model_version: str
    catalog_version: str
    prompts: list[PromptReport]


class CompletionResponse(StrictResponse):
    """Items as completions, best first, prompt by prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    rectokens: CompletionExtension
