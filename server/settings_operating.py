"""Settings of the store, of jobs and of who may operate them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from server.access.keys import MAX_REQUESTS_PER_MINUTE
from server.settings_base import SettingsGroup, can_be_sent, split_commas

MIN_ADMIN_KEY_CHARS = 16
_SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def require_admin_key(key: str, name: str) -> None:
    """Refuse a key that is easily guessed or cannot be sent.

    Raises:
        ValueError: too short, or not printable ASCII; does not tell the key.
    """
    if len(key) < MIN_ADMIN_KEY_CHARS or not can_be_sent(key):
        raise ValueError(
            f"{name} has {len(key)} characters; allowed are at least {MIN_ADMIN_KEY_CHARS} of "
            "printable ASCII, without blanks"
        )


class StoreSettings(SettingsGroup):
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


class JobSettings(SettingsGroup):
    """Jobs: where they are kept, and what one of them may take."""

    start_worker: bool = Field(
        default=True,
        description="Run jobs in a worker of this service; without it, start "
        "`python -m server worker`.",
    )
    keep_process_ready: bool = Field(
        default=True,
        description="Keep a process ready for the next job, a copy of one that is past its "
        "imports (about three seconds of a core, once); the two hold about 400 MiB.",
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


class AdminSettings(SettingsGroup):
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
        default=None,
        description="File of such keys, hashed, as `python -m server new-key` writes it; looked at "
        "again while the service runs.",
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
        return split_commas(value)

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


class AccessSettings(SettingsGroup):
    """Who may ask for recommendations. `/admin` has keys of its own."""

    keys_file: Path | None = Field(
        default=None,
        description="File of API keys, hashed, as `python -m server new-key` writes it; looked at "
        "again while the service runs. Unset lets everybody in who can reach the service.",
    )
    reload_s: float = Field(
        default=1.0,
        ge=0,
        le=3_600,
        description="Time between two looks at a file of keys, this one and that of /admin, in "
        "seconds.",
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=MAX_REQUESTS_PER_MINUTE,
        description="Requests a minute that one caller may make, unless its line in the file of "
        "keys names another number; more is a 429. Unset is no limit.",
    )
    burst_s: float = Field(
        default=10.0,
        gt=0,
        le=3_600,
        description="Requests that a caller may make at once after a rest: those of so much time, "
        "in seconds.",
    )


class GateSettings(SettingsGroup):
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
