"""The job's side: who is asked, what is waited for, and how long."""

from __future__ import annotations

import pytest

from server.rehearsal.activation import ActivationRefusedError, ActivationSteps
from server.rehearsal.types import GateOptions, RehearsalReport, RehearsalRequest


@pytest.fixture
def steps(board, clock):
    said = []
    made = ActivationSteps(board, say=said.append, clock=clock, sleep=clock.sleep)
    object.__setattr__(made, "said", said)
    return made


def report(state, message="so"):
    return RehearsalReport(server="a", state=state, message=message)


def test_where_nobody_serves_nobody_tries(steps):
    assert steps.rehearse("1", "new", None) is None
    assert steps.rehearse("1", "new", GateOptions(skip=True)) is None
    with pytest.raises(ActivationRefusedError, match="no serving process") as refused:
        steps.rehearse("1", "new", GateOptions())
    assert not refused.value.blocked


def test_what_all_serve_already_is_not_tried(steps, alive):
    alive("a", "new")
    assert steps.rehearse("1", "new", None) is None


@pytest.mark.parametrize("state", ["passed", "blocked", "failed"])
def test_the_report_of_whoever_takes_it_decides(steps, board, alive, clock, state):
    alive("a", "old")
    alive("b", "old")

    def take():
        (request,) = board.open_requests("b")
        assert request.release == "new"
        assert board.claim(request.id, "a")
        assert not board.claim(request.id, "b")
        assert board.open_requests("b") == []
        assert board.open_requests("a") == [request]
        clock.after(3, lambda: board.report(request.id, report(state)))

    clock.after(1, take)
    for second in range(1, 6):
        clock.after(second, lambda second=second: alive("a", "old", beat=second))
    if state == "passed":
        assert steps.rehearse("1", "new", None).message == "so"
    else:
        with pytest.raises(ActivationRefusedError, match="so") as refused:
            steps.rehearse("1", "new", None)
        assert refused.value.blocked == (state == "blocked")
    assert board._requests.values() == board._answers.values() == []


def test_a_server_that_dies_while_it_tries_is_not_waited_for(steps, board, alive, clock):
    alive("a", "old")
    clock.after(1, lambda: board.claim("1", "a"))
    begun = clock.now
    with pytest.raises(ActivationRefusedError, match="no sign of life"):
        steps.rehearse("1", "new", None)
    assert clock.now - begun < 60
    assert not board.is_open("1")
    board.report("1", report("passed"))  # too late, and nobody keeps it
    assert board.report_of("1") is None


def test_servers_that_leave_before_they_take_it_are_not_waited_for(steps, board, alive, clock):
    alive("a", "old")
    clock.after(2, lambda: board.withdraw("a"))
    assert steps.rehearse("1", "new", None) is None
    alive("b", "old")  # and one that is killed says nothing more
    assert steps.rehearse("2", "new", None) is None
    assert clock.now < 1_100


def test_a_loader_that_is_busy_gives_signs_and_is_waited_for(steps, board, alive, clock):
    for second in range(400):
        clock.after(second, lambda second=second: alive("a", "old", beat=second))
    alive("a", "old")
    clock.after(1, lambda: board.claim("1", "a"))
    clock.after(390, lambda: board.report("1", report("passed")))
    assert steps.rehearse("1", "new", None).state == "passed"


def test_a_cancelled_job_stops_waiting_and_takes_its_request_back(board, alive, clock):
    class StoppedError(Exception):
        pass

    def check():
        if clock.now > 1_003:
            raise StoppedError

    alive("a", "old")
    steps = ActivationSteps(board, check_cancelled=check, clock=clock, sleep=clock.sleep)
    with pytest.raises(StoppedError):
        steps.rehearse("1", "new", None)
    assert not board.is_open("1")


def test_every_server_is_waited_for_until_it_serves_or_says_why_not(steps, alive, clock):
    alive("a", "old")
    alive("b", "old")
    alive("leaving", "old", ends=True)
    clock.after(2, lambda: alive("a", "new"))
    clock.after(4, lambda: alive("b", "old", failed_release="new", failure="no room"))
    assert steps.wait_until_served("new", 60) == [
        {"server": "a", "state": "serving"},
        {"server": "b", "state": "failed", "message": "no room"},
    ]
    assert clock.now < 1_005


def test_one_that_never_follows_is_named(steps, alive, clock):
    alive("a", "old")
    assert steps.wait_until_served("new", 5) == [{"server": "a", "state": "loading"}]
    assert clock.now < 1_006


def test_servers_that_were_silent_for_an_hour_are_forgotten(board, alive, clock):
    alive("dead", "old")
    clock.now += 40
    assert board.servers() == []
    clock.now += 3_600
    alive("a", "old")
    assert len(board._servers.values()) == 1


def test_what_nobody_waits_for_any_more_is_not_taken(board):
    board.ask(RehearsalRequest(id="1", release="new"))
    board.close_request("1")
    assert not board.claim("1", "a")
    assert board.claimed_by("1") is None  # nor is a note of it left for ever


def test_what_a_killed_job_asked_for_is_not_tried_for_ever(board, clock, alive):
    """Nobody waits for the report, and every server would load the release for nothing."""
    board.ask(RehearsalRequest(id="1", release="new"))
    board.ask(RehearsalRequest(id="2", release="new"))
    assert board.claim("2", "dead")
    board.report("2", report("passed"))
    clock.now += 600
    assert board.open_requests("a") == []
    assert board._requests.values() == board._answers.values() == []


def test_a_job_that_waits_for_long_says_so_again(steps, board, alive, clock):
    def look(second: int) -> None:
        alive("a", "old", beat=second)
        (request,) = board.open_requests("a")
        assert request.release == "new"

    alive("a", "old")
    for second in range(1, 1_000):
        clock.after(second, lambda second=second: look(second))
    clock.after(1, lambda: board.claim("1", "a"))
    clock.after(999, lambda: board.report("1", report("passed")))
    assert steps.rehearse("1", "new", None).state == "passed"


def failing(monkeypatch, board, name, clock, until_s):
    """The call fails until then."""
    real = getattr(board, name)

    def unsteady(*arguments):
        if clock.now < until_s:
            raise ConnectionError("the database is away")
        return real(*arguments)

    monkeypatch.setattr(board, name, unsteady)


@pytest.mark.parametrize("call", ["report_of", "claimed_by", "servers"])
def test_a_database_that_is_away_for_a_while_fails_no_rehearsal(
    steps, board, alive, clock, monkeypatch, call
):
    for second in range(70):
        clock.after(second, lambda second=second: alive("a", "old", beat=second))
    alive("a", "old")
    clock.after(1, lambda: failing(monkeypatch, board, call, clock, clock.now + 40))
    clock.after(50, lambda: board.claim("1", "a"))
    clock.after(60, lambda: board.report("1", report("passed")))
    assert steps.rehearse("1", "new", None).state == "passed"
    assert any("the database is away" in line for line in steps.said)
    assert len(steps.said) < 6


def test_a_database_that_stays_away_fails_it(steps, board, alive, clock, monkeypatch):
    alive("a", "old")
    begun = clock.now
    clock.after(1, lambda: failing(monkeypatch, board, "report_of", clock, 10**9))
    with pytest.raises(ConnectionError):
        steps.rehearse("1", "new", None)
    assert 60 < clock.now - begun < 120


def test_a_request_that_cannot_be_taken_back_changes_nothing(
    steps, board, alive, clock, monkeypatch
):
    alive("a", "old")
    clock.after(1, lambda: board.claim("1", "a"))
    clock.after(2, lambda: board.report("1", report("passed")))
    failing(monkeypatch, board, "close_request", clock, 10**9)
    assert steps.rehearse("1", "new", None).state == "passed"
