"""The file of keys: what it may say, what is refused, and the command that writes it."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from server.access.command import add_to_file
from server.access.keys import ApiKey, KeysFileError, digest_of, new_key, parse_keys
from server.cli import app
from tests.full_disk import file_size_limit

HASH = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


@given(
    name=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    digest=st.binary(min_size=32, max_size=32),
    per_minute=st.none() | st.integers(1, 10_000_000),
    expires_s=st.none() | st.integers(0, 4_000_000_000).map(float),
)
def test_a_line_says_what_was_written(name, digest, per_minute, expires_s):
    key = ApiKey(name, digest, per_minute, expires_s)
    assert parse_keys(f"# a comment\n\n{key.line()}\n".encode()) == {digest: key}


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_other_content_is_refused_or_read(content):
    try:
        keys = parse_keys(content)
    except KeysFileError:
        return
    assert all(digest == key.digest for digest, key in keys.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shop", "line 1: what follows the name is not 'sha256:'"),
        ("# ok\nshop " + HASH[:-1], "line 2: what follows"),
        ("shop rtk_a-key-that-was-pasted-here", "line 1: what follows"),
        (f"sh/op {HASH}", "line 1: the name is 'sh/op'"),
        (
            f"shop {HASH} limit=3",
            "'limit' is not known here; allowed is requests_per_minute and expires",
        ),
        (f"shop {HASH} requests_per_minute=0", "requests_per_minute is '0'; allowed are 1 to"),
        (f"shop {HASH} requests_per_minute=ten", "requests_per_minute is 'ten'"),
        (f"shop {HASH} expires=2027-01-31", "expires is '2027-01-31'; allowed is a time with its"),
        (f"shop {HASH} expires=soon", "expires is 'soon'"),
        (f"shop {HASH} expires=2027-01-31T00:00Z expires=2027-01-31T00:00Z", "stands there twice"),
        (f"shop {HASH}\nother {HASH}", "line 2: this key stands in an earlier line too"),
        (f"shop {HASH}\nshop {OTHER} requests_per_minute=3", "line 2: shop has another limit"),
        ("# " + "x" * (1 << 20), "the most allowed"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_the_file_may_not_say(content, message):
    with pytest.raises(KeysFileError) as error:
        parse_keys(content if isinstance(content, bytes) else content.encode())
    assert message in str(error.value)
    assert "rtk_" not in str(error.value)


def test_operators_have_no_limits():
    with pytest.raises(KeysFileError, match="is not known here; allowed is expires,"):
        parse_keys(f"ops {HASH} requests_per_minute=3".encode(), limits=False)


def test_keys_are_long_and_differ():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 47 and key.startswith("rtk_") for key in keys)


def run(*arguments: str):
    return CliRunner().invoke(app, ["new-key", *arguments])


def test_the_command_prints_a_key_and_writes_its_hash_alone(tmp_path):
    file = tmp_path / "keys"
    first = run("shop", "--file", str(file), "--requests-per-minute", "60")
    file.write_bytes(file.read_bytes().rstrip(b"\n"))  # as an editor may leave it
    second = run("partner", "--file", str(file), "--expires-days", "1")
    assert (first.exit_code, second.exit_code) == (0, 0)
    keys = parse_keys(file.read_bytes())
    shop = keys[digest_of(first.stdout.strip())]
    partner = keys[digest_of(second.stdout.strip())]
    assert (shop.name, shop.requests_per_minute, shop.expires_s) == ("shop", 60, None)
    assert partner.name == "partner"
    assert partner.expires_s is not None
    assert first.stdout.strip() not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_command_leaves_a_file_as_it_is_where_it_fails(tmp_path):
    file = tmp_path / "keys"
    file.write_text("no line of ours\n")
    result = run("shop", "--file", str(file))
    assert result.exit_code == 1
    assert "line 1" in result.stderr
    assert file.read_text() == "no line of ours\n"
    file.write_text(f"shop {HASH}\n")
    result = run("shop", "--file", str(file), "--requests-per-minute", "3")
    assert (result.exit_code, "another limit" in result.stderr) == (1, True)
    assert file.read_text() == f"shop {HASH}\n"
    assert run("a b", "--file", str(file)).exit_code == 2
    assert run("shop", "--file", str(tmp_path / "nowhere" / "keys")).exit_code == 1


@pytest.fixture(params=["in a folder of ours", "mounted by itself"])
def keys_file(request, tmp_path, monkeypatch):
    """A file with one key, in a place of which it takes up all but a few bytes."""
    file = tmp_path / "keys"
    file.write_text(f"# {'x' * 5000}\nshop {HASH}\n")
    file.chmod(0o640)
    if request.param == "mounted by itself":

        def busy(source, target):
            raise OSError(errno.EBUSY, "Device or resource busy")

        monkeypatch.setattr(os, "replace", busy)
    return file


def test_a_full_disk_leaves_no_half_line(keys_file):
    before = keys_file.read_bytes()
    with file_size_limit(len(before) + 30):
        result = run("partner", "--file", str(keys_file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "File too large" in result.stderr
    assert keys_file.read_bytes() == before
    assert list(keys_file.parent.iterdir()) == [keys_file]
    result = run("partner", "--file", str(keys_file))
    assert result.exit_code == 0
    keys = parse_keys(keys_file.read_bytes())
    assert {key.name for key in keys.values()} == {"shop", "partner"}
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o640
    assert list(keys_file.parent.iterdir()) == [keys_file]


def test_a_full_disk_leaves_no_new_file(tmp_path):
    with file_size_limit(30):
        assert run("shop", "--file", str(tmp_path / "keys")).exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_killed_command_is_in_nobodys_way(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"shop {HASH}\n")

    def killed(source, target):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr("pathlib.Path.unlink", lambda path, missing_ok=False: None)
        run("partner", "--file", str(file))
    assert file.read_text() == f"shop {HASH}\n"
    assert len(list(tmp_path.iterdir())) == 2
    assert run("partner", "--file", str(file)).exit_code == 0
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real").write_text(f"shop {HASH}\n")
    (tmp_path / "keys").symlink_to("real")
    assert run("partner", "--file", str(tmp_path / "keys")).exit_code == 0
    assert (tmp_path / "keys").is_symlink()
    assert len(parse_keys((tmp_path / "real").read_bytes())) == 2


def test_of_many_at_once_none_is_lost(tmp_path):
    file = tmp_path / "keys"
    entries = [ApiKey(f"caller-{n}", digest_of(new_key())) for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: add_to_file(file, entry), entries))
    assert parse_keys(file.read_bytes()) == {entry.digest: entry for entry in entries}
