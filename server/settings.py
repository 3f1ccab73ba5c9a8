"""Every setting of the service, once: name, default, bounds and help.

Each is an environment variable (prefix ``RECTOKENS_``, groups joined by ``__``) and a flag of
``python -m server serve``. A flag wins over the environment. This module imports no torch, so
that ``--help`` and a refused setting are quick.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "RECTOKENS_"
ENV_NESTED_DELIMITER = "__"
# Another name of one setting, known from elsewhere; ours wins where both are set.
COMPRESSION_ALIAS = "SGP_EMBEDDING_COMPRESSION"
# Read by the tests and the demo, not by the service; never a mistake in its environment.
FOREIGN_VARIABLES = frozenset({"RECTOKENS_DATA_DIR", "RECTOKENS_TRACEBACK"})

MIN_ADMIN_KEY_CHARS = 16
_SECRETS = "admin.keys"

# The same as rectokens.schemas.search.Normalization, spelled out because that imports torch.
NormalizationName = Literal["vocab", "level", "children"]
LongPrompt = Literal["truncate", "reject"]


class SettingsError(ValueError):
    """A setting that is unknown or has a bad value; the message is all a user needs."""


_SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _split_commas(value: object) -> object:
    """What stands between commas, as a flag or a variable has it."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def require_admin_key(key: str, name: str) -> None:
    """Refuse a key that is easily guessed or cannot be sent.

    Raises:
        ValueError: too short, or not printable ASCII; does not tell the key.
    """
    if len(key) < MIN_ADMIN_KEY_CHARS or not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"{name} has {len(key)} characters; allowed are at least {MIN_ADMIN_KEY_CHARS} of "
            "printable ASCII, without blanks"
        )


class _Group(BaseModel):
    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, protected_namespaces=(), frozen=True
    )


class DefaultSettings(_Group):
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


class LimitSettings(_Group):
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


class BatchingSettings(_Group):
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


class EngineSettings(_Group):
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
    captured_rows: int = Field(
        default=4_096,
        ge=1,
        description="Most beams of a captured search, all requests together; bounds the memory "
        "of captured searches.",
    )

    @field_validator("captured_requests", "captured_beam_widths", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_commas(value)

    @field_validator("captured_requests", "captured_beam_widths")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or (value and not 1 <= value[0] <= value[-1] <= 8_192):
            raise ValueError(f"{value} must be distinct, ascending, and from 1 to 8192")
        return value


class HttpSettings(_Group):
    """Connections and browsers."""

    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins a browser may call from, separated by commas; none by default.",
    )
    keep_alive_s: int = Field(
        default=30, ge=1, description="Time an idle connection is kept open, in seconds."
    )

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_commas(value)


class ProxySettings(_Group):
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
        description="Memory that compressed embeddings of tokens seen may take, so that the next "
        "prompt finds them; where the whole vocabulary would take more, none are kept.",
    )

    @field_validator("embedding_bits")
    @classmethod
    def _known_bits(cls, value: int) -> int:
        if value not in (1, 2, 4, 8):
            raise ValueError("allowed are 1, 2, 4 and 8")
        return value


class StoreSettings(_Group):
    """The store of models, tokenizers, catalogs and releases."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="Its folder, or a URL that fsspec understands (s3://bucket/prefix).",
    )
    cache: Path | None = Field(
        default=None,
        description="Local folder for what is downloaded; needed where the store is a URL.",
    )
    poll_s: float = Field(
        default=1.0,
        gt=0,
        le=3_600,
        description="Time between two looks at which release is active, in seconds.",
    )
    keep_last: int = Field(
        default=5,
        ge=0,
        description="Catalogs and releases that jobs leave in the store, beside the active and "
        "the previous one.",
    )
    keep_younger_than_s: float = Field(
        default=3_600.0,
        ge=0,
        description="Age below which jobs leave every catalog and release, in seconds.",
    )


class JobSettings(_Group):
    """Jobs: where they are kept, and what one of them may take."""

    start_worker: bool = Field(
        default=True,
        description="Run jobs in a worker of this service; without it, start "
        "`python -m server worker`.",
    )
    keep_process_ready: bool = Field(
        default=True,
        description="Keep a process ready for the next job, past its imports (about two seconds of "
        "a core); it holds about 300 MiB while it waits.",
    )
    database: str | None = Field(
        default=None,
        min_length=1,
        description="URL of a Redis or PostgreSQL that keeps the jobs; unset is an SQLite file "
        "in the jobs' folder.",
    )
    namespace: str = Field(
        default="rectokens",
        pattern=r"^[A-Za-z0-9_]{1,64}$",
        description="Keeps apart the jobs of several stores in one database.",
    )
    folder: Path | None = Field(
        default=None,
        description="Local folder for uploads and work in progress; unset is .jobs in the store's "
        "folder or its cache.",
    )
    memory_limit_gib: float = Field(
        default=8.0, gt=0, description="Memory one job may take, in GiB; more and it fails."
    )
    threads: int = Field(default=2, ge=1, le=1_024, description="Threads one job computes with.")
    gpu_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the GPU's memory that a job may take; 0 keeps jobs on the CPU.",
    )
    batch_size: int = Field(
        default=8_192, ge=1, le=1_048_576, description="Embeddings encoded at a time."
    )
    time_limit_s: float = Field(
        default=43_200.0, gt=0, description="Time one job may take, in seconds."
    )
    cancel_grace_s: float = Field(
        default=10.0,
        ge=0,
        description="Time a cancelled job gets to stop by itself, in seconds.",
    )
    max_queued: int = Field(
        default=100, ge=1, description="Most jobs that wait; one over it is refused."
    )
    keep_finished: int = Field(default=200, ge=1, description="Finished jobs that are remembered.")
    max_source_rows: int = Field(
        default=100_000_000, ge=1, description="Most rows of a source; more and the job fails."
    )
    max_source_gib: float = Field(
        default=512.0,
        gt=0,
        description="Largest source, uncompressed, in GiB; more and the job fails.",
    )


class AdminSettings(_Group):
    """What operators may do over HTTP and by commands."""

    sources: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Folders that jobs may read, as name=folder, separated by commas.",
    )
    keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Keys of /admin, separated by commas, at least 16 characters each; without "
        "any, /admin is closed. Better a variable than a flag, which other users of the machine "
        "see.",
    )
    keys_file: Path | None = Field(
        default=None, description="File with such keys, one a line; read at the start."
    )
    open_on_loopback: bool = Field(
        default=False,
        description="Without keys, let callers of this machine in who come through no proxy.",
    )
    max_body_bytes: int = Field(
        default=16_777_216,
        ge=1_024,
        description="Largest body below /admin, uploads excepted, in bytes; more is a 413.",
    )
    max_upload_bytes: int = Field(
        default=8_589_934_592, ge=1_024, description="Largest upload, in bytes; more is a 413."
    )
    max_uploads_bytes: int = Field(
        default=68_719_476_736,
        ge=1_024,
        description="What uploads may take together, in bytes; one over it is refused.",
    )
    upload_timeout_s: float = Field(
        default=3_600.0, gt=0, description="Time a client has to send an upload, in seconds."
    )

    @field_validator("sources", "keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_commas(value)

    @field_validator("sources")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = set()
        for entry in value:
            name, separator, folder = entry.partition("=")
            if not separator or not folder or not _SOURCE_NAME.fullmatch(name):
                raise ValueError(
                    f"{entry!r} is not name=folder; a name has letters, digits, '-' and '_'"
                )
            if name in names or name == "uploads":
                raise ValueError(f"the name {name!r} is taken")
            names.add(name)
        return value

    @field_validator("keys")
    @classmethod
    def _long_enough(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for place, key in enumerate(value, start=1):
            require_admin_key(key.get_secret_value(), f"key {place}")
        return value

    @property
    def source_folders(self) -> dict[str, Path]:
        """The folders by name."""
        return {name: Path(folder) for name, _, folder in (e.partition("=") for e in self.sources)}


class GateSettings(_Group):
    """What a new release must show on replayed requests before it becomes active."""

    sample_requests: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Recent requests kept in memory to be replayed: item ids and numbers, never "
        "text; 0 keeps none.",
    )
    min_requests: int = Field(
        default=0, ge=0, description="Fewer compared requests block an activation."
    )
    min_overlap: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="A lower mean share of old items among the new ones blocks.",
    )
    max_shortfall: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="A larger share of requests that get fewer items than they ask for blocks.",
    )
    max_latency_ratio: float | None = Field(
        default=None, gt=0, description="A larger ratio of new to old median latency blocks."
    )


class Settings(BaseSettings):
    """All settings of the service.

    Build it with :func:`load_settings`, which also refuses unknown environment variables.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_NESTED_DELIMITER,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        frozen=True,
    )

    release: Path | None = Field(
        default=None,
        description="Release folder: names the model and the catalog. Instead of both.",
    )
    model: Path | None = Field(default=None, description="Model folder.")
    catalog: Path | None = Field(default=None, description="Catalog folder.")
    model_name: str = Field(
        default="rectokens",
        min_length=1,
        max_length=128,
        description="Name of the model in answers and in /v1/models.",
    )
    allow_mismatch: bool = Field(
        default=False,
        description="Serve a catalog whose tokenizer fingerprint is not the model's. Levels and "
        "codebook size must agree all the same.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto takes a GPU if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of the weights; auto is as saved on a GPU, float32 on a CPU.",
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads torch computes with; unset leaves torch's own choice.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; 0.0.0.0 is all of them.",
    )
    port: int = Field(
        default=8_000, ge=0, le=65_535, description="Port to listen on; 0 takes any free one."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line that is written."
    )
    drain_timeout_s: float = Field(
        default=30.0,
        ge=0,
        description="Time running requests get to finish after SIGTERM, in seconds.",
    )
    with_proxy: bool = Field(
        default=False, description="Also serve the prompt-embeds proxy, below /proxy."
    )
    defaults: DefaultSettings = DefaultSettings()
    limits: LimitSettings = LimitSettings()
    batching: BatchingSettings = BatchingSettings()
    engine: EngineSettings = EngineSettings()
    http: HttpSettings = HttpSettings()
    proxy: ProxySettings = ProxySettings()
    store: StoreSettings = StoreSettings()
    jobs: JobSettings = JobSettings()
    admin: AdminSettings = AdminSettings()
    gate: GateSettings = GateSettings()

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        for low, high in (
            ("defaults.top_k", "limits.max_top_k"),
            ("defaults.top_k", "defaults.beam_width"),
            ("defaults.beam_width", "limits.max_beam_width"),
            ("defaults.temperature", "limits.max_temperature"),
            ("defaults.timeout_ms", "limits.max_timeout_ms"),
            ("limits.max_top_k", "limits.max_beam_width"),
            # Otherwise the widest request that the limits allow could never be queued.
            ("limits.max_beam_width", "batching.max_queued_beam_rows"),
        ):
            if value_of(self, low) > value_of(self, high):
                raise ValueError(
                    f"{env_name(low)} is {value_of(self, low)}; "
                    f"it may be at most {env_name(high)}, {value_of(self, high)}"
                )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class SettingField:
    """One leaf of the settings tree.

    Attributes:
        path: dotted name, ``limits.max_top_k``.
        info: its pydantic field.
        default: its default value.
    """

    path: str
    info: FieldInfo
    default: Any

    @property
    def env(self) -> str:
        """Its environment variable."""
        return env_name(self.path)

    @property
    def flag(self) -> str:
        """Its command line flag."""
        return "--" + self.path.replace("_", "-")

    @property
    def group(self) -> str:
        """Name of its group, empty for a setting outside any."""
        return self.path.rpartition(".")[0]

    @property
    def help(self) -> str:
        """What it does."""
        return self.info.description or ""


def env_name(path: str) -> str:
    """Environment variable of a dotted setting name."""
    return ENV_PREFIX + path.replace(".", ENV_NESTED_DELIMITER).upper()


def value_of(settings: BaseModel, path: str) -> Any:
    """Value of a dotted setting name."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def setting_fields() -> Iterator[SettingField]:
    """All settings, in the order they are declared, groups last."""
    yield from _fields_of(Settings, "")


def group_help(group: str) -> str:
    """One line on a group of settings, empty for no group."""
    if not group:
        return ""
    return inspect.getdoc(Settings.model_fields[group].annotation) or ""


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from flags, then the environment, then the defaults.

    Args:
        flags: dotted setting name to value (a string as typed, or a bool); None values are
            flags that were not given.

    Raises:
        SettingsError: an unknown ``RECTOKENS_`` variable, or a bad value; the message names
            the setting, the value found and what is allowed.
    """
    _refuse_unknown_variables()
    nested: dict[str, Any] = {}
    for path, value in (flags or {}).items():
        if value is None:
            continue
        group, _, name = path.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    aliased = _apply_alias(nested)
    try:
        return Settings(**nested)
    except ValidationError as error:
        origin = f" (taken from {COMPRESSION_ALIAS})" if aliased else ""
        raise SettingsError(_explain(error) + origin) from None


def _apply_alias(nested: dict[str, Any]) -> bool:
    """Take the compression from its other name, where neither flag nor variable names it."""
    path = "proxy.embedding_compression"
    value = os.environ.get(COMPRESSION_ALIAS)
    own = any(name.upper() == env_name(path) for name in os.environ)
    proxy: dict[str, Any] = nested.get("proxy", {})
    if value is None or own or "embedding_compression" in proxy:
        return False
    nested["proxy"] = {**proxy, "embedding_compression": value}
    return True


def _fields_of(model: type[BaseModel], prefix: str) -> Iterator[SettingField]:
    groups: list[tuple[str, type[BaseModel]]] = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            groups.append((name, info.annotation))
        else:
            yield SettingField(prefix + name, info, info.get_default())
    for name, inner in groups:
        yield from _fields_of(inner, f"{prefix}{name}.")


def _refuse_unknown_variables() -> None:
    known = {field.env for field in setting_fields()}
    lines = []
    for name in sorted(os.environ):
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper in known | FOREIGN_VARIABLES:
            continue
        # Compared without the prefix, which would make everything look alike.
        names = [one.removeprefix(ENV_PREFIX) for one in sorted(known)]
        close = difflib.get_close_matches(upper.removeprefix(ENV_PREFIX), names, n=3, cutoff=0.5)
        near = [ENV_PREFIX + one for one in close]
        hint = f"did you mean {' or '.join(near)}?" if near else "see `serve --help` for all"
        lines.append(f"unknown setting {name}; {hint}")
    if lines:
        raise SettingsError("\n".join(lines))


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if not path:
            lines.append(message)
            continue
        flag = "--" + path.replace("_", "-")
        allowed = message[:1].lower() + message[1:]
        # What was typed for a key is nobody else's business.
        value = "is not accepted" if path.startswith(_SECRETS) else f"is {str(item['input'])!r}"
        lines.append(f"{env_name(path)} ({flag}) {value}: {allowed}")
    return "\n".join(lines)
