"""The job's side of an activation: have it tried, then see who serves it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server.rehearsal.board import RehearsalBoard
from server.rehearsal.types import GateOptions, RehearsalReport, RehearsalRequest, ServerState

_LOOK_S = 0.05
# A server looks for requests ten times a second, unless it loads something just now.
_CLAIM_TIMEOUT_S = 600.0
_ASK_AGAIN_S = 30.0
# How long the database may be away meanwhile.
_AWAY_S = 60.0
# No new sign of life for so long, measured here: the server is dead or hangs.
_SILENCE_S = 20.0


class ActivationRefusedError(Exception):
    """A release that was tried and must not become active; the message says why.

    Attributes:
        blocked: whether the gate's thresholds, and no fault, are the reason.
        report: of the server that tried it, if one did.
    """

    def __init__(
        self, message: str, *, blocked: bool, report: RehearsalReport | None = None
    ) -> None:
        super().__init__(message)
        self.blocked = blocked
        self.report = report


@dataclass(frozen=True)
class ActivationSteps:
    """What is done before and after the pointer of a store moves. Blocking.

    Attributes:
        board: shared with the serving processes.
        check_cancelled: called again and again while waiting; raises to end the wait.
        say: tells what is going on.
        clock: monotonic seconds.
        sleep: waits for seconds.
    """

    board: RehearsalBoard
    check_cancelled: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda message: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def rehearse(
        self, request_id: str, release: str, options: GateOptions | None
    ) -> RehearsalReport | None:
        """Have a serving process load a release and try it.

        Args:
            request_id: of this attempt, unlike any other.
            release: version.
            options: how to try it; None for the server's own settings.

        Returns:
            What came of it; None where nobody serves, or all serve this release already.

        Raises:
            ActivationRefusedError: it could not be loaded or did not pass; or a gate was asked for
                and nobody is there to try it.
        """
        servers = self.board.servers()
        if not servers:
            if options is not None and not options.skip:
                raise ActivationRefusedError(
                    "no serving process is there to replay requests; leave out gate to activate "
                    "without",
                    blocked=False,
                )
            self.say("no serving process is there to try the release")
            return None
        if all(state.release == release for state in servers):
            return None
        self.say(f"asking a serving process to try release {release}")
        request = RehearsalRequest(id=request_id, release=release, options=options or GateOptions())
        self.board.ask(request)
        try:
            report = self._wait_for_report(request)
        finally:
            with suppress(Exception):  # what nobody waits for is forgotten by itself
                self.board.close_request(request_id)
        if report is None:
            self.say("no serving process is left to try the release")
            return None
        self.say(f"{report.server}: {report.message}")
        if report.state != "passed":
            raise ActivationRefusedError(
                report.message, blocked=report.state == "blocked", report=report
            )
        return report

    def wait_until_served(self, release: str, timeout_s: float) -> list[dict[str, Any]]:
        """Wait until every serving process serves a release, or says that it cannot.

        Args:
            release: version, active in the store.
            timeout_s: after which those that have not said are listed as ``loading``.

        Returns:
            By server: ``server``, ``state`` (``serving``, ``failed`` or ``loading``), and
            ``message`` with ``failed``.
        """
        until = self.clock() + timeout_s
        while True:
            states = [_follows(state, release) for state in self.board.servers()]
            if all(one["state"] != "loading" for one in states) or self.clock() >= until:
                return states
            self.check_cancelled()
            self.sleep(_LOOK_S)

    def _wait_for_report(self, request: RehearsalRequest) -> RehearsalReport | None:
        asked_at = heard_at = answered_at = self.clock()
        until = asked_at + _CLAIM_TIMEOUT_S
        last_beat, is_away = -1, False
        while True:
            self.check_cancelled()
            try:
                if self.clock() - asked_at > _ASK_AGAIN_S:
                    asked_at = self.clock()
                    self.board.ask(request)
                report = self.board.report_of(request.id)
                if report is not None:
                    return report
                claimant = self.board.claimed_by(request.id)
                alive = {state.server: state for state in self.board.servers()}
            except Exception as error:
                # The database is away for a while, and nobody's signs of life are seen.
                if not is_away:
                    self.say(f"cannot see the report: {type(error).__name__}: {error}")
                is_away, heard_at = True, self.clock()
                if heard_at - answered_at > _AWAY_S:
                    raise
                self.sleep(_LOOK_S)
                continue
            is_away, answered_at = False, self.clock()
            if claimant is None:
                if not alive:
                    return None
                if self.clock() >= until:
                    raise ActivationRefusedError(
                        f"no serving process took the rehearsal within {_CLAIM_TIMEOUT_S:g} s",
                        blocked=False,
                    )
                heard_at = self.clock()
            else:
                beat = alive[claimant].beat if claimant in alive else last_beat
                if beat != last_beat:
                    last_beat, heard_at = beat, self.clock()
                elif self.clock() - heard_at > _SILENCE_S:
                    raise ActivationRefusedError(
                        f"server {claimant} gave no sign of life for {_SILENCE_S:g} s while it "
                        "tried the release",
                        blocked=False,
                    )
            self.sleep(_LOOK_S)


def _follows(state: ServerState, release: str) -> dict[str, Any]:
    if state.release == release:
        return {"server": state.server, "state": "serving"}
    if state.failed_release == release:
        return {"server": state.server, "state": "failed", "message": state.failure}
    return {"server": state.server, "state": "loading"}
