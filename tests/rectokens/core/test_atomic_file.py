"""Single files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from rectokens.core.atomic_file import atomic_file


def test_a_file_appears_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "new" / "codes.npy"
    with atomic_file(target) as partial:
        assert partial.suffix == ".npy"
        partial.write_bytes(b"12")
        assert not target.exists()
    assert target.read_bytes() == b"12"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_keeps_what_was_there(tmp_path: Path):
    target = tmp_path / "codes.npy"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(target) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
