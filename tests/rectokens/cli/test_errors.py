"""A command fails with one message; a terminated one takes its temporary files along."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rectokens.cli.errors import message_of, one_message
from tests.waiting import ended


def test_messages_are_one_line():
    assert message_of(ValueError("first\n  second")) == "first second"
    assert message_of(FileNotFoundError(2, "No such file or directory", "x.npy")) == (
        "x.npy: No such file or directory"
    )
    assert message_of(MemoryError()) == "out of memory"
    assert message_of(KeyError("k")) == "unexpected KeyError: 'k'"
    assert message_of(ValueError()) == "ValueError"


def test_exit_code_and_the_way_to_a_traceback(capsys, monkeypatch):
    @one_message
    def command(number: int) -> int:
        return 10 // number

    assert command(5) == 2
    with pytest.raises(typer.Exit) as caught:
        command(0)
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == (
        "error: unexpected ZeroDivisionError: integer division or modulo by zero\n"
    )
    monkeypatch.setenv("RECTOKENS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        command(0)


def test_the_program_itself(tmp_path: Path):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rectokens", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    result = run("inspect", tmp_path / "none")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"error: artifact folder {tmp_path / 'none'} does not exist\n"


def test_a_terminated_writer_leaves_nothing(tmp_path: Path):
    script = (
        "import time\nfrom pathlib import Path\n"
        "from rectokens.artifacts.manifest import write_artifact\n"
        "from rectokens.cli.errors import exit_on_sigterm\n"
        "def populate(folder):\n"
        "    (folder / 'a.txt').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(3_600)\n"
        "exit_on_sigterm()\n"
        f"write_artifact(Path({str(tmp_path)!r}), 'catalog', populate)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGTERM)
        assert ended(writer) == 143
    assert list(tmp_path.iterdir()) == []
