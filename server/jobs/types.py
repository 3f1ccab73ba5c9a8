"""What a job is: kinds, states, errors, and the record that everybody sees."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Of the record: enough to see what went wrong, little enough to be read with every poll.
MAX_LOG_LINES = 100
MAX_LOG_LINE_CHARS = 500


class JobKind(StrEnum):
    """What a job does."""

    REINDEX = "reindex"
    UPDATE_ITEMS = "update_items"
    PUT_CONSTRAINT_SET = "put_constraint_set"
    DELETE_CONSTRAINT_SET = "delete_constraint_set"
    TRAIN_TOKENIZER = "train_tokenizer"
    ACTIVATE = "activate"
    ROLLBACK = "rollback"


class JobState(StrEnum):
    """Where in its life a job is.

    ``queued`` and ``running`` are passing; ``interrupted`` means that its process, or the one
    that watched it, died.
    """

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def finished(self) -> bool:
        """Whether nothing happens any more unless somebody restarts the job."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class JobErrorKind(StrEnum):
    """Why a job failed; ``type`` of its error."""

    INVALID_PARAMETERS = "invalid_parameters"
    INVALID_SOURCE = "invalid_source"
    ARTIFACT = "artifact"
    CONFLICT = "conflict"
    GATE = "gate"
    MEMORY_LIMIT = "memory_limit"
    TIME_LIMIT = "time_limit"
    DISK_FULL = "disk_full"
    INTERRUPTED = "interrupted"
    INTERNAL = "internal"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JobFault(_Record):
    """Why a job did not succeed."""

    type: JobErrorKind
    message: str = Field(description="Names the value found and the value allowed.")


class Job(_Record):
    """One job, as of the moment it was read."""

    id: str
    kind: JobKind
    state: JobState
    progress: float = Field(default=0.0, ge=0, le=1, description="Share of the work done.")
    message: str = Field(default="", description="What is going on, or how it ended.")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int = Field(default=1, ge=1, description="1, and 1 more for every restart.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="As submitted; long lists are given by their length."
    )
    result: dict[str, Any] | None = None
    error: JobFault | None = None
    log: tuple[str, ...] = Field(default=(), description="The last lines, oldest first.")
    idempotency_key: str | None = None
    cancel_requested: bool = False


class JobFailure(Exception):  # noqa: N818 (an outcome of a job, not a mistake of the program)
    """Raised inside a job: it ends as failed, for a reason whoever submitted it is told."""

    def __init__(self, kind: JobErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class JobCancelledError(Exception):
    """Raised inside a job that was asked to stop."""


class UnknownJobError(KeyError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job is {job_id[:64]!r}; there is no such job")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message in quotes


class InvalidJobError(ValueError):
    """A job cannot be submitted with these parameters.

    Attributes:
        param: dotted name of the parameter at fault, None for several or none.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class JobConflictError(ValueError):
    """The job is not in a state for this, or its idempotency key belongs to another request."""


class JobQueueFullError(RuntimeError):
    """Too many jobs wait."""


def now() -> datetime:
    """The time, UTC."""
    return datetime.now(UTC)
