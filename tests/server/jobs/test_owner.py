"""Whose job it is, whatever the clock says."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import psutil
import pytest

from server.jobs.owner import Owner, started_s


@pytest.fixture
def set_clock(monkeypatch):
    """The time of day is set by so many seconds; psutil's times of creation move with it."""
    real = psutil.Process.create_time

    def move(seconds: float) -> None:
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + seconds)

    return move


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere psutil is believed")
@pytest.mark.parametrize("jump_s", [-86_400.0, -2.0, 2.0, 3_600.0])
def test_a_process_stays_the_same_when_the_clock_is_set(set_clock, jump_s):
    owner = Owner.this_process()
    assert not owner.is_dead
    set_clock(jump_s)
    assert not owner.is_dead
    assert Owner.this_process() == owner


def test_a_later_process_of_the_same_id_is_another_one():
    owner = Owner.this_process()
    assert dataclasses.replace(owner, started=owner.started - 1).is_dead
    assert dataclasses.replace(owner, started=owner.started + 0.5).is_dead
    assert not dataclasses.replace(owner, host="elsewhere", started=0.0).is_dead


def test_nothing_is_certain_of_a_process_from_before_the_machine_started_again(
    monkeypatch, tmp_path
):
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("first\n")
    monkeypatch.setattr("server.jobs.owner._BOOT_ID", boot_id)
    owner = Owner.this_process()
    assert owner.is_here
    boot_id.write_text("second\n")
    # Another process may have the same id, and have begun as long after the start.
    assert not owner.is_here
    assert not owner.is_dead


def test_a_process_that_ended_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = dataclasses.replace(Owner.this_process(), pid=child.pid, started=started_s(child.pid))
    assert started_s(child.pid) >= started_s(os.getpid())
    assert not owner.is_dead
    child.communicate(b"\n")
    assert owner.is_dead
    with pytest.raises(psutil.NoSuchProcess):
        started_s(child.pid)
