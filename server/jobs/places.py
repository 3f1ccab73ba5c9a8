"""Where things are, by the settings: the store, the job ledger, folders for work in progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.settings import Settings, SettingsError, env_name

if TYPE_CHECKING:
    from rectokens.artifacts.release_store import ReleaseStore
    from server.jobs.ledger import JobLedger
    from server.rehearsal.board import RehearsalBoard

# Below the store's folder, hidden from whoever lists it.
JOBS_FOLDER = ".jobs"
UPLOADS_ROOT = "uploads"


def open_store(settings: Settings) -> ReleaseStore:
    """The artifact store.

    Raises:
        SettingsError: none is named.
        ArtifactError: it cannot be opened.
    """
    from rectokens.artifacts.open_store import open_release_store

    return open_release_store(_store_path(settings), cache=settings.store.cache)


def require_store(settings: Settings) -> None:
    """Refuse a folder that is not there, which a mistyped name would begin.

    Raises:
        SettingsError: no store is named, or it is such a folder.
    """
    path = _store_path(settings)
    folder = path.removeprefix("file://")
    if "://" not in folder and not Path(folder).is_dir():
        raise SettingsError(
            f"store.path is {path!r}; there is no such folder (train-tokenizer and serve begin one)"
        )


def open_ledger(settings: Settings) -> JobLedger:
    """The job ledger.

    Raises:
        SettingsError: no store is named.
        BackendError: the database cannot be used.
    """
    from server.jobs.backend import open_backend
    from server.jobs.ledger import JobLedger

    jobs = settings.jobs
    return JobLedger(
        open_backend(jobs_database(settings), jobs.namespace),
        max_queued=jobs.max_queued,
        keep_finished=jobs.keep_finished,
    )


def jobs_database(settings: Settings) -> str | Path:
    """Where jobs are recorded: a URL, or the file of an SQLite database.

    Raises:
        SettingsError: no store is named.
    """
    return settings.jobs.database or jobs_folder(settings) / "jobs.sqlite3"


def open_board(settings: Settings) -> RehearsalBoard:
    """The board that jobs and serving processes share, in the same database.

    Raises:
        SettingsError: no store is named.
        BackendError: the database cannot be used.
    """
    from server.jobs.backend import open_tables
    from server.rehearsal.board import RehearsalBoard

    tables = open_tables(
        jobs_database(settings), settings.jobs.namespace, ("servers", "rehearsals", "answers")
    )
    servers, rehearsals, answers = tables.by_name.values()
    return RehearsalBoard(servers, rehearsals, answers, close=tables.close)


def jobs_folder(settings: Settings) -> Path:
    """Folder for the jobs' database, uploads and work in progress; on this host.

    Raises:
        SettingsError: no store is named.
    """
    if settings.jobs.folder is not None:
        return settings.jobs.folder
    store = _store_path(settings)
    if settings.store.cache is not None:
        return settings.store.cache / JOBS_FOLDER
    return Path(store.removeprefix("file://")) / JOBS_FOLDER


def uploads_folder(settings: Settings) -> Path:
    """Folder of uploaded sources; jobs know it as the root ``uploads``.

    Raises:
        SettingsError: no store is named.
    """
    return jobs_folder(settings) / UPLOADS_ROOT


def source_roots(settings: Settings) -> dict[str, Path]:
    """Folders that sources may lie in, by name."""
    return {**settings.admin.source_folders, UPLOADS_ROOT: uploads_folder(settings)}


def _store_path(settings: Settings) -> str:
    if settings.store.path is None:
        raise SettingsError(
            f"there is no artifact store to work on; give --store.path ({env_name('store.path')})"
        )
    return settings.store.path
