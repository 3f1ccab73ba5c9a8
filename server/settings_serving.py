"""Settings of requests, of the engine, of HTTP and of the proxy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from server.settings_base import SettingsGroup, can_be_sent, split_commas

# Another name of one setting, known from elsewhere; ours wins where both are set.
COMPRESSION_ALIAS = "SGP_EMBEDDING_COMPRESSION"

# The same as rectokens.schemas.search.Normalization, spelled out because that imports torch.
NormalizationName = Literal["vocab", "level", "children"]
LongPrompt = Literal["truncate", "reject"]


class DefaultSettings(SettingsGroup):
    """What a request gets for a field it leaves out."""

    top_k: int = Field(default=10, ge=1, description="Items returned.")
    beam_width: int = Field(
        default=50,
        ge=1,
        description="Beams kept; a request that leaves it out gets at least its top_k.",
    )
    temperature: float = Field(
        default=0.0, ge=0, description="0 is beam search; above 0 stochastic beam search."
    )
    normalization: NormalizationName = Field(
        default="children",
        description="Over what a code's log-probability is taken.",
    )
    exclude_history: bool = Field(
        default=True, description="Whether items of the history are kept out of the answer."
    )
    long_prompt: LongPrompt = Field(
        default="truncate",
        description="What becomes of a history whose prompt is longer than the model takes: "
        "truncate leaves its oldest items out, in blocks; reject answers with a 422.",
    )
    timeout_ms: int = Field(
        default=10_000,
        ge=1,
        description="Time a request may take, queueing included, in milliseconds.",
    )


class LimitSettings(SettingsGroup):
    """The most a request may ask for; over a limit it is refused at once."""

    max_top_k: int = Field(default=1_000, ge=1, description="Largest top_k.")
    max_beam_width: int = Field(default=5_000, ge=1, description="Largest beam_width.")
    max_temperature: float = Field(default=10.0, gt=0, description="Largest temperature.")
    max_timeout_ms: int = Field(
        default=60_000, ge=1, description="Largest timeout_ms, in milliseconds."
    )
    max_history_items: int = Field(
        default=2_000,
        ge=1,
        description="Most entries of history, and of input (items and texts together).",
    )
    max_text_chars: int = Field(
        default=20_000,
        ge=1,
        description="Most characters of text in one request, all texts together.",
    )
    max_exclude_items: int = Field(
        default=10_000, ge=0, description="Most entries of exclude_items."
    )
    max_allow_items: int = Field(default=10_000, ge=0, description="Most entries of allow_items.")
    max_score_items: int = Field(
        default=1_000,
        ge=1,
        description="Most items that one request may have scored; max_beam_width, if less.",
    )
    max_constraint_sets: int = Field(
        default=8, ge=1, description="Most constraint sets one request may intersect."
    )
    max_item_id_chars: int = Field(default=512, ge=1, description="Longest item id, in characters.")
    max_body_bytes: int = Field(
        default=1_048_576, ge=1_024, description="Largest request body, in bytes; more is a 413."
    )
    max_completion_body_bytes: int = Field(
        default=33_554_432,
        ge=1_024,
        description="Largest body of /v1/completions, in bytes; prompt embeddings are large.",
    )
    max_prompts: int = Field(
        default=16, ge=1, description="Most prompts of one completion request."
    )
    max_embeds_tokens: int = Field(
        default=8_192, ge=1, description="Most tokens of one prompt given as embeddings."
    )
    max_bulk_requests: int = Field(
        default=1_000, ge=1, description="Most requests of one /v1/recommend/batch."
    )
    max_bulk_body_bytes: int = Field(
        default=4_194_304,
        ge=1_024,
        description="Largest body of /v1/recommend/batch, in bytes; more is a 413.",
    )
    bulk_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Time one /v1/recommend/batch may take, in seconds; what is left then fails.",
    )
    body_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Time a client has to send its body, in seconds; more is a 408.",
    )


class BatchingSettings(SettingsGroup):
    """How requests queue and share a forward pass."""

    max_requests: int = Field(default=32, ge=1, description="Most requests in one batch.")
    max_beam_rows: int = Field(
        default=8_192,
        ge=1,
        description="Most beam rows in one batch of several, padding to the widest included.",
    )
    max_prompt_tokens: int = Field(
        default=65_536,
        ge=1,
        description="Most prompt tokens in one batch of several, padding to the longest included.",
    )
    max_queued_beam_rows: int = Field(
        default=32_768, ge=1, description="Most beam rows waiting; a request over it is a 429."
    )
    max_queued_requests: int = Field(
        default=2_048, ge=1, description="Most requests waiting; one over it is a 429."
    )
    max_queued_embeds: int = Field(
        default=64,
        ge=1,
        description="Most prompts given as embeddings that are held at once, waiting or running; "
        "one over it is a 429.",
    )
    max_bulk_in_flight: int = Field(
        default=64,
        ge=1,
        description="Most requests of all /v1/recommend/batch together that wait or run at once.",
    )
    max_bulk_streams: int = Field(
        default=8, ge=1, description="Most /v1/recommend/batch answered at once; more is a 429."
    )
    prepare_threads: int = Field(
        default=2, ge=1, le=64, description="Threads that turn long requests into prompts."
    )


class EngineSettings(SettingsGroup):
    """How the model is run."""

    prefix_cache: bool = Field(
        default=True,
        description="Whether keys and values of prompts are kept, so that a prompt that begins "
        "as an earlier one is computed from there on only.",
    )
    kv_memory_mib: int | None = Field(
        default=None,
        ge=1,
        description="Memory for keys and values of prompts, in MiB; unset is 512 on a CPU, on a "
        "GPU 40 % of what is free once the weights are loaded.",
    )
    kv_page_tokens: int = Field(
        default=16,
        ge=16,
        multiple_of=16,
        description="Tokens in a page of keys and values; prompts are kept by whole pages. On a "
        "GPU at least 64.",
    )
    capture: bool = Field(
        default=True,
        description="Whether searches are captured in CUDA graphs when the first catalog is "
        "warmed up. No effect on a CPU.",
    )
    captured_requests: Annotated[tuple[int, ...], NoDecode] = Field(
        default=(1, 2, 4, 8, 16, 32),
        description="Numbers of requests that searches are captured for, ascending, separated by "
        "commas. A batch between two of them leaves places empty.",
    )
    captured_beam_widths: Annotated[tuple[int, ...], NoDecode] = Field(
        default=(64, 256, 1_024),
        description="Beam widths that searches are captured for, ascending, separated by commas. "
        "A width between two of them costs as much as the larger; one above all of them is "
        "searched uncaptured.",
    )
    fp8: bool = Field(
        default=False,
        description="Whether the large products of the model's layers are computed in FP8: faster, "
        "and scores differ a little. Needs a GPU of compute capability 8.9 or higher and a "
        "bfloat16 model; anything else refuses to start.",
    )
    captured_rows: int = Field(
        default=4_096,
        ge=1,
        description="Most beams of a captured search, all requests together; bounds the memory "
        "of captured searches.",
    )

    @field_validator("captured_requests", "captured_beam_widths", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return split_commas(value)

    @field_validator("captured_requests", "captured_beam_widths")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or (value and not 1 <= value[0] <= value[-1] <= 8_192):
            raise ValueError(f"{value} must be distinct, ascending, and from 1 to 8192")
        return value


class HttpSettings(SettingsGroup):
    """Connections and browsers."""

    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins a browser may call from, separated by commas; none by default.",
    )
    keep_alive_s: int = Field(
        default=30,
        ge=1,
        description="Time a connection is kept open while nothing is sent, in seconds.",
    )
    head_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Time a client has to send a request's headers, in seconds; more is a 408.",
    )
    write_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Time for which a client may read nothing of its answer, in seconds; then it "
        "is cut off.",
    )
    max_connections: int = Field(
        default=8_192,
        ge=1,
        description="Most connections open at once. Over it the one idle longest is closed, and "
        "where none is idle, the new one refused. Fewer where the limit of open files says so.",
    )

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return split_commas(value)


class ProxySettings(SettingsGroup):
    """The prompt-embeds proxy. `python -m server proxy` takes its flags without `proxy.` too."""

    upstream: str | None = Field(
        default=None,
        description="Base URL of the server that takes prompt_embeds, without /v1.",
    )
    embedding_compression: Literal["none", "turboquant"] = Field(
        default="turboquant",
        description="How embeddings travel: compressed, or plain for an upstream that cannot "
        f"decode them. {COMPRESSION_ALIAS} is another name of the variable.",
    )
    embedding_bits: int = Field(
        default=4, ge=1, le=8, description="Bits an element when compressed: 1, 2, 4 or 8."
    )
    accept_prompt_embeds: bool = Field(
        default=False, description="Pass on prompt_embeds that a client made itself."
    )
    forward_authorization: bool = Field(
        default=False, description="Pass on the client's Authorization header."
    )
    upstream_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Sent to the upstream as Authorization: Bearer KEY, whoever asks. Better a "
        "variable than a flag, which other users of the machine see.",
    )
    connect_timeout_s: float = Field(
        default=5.0, gt=0, description="Time to connect to the upstream, in seconds."
    )
    read_timeout_s: float = Field(
        default=120.0, gt=0, description="Longest silence of the upstream, in seconds."
    )
    max_in_flight: int = Field(
        default=1_024, ge=1, description="Most requests in flight; one over it is a 429."
    )
    max_prompts: int = Field(default=32, ge=1, description="Most prompts of one request.")
    max_prompt_tokens: int = Field(
        default=32_768, ge=1, description="Most tokens of all prompts of one request together."
    )
    max_body_bytes: int = Field(
        default=4_194_304, ge=1_024, description="Largest request body, in bytes; more is a 413."
    )
    max_response_bytes: int = Field(
        default=33_554_432,
        ge=1_024,
        description="Largest answer of the upstream, or event of its stream, in bytes.",
    )
    chat_max_tokens: int = Field(
        default=1_024,
        ge=1,
        description="max_tokens of a chat request that names none; upstreams would stop a "
        "completion after 16.",
    )
    encode_threads: int = Field(
        default=2, ge=1, le=64, description="Threads that turn prompts into embeddings."
    )
    encoded_table_mib: int = Field(
        default=512,
        ge=0,
        description="Memory that compressed embeddings of tokens may take, so that a prompt finds "
        "them; where the whole vocabulary would take more, none are kept.",
    )
    encode_ahead: bool = Field(
        default=True,
        description="Whether kept rows are encoded after the start, in the background, rather "
        "than by the first prompt that has their token; reads the whole embedding table once.",
    )

    @field_validator("embedding_bits")
    @classmethod
    def _known_bits(cls, value: int) -> int:
        if value not in (1, 2, 4, 8):
            raise ValueError("allowed are 1, 2, 4 and 8")
        return value

    @field_validator("upstream_key")
    @classmethod
    def _can_be_sent(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not can_be_sent(value.get_secret_value()):
            raise ValueError("allowed is printable ASCII, without blanks")
        return value
