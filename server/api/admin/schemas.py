"""Wire shapes of ``/admin`` that are not the parameters of a job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from server.api.schemas import StoreState, StrictRequest, StrictResponse
from server.jobs.params import Note, Version
from server.jobs.types import Job
from server.rehearsal.types import GateOptions

ItemIds = list[Annotated[str, StringConstraints(min_length=1, max_length=4_096)]]


class JobList(StrictResponse):
    """Jobs, latest first; without their logs."""

    jobs: list[Job]


class ActivateCatalogBody(StrictRequest):
    """How to activate a catalog."""

    model: Version | None = Field(
        default=None, description="Model to serve it with; default that of the active release."
    )
    expected_active: Version | None = Field(
        default=None, description="Only if this release is active; default: whatever is."
    )
    note: Note | None = Field(default=None, description="For the history of activations.")
    gate: GateOptions | None = Field(
        default=None, description="How to try it first; default: as the service is set."
    )


class ActivateReleaseBody(StrictRequest):
    """How to activate a release."""

    expected_active: Version | None = Field(
        default=None, description="Only if this release is active; default: whatever is."
    )
    note: Note | None = Field(default=None, description="For the history of activations.")
    gate: GateOptions | None = Field(
        default=None, description="How to try it first; default: as the service is set."
    )


class RollbackBody(StrictRequest):
    """How to go back."""

    expected_active: Version | None = Field(
        default=None, description="Only if this release is active; default: whatever is."
    )
    note: Note | None = Field(default=None, description="For the history of activations.")
    gate: GateOptions | None = Field(
        default=None, description="How to try it first; default: as the service is set."
    )


class PutConstraintSetBody(StrictRequest):
    """Which items are in the set: a list, or a predicate over metadata."""

    item_ids: ItemIds | None = None
    predicate: Annotated[str, StringConstraints(min_length=1, max_length=4_000)] | None = Field(
        default=None,
        description="SQL-like condition over metadata columns, worked out again whenever the "
        "catalog changes.",
        examples=["in_stock = true and region = 'EU'"],
    )
    activate: bool = Field(default=True, description="Serve it at once.")
    note: Note | None = None
    gate: GateOptions | None = None


class DrainBody(StrictRequest):
    """How long to wait."""

    timeout_ms: int | None = Field(
        default=None,
        ge=0,
        description="Milliseconds to wait for running requests; default `drain_timeout_s`.",
    )


class ServiceState(StrictResponse):
    """In which phase the service is."""

    phase: Literal["loading", "ready", "draining"]
    idle: bool = Field(description="No request is being answered.")


class ArtifactVersion(StrictResponse):
    """One version of the store."""

    version: str
    state: Literal["active", "previous", "available", "damaged"]
    created: str | None
    bytes: int
    tokenizer_fingerprint: str | None
    numbers: dict[str, Any] = Field(description="Counts and quality figures.")
    problem: str | None = Field(description="What is wrong with a damaged one.")


class CatalogVersion(ArtifactVersion):
    """A catalog."""

    fits_model: bool | None = Field(
        description="Whether its tokenizer is that of the model served; null before one is."
    )


class CatalogList(StrictResponse):
    """Catalogs of the store, latest first."""

    served: str | None = Field(description="What this process serves.")
    catalogs: list[CatalogVersion]


class ReleaseVersion(ArtifactVersion):
    """A model and a catalog that belong together."""

    model: str | None
    catalog: str | None


class ActivationRecord(StrictResponse):
    """A release became active."""

    sequence: int
    action: Literal["activate", "rollback"]
    release: str
    at: str
    note: str | None


class ReleaseList(StrictResponse):
    """Releases of the store, latest first, and which of them were active when."""

    served: str | None = Field(description="What this process serves.")
    store: StoreState | None = Field(
        description="What is active, what is being loaded, and why the active one is not served."
    )
    releases: list[ReleaseVersion]
    history: list[ActivationRecord] = Field(description="Latest first.")


class TokenizerVersion(ArtifactVersion):
    """A tokenizer, with its quality figures in ``numbers``."""

    fits_model: bool | None = Field(
        description="Whether it is the tokenizer of the model served; null before one is."
    )


class TokenizerList(StrictResponse):
    """Tokenizers of the store, latest first."""

    tokenizers: list[TokenizerVersion]


class TokenizerDetail(TokenizerVersion):
    """One tokenizer with its whole report."""

    report: dict[str, Any]
    fitted_on: dict[str, Any]


class ConstraintSetSummary(StrictResponse):
    """A constraint set of the catalog that is served."""

    name: str
    num_items: int
    predicate: str | None = Field(description="Its condition; null for a list of items.")


class ConstraintSetList(StrictResponse):
    """The constraint sets of the catalog that is served."""

    catalog_version: str
    constraint_sets: list[ConstraintSetSummary]


class ConstraintSetDetail(ConstraintSetSummary):
    """One constraint set with a part of its items."""

    catalog_version: str
    offset: int
    item_ids: list[str]


class Upload(StrictResponse):
    """A file that was sent, to be named as a source of a job."""

    root: Literal["uploads"]
    path: str = Field(description="Name it with `root` in the source of a job.")
    bytes: int
    sha256: str


class StoredFile(StrictResponse):
    """A file that was sent and is there."""

    root: Literal["uploads"]
    path: str
    bytes: int


class UploadList(StrictResponse):
    """Files that were sent, latest first."""

    uploads: list[StoredFile]
