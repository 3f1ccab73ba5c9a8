"""Every setting of the service, once: name, default, bounds and help.

Each is an environment variable (prefix ``RECTOKENS_``, groups joined by ``__``) and a flag of
``python -m server serve``. A flag wins over the environment. This module imports no torch, so
that ``--help`` and a refused setting are quick.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.settings_operating import (
    AccessSettings,
    AdminSettings,
    GateSettings,
    JobSettings,
    StoreSettings,
)
from server.settings_serving import (
    COMPRESSION_ALIAS,
    BatchingSettings,
    DefaultSettings,
    EngineSettings,
    HttpSettings,
    LimitSettings,
    ProxySettings,
)

ENV_PREFIX = "RECTOKENS_"
ENV_NESTED_DELIMITER = "__"
# Read by the tests and the demo, not by the service; never a mistake in its environment.
FOREIGN_VARIABLES = frozenset({"RECTOKENS_DATA_DIR", "RECTOKENS_TRACEBACK"})

_SECRETS = ("admin.keys", "proxy.upstream_key")


class SettingsError(ValueError):
    """A setting that is unknown or has a bad value; the message is all a user needs."""


def _same_file(one: Path | None, other: Path | None) -> bool:
    """Whether two settings name one file, however they spell it."""
    return one is not None and other is not None and one.resolve() == other.resolve()


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
    tracing: bool = Field(
        default=False,
        description="Send OpenTelemetry traces by OTLP over HTTP; needs the extra `otel`. Where to "
        "and how many, OpenTelemetry's own variables tell: OTEL_EXPORTER_OTLP_ENDPOINT, "
        "OTEL_TRACES_SAMPLER and so on.",
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
    access: AccessSettings = AccessSettings()
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
        access = self.access
        if access.keys_file is None and access.requests_per_minute is not None:
            raise ValueError(
                f"{env_name('access.requests_per_minute')} is {access.requests_per_minute}, but "
                f"there are no callers to tell apart; set {env_name('access.keys_file')}"
            )
        if _same_file(access.keys_file, self.admin.keys_file):
            raise ValueError(
                f"{env_name('access.keys_file')} and {env_name('admin.keys_file')} are both "
                f"{access.keys_file}; callers would be operators"
            )
        if self.proxy.upstream_key is not None and self.proxy.forward_authorization:
            raise ValueError(
                f"{env_name('proxy.upstream_key')} and {env_name('proxy.forward_authorization')} "
                "are both given; the upstream gets one key"
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
