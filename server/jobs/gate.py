"""What is asked before a release becomes active, beside whether its files are whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rectokens.artifacts.release import ReleaseArtifact

if TYPE_CHECKING:
    from server.jobs.context import JobReporter


@dataclass(frozen=True, eq=False)
class ProposedActivation:
    """A release that is about to become active.

    Attributes:
        current: the active one, None for none and for one that is damaged.
        proposed: the one to take its place.
        options: of the request, None for the defaults.
        reporter: of the job.
    """

    current: ReleaseArtifact | None
    proposed: ReleaseArtifact
    options: Mapping[str, Any] | None
    reporter: JobReporter


class Gate(Protocol):
    """Tries a proposed release."""

    def __call__(self, activation: ProposedActivation) -> Mapping[str, Any] | None:
        """Let it pass.

        Returns:
            A report for the job's result, JSON values; None if there was nothing to try.

        Raises:
            JobFailure: of kind ``gate``, with the figure and the threshold that block it.
        """
        ...
