"""The gate that jobs use: a serving process loads the release and replays requests on it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from server.jobs.context import JobReporter
from server.jobs.gate import ProposedActivation
from server.jobs.types import JobErrorKind, JobFailure
from server.rehearsal.activation import ActivationRefusedError, ActivationSteps
from server.rehearsal.board import RehearsalBoard
from server.rehearsal.types import GateOptions

# Servers look every second or so; what takes them longer than this is loading a model.
_SERVED_TIMEOUT_S = 120.0


class ServingProcesses:
    """The processes that serve from a store, as a job sees them.

    Args:
        board: shared with them.
        served_timeout_s: how long to wait for them to follow an activation.
    """

    def __init__(self, board: RehearsalBoard, served_timeout_s: float = _SERVED_TIMEOUT_S) -> None:
        self._board = board
        self._served_timeout_s = served_timeout_s

    def try_release(self, activation: ProposedActivation) -> Mapping[str, Any] | None:
        """See :class:`~server.jobs.gate.Gate`."""
        try:
            report = self._steps(activation.reporter).rehearse(
                secrets.token_hex(8),
                activation.proposed.manifest.version,
                _options(activation.options),
            )
        except ActivationRefusedError as error:
            raise JobFailure(
                JobErrorKind.GATE,
                f"release {activation.proposed.manifest.version} was not activated: {error}",
            ) from error
        return None if report is None else report.model_dump(mode="json")

    def follow(self, release: str, reporter: JobReporter) -> list[dict[str, Any]]:
        """Wait until every serving process serves a release, or says that it cannot."""
        return self._steps(reporter).wait_until_served(release, self._served_timeout_s)

    def _steps(self, reporter: JobReporter) -> ActivationSteps:
        return ActivationSteps(self._board, check_cancelled=reporter.check, say=reporter.log)


def _options(options: Mapping[str, Any] | None) -> GateOptions | None:
    if options is None:
        return None
    try:
        return GateOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["gate", *(str(part) for part in first["loc"])])
        raise JobFailure(JobErrorKind.INVALID_PARAMETERS, f"{where}: {first['msg']}") from error
