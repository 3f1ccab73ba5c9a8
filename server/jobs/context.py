"""What a job function is given: the store, what it may use, and whom to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectokens.artifacts.release_store import ReleaseStore
from rectokens.artifacts.retention import RetentionPolicy
from rectokens.catalog.source_limits import SourceLimits
from server.jobs.gate import Gate
from server.jobs.types import JobCancelledError

if TYPE_CHECKING:
    from server.settings import Settings


@dataclass(frozen=True, eq=False)
class JobEnvironment:
    """What jobs work with.

    Attributes:
        store: of artifacts.
        roots: folders that sources may lie in, by name.
        limits: of sources.
        retention: what is kept of catalogs and releases.
        batch_size: embeddings encoded at a time.
        device: where to compute, ``cpu`` or ``cuda``.
        gate: tried before a release is activated, None for none.
        follow: called after that with the release; waits until it is served and tells by whom.
    """

    store: ReleaseStore
    roots: Mapping[str, Path]
    limits: SourceLimits
    retention: RetentionPolicy
    batch_size: int = 8192
    device: str = "cpu"
    gate: Gate | None = None
    follow: Callable[[str, JobReporter], list[dict[str, Any]]] | None = None


def environment_of(settings: Settings) -> JobEnvironment:
    """The environment that the settings describe.

    Raises:
        SettingsError: no store is named.
        ArtifactError: it cannot be opened.
        BackendError: the database of the jobs cannot be used.
    """
    from server.jobs.places import open_board, open_store, source_roots
    from server.jobs.rehearse import ServingProcesses

    jobs = settings.jobs
    serving = ServingProcesses(open_board(settings))
    return JobEnvironment(
        store=open_store(settings),
        roots=source_roots(settings),
        limits=SourceLimits(jobs.max_source_rows, int(jobs.max_source_gib * 2**30)),
        retention=RetentionPolicy(settings.store.keep_last, settings.store.keep_younger_than_s),
        batch_size=jobs.batch_size,
        device="cuda" if jobs.gpu_share else "cpu",
        gate=serving.try_release,
        follow=serving.follow,
    )


class JobReporter:
    """Told how far a job is, and asked whether to go on.

    Args:
        on_progress: given the share done (0 to 1) and what is going on.
        on_log: given lines for the log.
        cancelled: whether somebody asked the job to stop.
    """

    def __init__(
        self,
        on_progress: Callable[[float, str], None] = lambda share, message: None,
        on_log: Callable[[str], None] = lambda line: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._on_progress = on_progress
        self._on_log = on_log
        self._cancelled = cancelled
        self._low, self._high = 0.0, 1.0

    def progress(self, share: float, message: str) -> None:
        """Tell how far the present stage is, 0 to 1.

        Raises:
            JobCancelledError: the job is to stop.
        """
        self.check()
        share = min(max(share, 0.0), 1.0)
        self._on_progress(self._low + share * (self._high - self._low), message)

    def log(self, line: str) -> None:
        """Add a line to the log."""
        self._on_log(line)

    def check(self) -> None:
        """Stop here if the job is to stop.

        Raises:
            JobCancelledError: it is.
        """
        if self._cancelled():
            raise JobCancelledError

    @contextmanager
    def stage(self, low: float, high: float, message: str) -> Iterator[None]:
        """Within, progress from 0 to 1 counts from ``low`` to ``high`` of what is around it.

        Raises:
            JobCancelledError: the job is to stop.
        """
        outer = self._low, self._high
        span = outer[1] - outer[0]
        self._low, self._high = outer[0] + low * span, outer[0] + high * span
        try:
            self.progress(0.0, message)
            self.log(message)
            yield
        finally:
            self._low, self._high = outer
