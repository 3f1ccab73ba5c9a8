"""What a serving process and a job tell each other about an activation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_GATE_REQUESTS = 200


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class _Note(BaseModel):
    """Between processes that may be of two versions: what one does not know, it passes over."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class GateOptions(_Strict):
    """How a release is tried on requests before it is activated."""

    skip: bool = Field(
        default=False, description="Activate whatever the replay would find; nothing is replayed."
    )
    requests: list[dict[str, Any]] | None = Field(
        default=None,
        max_length=MAX_GATE_REQUESTS,
        description="Bodies of POST /v1/recommend to replay; default: a sample of recent requests, "
        "where `gate.sample_requests` keeps one.",
    )
    min_requests: int | None = Field(
        default=None, ge=0, description="Fewer replayed requests block. Default: the setting."
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
        description="A larger share of requests that get fewer items than they asked for blocks.",
    )
    max_latency_ratio: float | None = Field(
        default=None, gt=0, description="A larger ratio of new to old median latency blocks."
    )


class Latency(_Note):
    """Milliseconds from the queue to the answer, of replayed requests."""

    p50_ms: float
    p95_ms: float


class ReplayReport(_Note):
    """What replayed requests got from the new version, beside the old one.

    All figures are of the requests that both answered.
    """

    requests: int = Field(description="Replayed.")
    failed: int = Field(description="Not answered by the one or the other.")
    compared: int = Field(description="Answered by both.")
    mean_overlap: float | None = Field(description="Mean share of old items among the new ones.")
    lowest_overlap: float | None
    shortfall_old: float | None = Field(description="Share that got fewer items than asked for.")
    shortfall_new: float | None
    latency_old: Latency | None
    latency_new: Latency | None
    first_failure: str | None = Field(default=None, description="Why a request failed.")

    @property
    def latency_ratio(self) -> float | None:
        """New median over old."""
        if self.latency_old is None or self.latency_new is None or not self.latency_old.p50_ms:
            return None
        return self.latency_new.p50_ms / self.latency_old.p50_ms


class RehearsalRequest(_Note):
    """A job asks any serving process to load a release beside the one it serves, and to try it."""

    id: str
    release: str
    options: GateOptions = GateOptions()
    at_s: float = Field(default=0.0, description="Unix time when the job said last that it waits.")


class RehearsalReport(_Note):
    """What came of it."""

    server: str = Field(description="Which process tried it.")
    state: Literal["passed", "blocked", "failed"]
    message: str
    load_s: float | None = None
    replay: ReplayReport | None = None


class ServerState(_Note):
    """A sign of life of a serving process."""

    server: str
    beat: int = Field(description="Counts up while it lives.")
    at_s: float = Field(description="Unix time of the sign.")
    release: str | None = Field(description="The release it serves.")
    loading: str | None = Field(default=None, description="The release it is loading.")
    failed_release: str | None = Field(default=None, description="The active one, if it cannot.")
    failure: str | None = Field(default=None, description="Why it cannot serve that.")
    ends: bool = Field(default=False, description="It is shutting down.")
