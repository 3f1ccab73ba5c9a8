"""What is asked before a release becomes active, beside whether its files are whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rectokens.artifacts.release import ReleaseArtifact


@dataclass(frozen=True, eq=False)
class ProposedActivation:
    """A release that is about to become active.

    Attributes:
        current: the active one, None for none.
        proposed: the one to take its place.
        options: of the request, None for the defaults.
        progress: to be told the share done (0 to 1) and what is going on; raises if the job is
            to stop.
    """

    current: ReleaseArtifact | None
    proposed: ReleaseArtifact
    options: Mapping[str, Any] | None
    progress: Callable[[float, str], None]


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
