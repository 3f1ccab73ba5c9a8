"""The commands that change a store: reindex, activate, rollback, train-tokenizer, jobs, worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer

from server.flags import USAGE_ERROR, fail, job_fields, setting_flags, settings_or_exit
from server.settings import SettingsError

if TYPE_CHECKING:
    from server.jobs.types import JobKind

T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")]
NoteOption = Annotated[str | None, typer.Option(help="For the history of activations.")]
ExpectedOption = Annotated[
    str | None, typer.Option(help="Only if this release is active; default: whatever is.")
]

SkipGateOption = Annotated[
    bool, typer.Option("--skip-gate", help="Replay no requests on it before it is served.")
]


def add_job_commands(app: typer.Typer) -> None:
    """Register the commands."""
    with_flags = setting_flags(job_fields())
    app.command()(with_flags(reindex))
    app.command()(with_flags(activate))
    app.command()(with_flags(rollback))
    app.command("train-tokenizer")(with_flags(train_tokenizer))
    app.command()(with_flags(jobs))
    app.command()(with_flags(worker))


def reindex(
    flags: dict[str, Any],
    source: Annotated[
        Path, typer.Option(help="Embeddings: .parquet, .npy, or a folder of .parquet files.")
    ],
    ids: Annotated[
        Path | None,
        typer.Option(help="Item ids, row for row; needed for .npy, else in the same file."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Parquet column of the embeddings, if there are several.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of the ids; default item_id, or the only one.")
    ] = None,
    prior_column: Annotated[
        str | None, typer.Option(help="Column that ranks items of equal codes.")
    ] = None,
    metadata_columns: Annotated[
        list[str] | None,
        typer.Option(help="Columns to return with items; commas or repeated; '*' = all."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer version; default that of the active catalog.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model version; default that of the active release.")
    ] = None,
    collisions: Annotated[
        Literal["share", "extra_level"] | None,
        typer.Option(help="What becomes of items with equal codes; default as before."),
    ] = None,
    drop_constraint_sets: Annotated[
        bool, typer.Option(help="Do not carry over the active catalog's constraint sets.")
    ] = False,
    activate: Annotated[bool, typer.Option(help="Make the new release the active one.")] = False,
    skip_gate: SkipGateOption = False,
    note: NoteOption = None,
    as_json: Json = False,
) -> None:
    """Make a new catalog of all items of a source, and a release with the same model.

    Prints the catalog version. Servers on the store follow an activation by themselves.

    Exit code: 0, 1 if it failed, 2 for options that are not allowed, 130 or 143 after a signal.
    """
    settings = settings_or_exit(flags)

    def run() -> int:
        from server.jobs.commands import located, run_command
        from server.jobs.types import JobKind

        files = [source] if ids is None else [source, ids]
        extended, root, paths = located(settings, *files)
        names = [n.strip() for part in metadata_columns or () for n in part.split(",")]
        params = {
            "source": {
                "root": root,
                "path": paths[0],
                "ids": None if ids is None else paths[1],
                "column": column,
                "id_column": id_column,
                "prior_column": prior_column,
                "metadata_columns": [name for name in names if name],
            },
            "tokenizer": tokenizer,
            "model": model,
            "collisions": collisions,
            "constraint_sets": "drop" if drop_constraint_sets else "keep",
            "activate": activate,
            "gate": _gate(skip_gate),
            "note": note,
        }
        return run_command(extended, JobKind.REINDEX, params, printed="catalog", as_json=as_json)

    _guarded(run)


def activate(
    flags: dict[str, Any],
    release: Annotated[str | None, typer.Option(help="Release version to activate.")] = None,
    catalog: Annotated[
        str | None, typer.Option(help="Catalog version, instead of a release.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model version for --catalog; default that of the active release."),
    ] = None,
    expected_active: ExpectedOption = None,
    skip_gate: SkipGateOption = False,
    note: NoteOption = None,
    as_json: Json = False,
) -> None:
    """Make a release the active one, or a catalog with a model.

    Every file is verified first. Prints the release version.

    Exit code: 0, 1 if it failed, 2 for options that are not allowed, 130 or 143 after a signal.
    """
    params = {
        "release": release,
        "catalog": catalog,
        "model": model,
        "expected_active": expected_active,
        "gate": _gate(skip_gate),
        "note": note,
    }
    _run(flags, "activate", params, "release", as_json)


def rollback(
    flags: dict[str, Any],
    expected_active: ExpectedOption = None,
    skip_gate: SkipGateOption = False,
    note: NoteOption = None,
    as_json: Json = False,
) -> None:
    """Go back to the release that was active before; two in a row go back two.

    Prints the release version.

    Exit code: 0, 1 if it failed, 2 for options that are not allowed, 130 or 143 after a signal.
    """
    params = {"expected_active": expected_active, "gate": _gate(skip_gate), "note": note}
    _run(flags, "rollback", params, "release", as_json)


def train_tokenizer(
    flags: dict[str, Any],
    source: Annotated[
        Path, typer.Option(help="Embeddings: .parquet, .npy, or a folder of .parquet files.")
    ],
    column: Annotated[
        str | None, typer.Option(help="Parquet column of the embeddings, if there are several.")
    ] = None,
    kind: Annotated[
        Literal["rq-kmeans", "rqvae"], typer.Option(help="Kind of tokenizer.")
    ] = "rq-kmeans",
    num_levels: Annotated[int, typer.Option(help="Codes of a semantic ID.")] = 3,
    codebook_size: Annotated[int, typer.Option(help="Codes to choose from at each level.")] = 256,
    epochs: Annotated[int | None, typer.Option(help="Passes; default depends on kind.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 42,
    style: Annotated[
        Literal["kmeans", "balanced", "separating"] | None,
        typer.Option(help="rq-kmeans: how codebooks are fitted."),
    ] = None,
    latent_dim: Annotated[int | None, typer.Option(help="rqvae: width that is quantized.")] = None,
    hidden_dim: Annotated[int | None, typer.Option(help="rqvae: width of inner layers.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="rqvae: of Adam.")] = None,
    train_batch_size: Annotated[int | None, typer.Option(help="rqvae: rows of a step.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a tokenizer on a source and put it into the store, with a report of its quality.

    Prints the tokenizer version.

    Exit code: 0, 1 if it failed, 2 for options that are not allowed, 130 or 143 after a signal.
    """
    settings = settings_or_exit(flags)

    def run() -> int:
        from server.jobs.commands import located, run_command
        from server.jobs.types import JobKind

        extended, root, paths = located(settings, source)
        params = {
            "source": {"root": root, "path": paths[0], "column": column},
            "kind": kind,
            "num_levels": num_levels,
            "codebook_size": codebook_size,
            "epochs": epochs,
            "seed": seed,
            "style": style,
            "latent_dim": latent_dim,
            "hidden_dim": hidden_dim,
            "learning_rate": learning_rate,
            "train_batch_size": train_batch_size,
        }
        return run_command(
            extended, JobKind.TRAIN_TOKENIZER, params, printed="tokenizer", as_json=as_json
        )

    _guarded(run)


def jobs(
    flags: dict[str, Any],
    job_id: Annotated[str | None, typer.Argument(help="One job; all of them if left out.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop the job.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Queue it again, if it did not succeed.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until it has ended.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs in the list.")] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, or show, stop, restart or follow one.

    Exit code: 0, 1 if that cannot be done or a job that is followed does not succeed, 2 for
    options that are not allowed.
    """
    settings = settings_or_exit(flags)
    if job_id is None and (cancel or restart or follow):
        fail("name the job", USAGE_ERROR)

    def run() -> int:
        from server.jobs.commands import list_jobs, one_job

        if job_id is None:
            return list_jobs(settings, limit=limit, as_json=as_json)
        return one_job(
            settings, job_id, cancel=cancel, restart=restart, follow=follow, as_json=as_json
        )

    _guarded(run)


def worker(flags: dict[str, Any]) -> None:
    """Run queued jobs until a signal; what runs then is put back into the queue.

    A service starts one by itself, unless --jobs.no-start-worker is given.

    Exit code: 0 after SIGTERM or SIGINT, 1 if the store or the jobs' database cannot be used, 2
    for a setting that is unknown or not allowed.
    """
    settings = settings_or_exit(flags)

    def run() -> int:
        from server.jobs.worker import run_worker

        return run_worker(settings)

    _guarded(run)


def _gate(skip: bool) -> dict[str, Any] | None:
    """Options of the gate, None for those of the service."""
    return {"skip": True} if skip else None


def _run(
    flags: dict[str, Any], kind: str, params: dict[str, Any], printed: str, as_json: bool
) -> None:
    settings = settings_or_exit(flags)

    def run() -> int:
        from server.jobs.commands import run_command
        from server.jobs.types import JobKind

        job_kind: JobKind = JobKind(kind)
        return run_command(settings, job_kind, params, printed=printed, as_json=as_json)

    _guarded(run)


def _guarded(run: Callable[[], int]) -> NoReturn:
    """End with the exit code, or with one message for what a user can mend."""
    from rectokens.artifacts.errors import ArtifactError
    from server.jobs.backend import BackendError
    from server.jobs.types import InvalidJobError, JobConflictError, UnknownJobError

    try:
        code = run()
    except (SettingsError, InvalidJobError) as error:
        fail(str(error), USAGE_ERROR)
    except (ArtifactError, BackendError, JobConflictError, UnknownJobError, OSError) as error:
        fail(str(error), 1)
    raise typer.Exit(code)
