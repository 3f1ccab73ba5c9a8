"""Parameters of every kind of job: strict models, checked when a job is submitted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from server.jobs.types import InvalidJobError, JobKind

# A version is checked before it ever becomes part of a path; see ``ArtifactStore.path``.
Version = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
ItemId = Annotated[str, StringConstraints(min_length=1, max_length=4_096)]
RelativePath = Annotated[str, StringConstraints(min_length=1, max_length=1_024)]
Note = Annotated[str, StringConstraints(min_length=1, max_length=1_000)]

# The folder of a file that is named on the command line and lies in no registered one.
COMMAND_ROOT = "command-line"

_MOST_SHOWN = 20
# Of a value of metadata: lists and objects in one another.
_MAX_DEPTH = 32


class Params(BaseModel):
    """Base of all parameters."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=False,
    )


class EmbeddingSourceParams(Params):
    """A file of embeddings below a registered folder."""

    root: Name = Field(description="Name of a registered folder (admin.sources).")
    path: RelativePath = Field(
        description="File below it: .parquet, .npy, or a folder of .parquet files."
    )
    column: Name | None = Field(
        default=None, description="Parquet column of the embeddings, if there are several."
    )


class ItemSourceParams(EmbeddingSourceParams):
    """Embeddings with the ids of their items and what else is known of these."""

    ids: RelativePath | None = Field(
        default=None,
        description="File with the ids, row for row: .txt, .csv, .jsonl or .parquet. Needed for "
        ".npy; by default the Parquet file of the embeddings.",
    )
    id_column: Name | None = Field(
        default=None, description="Column of the ids; default item_id, or the only one."
    )
    prior_column: Name | None = Field(
        default=None, description="Column that ranks items of equal codes."
    )
    metadata_columns: list[Name] = Field(
        default=[],
        max_length=1_000,
        description="Columns to return with items and for predicates; ['*'] takes all others.",
    )


class GatedParams(Params):
    """What jobs that may change the active release have in common."""

    note: Note | None = Field(default=None, description="For the history of activations.")
    gate: dict[str, Any] | None = Field(
        default=None, description="Options of the activation gate; null for its defaults."
    )


class ReindexParams(GatedParams):
    """A whole catalog from a source."""

    source: ItemSourceParams
    tokenizer: Version | None = Field(
        default=None, description="Tokenizer to encode with; default that of the active catalog."
    )
    model: Version | None = Field(
        default=None, description="Model to release it with; default that of the active release."
    )
    collisions: Literal["share", "extra_level"] | None = Field(
        default=None, description="Default: as the active catalog, or share."
    )
    constraint_sets: Literal["keep", "drop"] = Field(
        default="keep",
        description="Whether the active catalog's sets are carried over: lists keep the items "
        "that are still there, predicates are evaluated again.",
    )
    activate: bool = False


class ItemUpsert(Params):
    """One item to add or change; what is left out stays as it is."""

    item_id: ItemId
    embedding: list[float] | None = Field(default=None, max_length=65_536)
    codes: list[int] | None = Field(default=None, max_length=64)
    prior: float | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("metadata")
    @classmethod
    def _can_be_kept(cls, metadata: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, value in (metadata or {}).items():
            _check_value(name, value)
        return metadata

    @model_validator(mode="after")
    def _one_way(self) -> ItemUpsert:
        if self.embedding is not None and self.codes is not None:
            raise ValueError(f"item {self.item_id!r} has an embedding and codes; give one of them")
        return self


class UpdateItemsParams(GatedParams):
    """Items to add, change and delete, without encoding the rest again."""

    upserts: list[ItemUpsert] = []
    deletes: list[ItemId] = []
    unknown_deletes: Literal["error", "ignore"] = "error"
    activate: bool = True

    @model_validator(mode="after")
    def _something(self) -> UpdateItemsParams:
        if not self.upserts and not self.deletes:
            raise ValueError("there is nothing to do: upserts and deletes are both empty")
        return self


class PutConstraintSetParams(GatedParams):
    """A constraint set to add or replace: a list of items, or a predicate over metadata."""

    name: Name
    item_ids: list[ItemId] | None = None
    predicate: Annotated[str, StringConstraints(min_length=1, max_length=4_000)] | None = None
    activate: bool = True

    @model_validator(mode="after")
    def _one_definition(self) -> PutConstraintSetParams:
        if (self.item_ids is None) == (self.predicate is None):
            raise ValueError("give one of item_ids and predicate, not both or neither")
        return self


class DeleteConstraintSetParams(GatedParams):
    """A constraint set to remove."""

    name: Name
    activate: bool = True


class TrainTokenizerParams(Params):
    """A tokenizer to fit on embeddings, and to measure on them."""

    source: EmbeddingSourceParams
    kind: Literal["rq-kmeans", "rqvae"] = "rq-kmeans"
    num_levels: int = Field(default=3, ge=1, le=64)
    codebook_size: int = Field(default=256, ge=1, le=65_536)
    epochs: int | None = Field(default=None, ge=1, le=100_000)
    seed: int = Field(default=42, ge=0, le=2**62)
    style: Literal["kmeans", "balanced", "separating"] | None = Field(
        default=None, description="rq-kmeans only: how codebooks are fitted."
    )
    latent_dim: int | None = Field(default=None, ge=1, le=65_536, description="rqvae only.")
    hidden_dim: int | None = Field(default=None, ge=1, le=65_536, description="rqvae only.")
    learning_rate: float | None = Field(default=None, gt=0, description="rqvae only.")
    train_batch_size: int | None = Field(
        default=None, ge=1, le=1_048_576, description="rqvae only."
    )

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> TrainTokenizerParams:
        others = (
            ("latent_dim", "hidden_dim", "learning_rate", "train_batch_size")
            if self.kind == "rq-kmeans"
            else ("style",)
        )
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} does not apply to kind {self.kind!r}")
        return self


class ActivateParams(GatedParams):
    """A release to activate, or a catalog with a model."""

    release: Version | None = None
    catalog: Version | None = None
    model: Version | None = Field(
        default=None, description="With catalog; default that of the active release."
    )
    expected_active: Version | None = Field(
        default=None, description="Only if this release is active; default: whatever is."
    )

    @model_validator(mode="after")
    def _one_target(self) -> ActivateParams:
        if (self.release is None) == (self.catalog is None):
            raise ValueError("give one of release and catalog, not both or neither")
        if self.release is not None and self.model is not None:
            raise ValueError("a release names its model; leave out model")
        return self


class RollbackParams(GatedParams):
    """Back to the release that was active before."""

    expected_active: Version | None = Field(
        default=None, description="Only if this release is active; default: whatever is."
    )


PARAMS: Mapping[JobKind, type[Params]] = {
    JobKind.REINDEX: ReindexParams,
    JobKind.UPDATE_ITEMS: UpdateItemsParams,
    JobKind.PUT_CONSTRAINT_SET: PutConstraintSetParams,
    JobKind.DELETE_CONSTRAINT_SET: DeleteConstraintSetParams,
    JobKind.TRAIN_TOKENIZER: TrainTokenizerParams,
    JobKind.ACTIVATE: ActivateParams,
    JobKind.ROLLBACK: RollbackParams,
}


def checked_params(kind: JobKind, params: Mapping[str, Any] | Params) -> Params:
    """The parameters of a kind of job.

    Raises:
        InvalidJobError: naming the parameter, the value found and what is allowed.
    """
    model = PARAMS[kind]
    if isinstance(params, model):
        return params
    content = params.model_dump() if isinstance(params, Params) else params
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InvalidJobError(*_explain(error)) from None


def shown(params: Params) -> dict[str, Any]:
    """Parameters as a job record holds them: what was given, long lists by their length."""
    return {
        name: _shortened(value) for name, value in params.model_dump(exclude_unset=True).items()
    }


def _shortened(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _MOST_SHOWN:
        return f"{len(value)} entries"
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return [one.get("item_id", "...") for one in value]
    return value


def _check_value(name: str, value: Any) -> None:
    """Refuse what no column could keep, and JSON could not say again."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        if any(isinstance(one, float) and not math.isfinite(one) for one in level):
            raise ValueError(f"{name[:80]!r} has a number that is not finite")
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError(f"{name[:80]!r} is nested deeper than {_MAX_DEPTH}")


def _explain(error: ValidationError) -> tuple[str, str | None]:
    problems = error.errors(include_url=False)
    first = problems[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    message = first["msg"].removeprefix("Value error, ")
    if param is not None:
        value = repr(first["input"])
        value = value if len(value) <= 100 else value[:100] + "..."
        message = f"{param} is {value}: {message[:1].lower() + message[1:]}"
        if first["type"] == "missing":
            message = f"{param} is missing"
        elif first["type"] == "extra_forbidden":
            message = f"{param} is not known"
    more = len(problems) - 1
    return message + (f" (and {more} more)" if more else ""), param
