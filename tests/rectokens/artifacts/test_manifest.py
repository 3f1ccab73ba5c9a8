"""Artifacts are written whole or not at all, and opened only if nothing about them is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rectokens.artifacts import manifest
from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.files import sha256_files
from rectokens.artifacts.manifest import (
    ParentRef,
    content_version,
    is_version,
    open_artifact,
    read_manifest,
    remove_partials,
    write_artifact,
)


def populate(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"alpha")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.bin").write_bytes(bytes(range(256)) * 40)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(
        tmp_path / "store",
        "tokenizer",
        populate,
        parents={"tokenizer": ParentRef(None, "f" * 64)},
        numbers={"num_items": 3, "rate": 0.25, "note": "x"},
    )


def edit_manifest(artifact: Path, change) -> None:
    path = artifact / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_is_written_is_what_is_opened(artifact: Path):
    manifest = open_artifact(artifact, "tokenizer")
    assert artifact.name == manifest.version
    assert is_version(manifest.version)
    assert set(manifest.files) == {"a.txt", "sub/b.bin"}
    assert manifest.files["a.txt"].size == 5
    assert manifest.files["a.txt"].sha256 == hashlib.sha256(b"alpha").hexdigest()
    assert manifest.parents == {"tokenizer": ParentRef(None, "f" * 64)}
    assert manifest.numbers == {"num_items": 3, "rate": 0.25, "note": "x"}
    assert manifest == read_manifest(artifact)


def test_version_is_the_documented_hash(artifact: Path):
    lines = "".join(
        f"{hashlib.sha256((artifact / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("a.txt", "sub/b.bin")
    )
    assert artifact.name == hashlib.sha256(lines.encode()).hexdigest()[:16]


def test_same_content_is_the_same_folder(artifact: Path):
    before = (artifact / "manifest.json").read_bytes()
    again = write_artifact(artifact.parent, "tokenizer", populate, numbers={"num_items": 99})
    assert again == artifact
    assert (artifact / "manifest.json").read_bytes() == before
    assert [p.name for p in artifact.parent.iterdir()] == [artifact.name]


def test_a_renamed_folder_is_still_the_artifact(artifact: Path, tmp_path: Path):
    mounted = artifact.rename(tmp_path / "mounted-here")
    assert open_artifact(mounted, "tokenizer").version == artifact.name


@pytest.mark.parametrize("damage", ["flipped", "missing", "extra", "no manifest"])
def test_a_damaged_folder_is_mended_by_writing_the_same_again(artifact: Path, damage: str):
    if damage == "flipped":
        (artifact / "a.txt").write_bytes(b"alphA")
    elif damage == "extra":
        (artifact / "c.txt").write_bytes(b"c")
    else:
        (artifact / ("a.txt" if damage == "missing" else "manifest.json")).unlink()
    assert write_artifact(artifact.parent, "tokenizer", populate) == artifact
    open_artifact(artifact, "tokenizer")
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_a_folder_that_cannot_be_read_just_now_is_left_alone(artifact: Path, monkeypatch):
    def away(folder: Path, names: Sequence[str]) -> list[str]:
        if folder.name == artifact.name:
            raise OSError(errno.EIO, "Input/output error", str(folder / "a.txt"))
        return sha256_files(folder, names)

    monkeypatch.setattr(manifest, "sha256_files", away)
    with pytest.raises(UnreadableError, match=r"a\.txt cannot be read"):
        write_artifact(artifact.parent, "tokenizer", populate)
    monkeypatch.undo()
    open_artifact(artifact, "tokenizer")
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failing_writer_leaves_nothing(tmp_path: Path, error: BaseException):
    def fails(folder: Path) -> None:
        populate(folder)
        raise error

    with pytest.raises(type(error)):
        write_artifact(tmp_path / "store", "catalog", fails)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_killed_writer_leaves_no_version_and_its_rest_can_be_cleared(tmp_path: Path):
    root = tmp_path / "store"
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from rectokens.artifacts.manifest import write_artifact\n"
        "def populate(folder):\n"
        "    (folder / 'a.txt').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        f"write_artifact(Path({str(root)!r}), 'catalog', populate)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    leftovers = list(root.iterdir())
    assert len(leftovers) == 1
    assert not is_version(leftovers[0].name)

    complete = write_artifact(root, "catalog", populate)  # a fresh rest is not disturbed
    open_artifact(complete, "catalog")
    assert leftovers[0].exists()
    assert remove_partials(root, older_than_s=3600) == []
    assert remove_partials(root, older_than_s=0) == leftovers
    assert list(root.iterdir()) == [complete]


def test_rests_older_than_a_day_are_cleared_by_the_next_writer(tmp_path: Path):
    root = tmp_path / "store"
    old = root / ".partial-1-abc"
    old.mkdir(parents=True)
    (old / "x").write_text("x")
    for path in (old / "x", old):
        os.utime(path, (time.time() - 100_000,) * 2)
    complete = write_artifact(root, "catalog", populate)
    assert list(root.iterdir()) == [complete]


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_always_noticed(artifact: Path, verify: bool):
    with open(artifact / "sub" / "b.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"b\.bin has 100 bytes; the manifest says 10240"):
        open_artifact(artifact, "tokenizer", verify_checksums=verify)


def test_a_flipped_bit_is_noticed_by_the_checksums(artifact: Path):
    path = artifact / "sub" / "b.bin"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"b\.bin has SHA-256"):
        open_artifact(artifact, "tokenizer")
    open_artifact(artifact, "tokenizer", verify_checksums=False)


def test_leftovers_that_are_not_ours_to_remove_keep_nobody_from_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "store"
    root.mkdir()
    for name in (".partial-1-file.json", ".partial-2-file.json"):
        (root / name).write_bytes(b"{")
        os.utime(root / name, (0, 0))
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == ".partial-1-file.json":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    assert write_artifact(root, "tokenizer", populate).is_dir()
    assert remove_partials(root, older_than_s=0.0) == []
    assert [path.name for path in root.glob(".partial-*")] == [".partial-1-file.json"]


def test_missing_and_extra_files_are_noticed(artifact: Path):
    (artifact / ".hidden").write_text("of the file system")
    open_artifact(artifact, "tokenizer")
    (artifact / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"does not list: adapter_config\.json"):
        open_artifact(artifact, "tokenizer")
    (artifact / "adapter_config.json").unlink()
    (artifact / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a\.txt is missing"):
        open_artifact(artifact, "tokenizer")


def test_another_kind_is_refused(artifact: Path):
    with pytest.raises(ArtifactError, match="is a tokenizer artifact; expected a catalog"):
        open_artifact(artifact, "catalog")
    with pytest.raises(ArtifactError, match="kind is 'cake'; allowed are 'tokenizer', 'model'"):
        write_artifact(artifact.parent, "cake", populate)


def test_a_later_format_is_refused_with_the_versions_understood(artifact: Path):
    def later(content):
        content["format"]["version"] = 2
        content["surprise"] = True

    edit_manifest(artifact, later)
    with pytest.raises(ArtifactError, match="format version is 2; understood are 1"):
        open_artifact(artifact, "tokenizer")


@pytest.mark.parametrize(
    "name", ["../a.txt", "/etc/passwd", "sub/../../a.txt", "sub//b", ".", "a\\b", ".hidden", "a\nb"]
)
def test_names_that_could_leave_the_folder_are_refused(artifact: Path, name: str):
    def rename(content):
        content["files"][name] = content["files"].pop("a.txt")

    edit_manifest(artifact, rename)
    with pytest.raises(ArtifactError, match="is not allowed"):
        open_artifact(artifact, "tokenizer")


def test_links_out_of_the_folder_are_refused(artifact: Path, tmp_path: Path):
    outside = tmp_path / "outside.txt"
    outside.write_bytes(b"alpha")
    (artifact / "a.txt").unlink()
    (artifact / "a.txt").symlink_to(outside)
    with pytest.raises(ArtifactError, match="link that leads out"):
        open_artifact(artifact, "tokenizer")


def test_an_altered_file_list_does_not_match_its_version(artifact: Path):
    def swap(content):
        content["files"]["a.txt"]["sha256"] = "0" * 64

    edit_manifest(artifact, swap)
    with pytest.raises(ArtifactError, match="the manifest was altered"):
        open_artifact(artifact, "tokenizer", verify_checksums=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("numbers"), "lacks the field 'numbers'"),
        (lambda c: c.update(more=1), "unknown fields 'more'"),
        (lambda c: c["files"]["a.txt"].update(size=True), "size is True; expected an integer"),
        (lambda c: c["files"]["a.txt"].update(size=-1), "size is -1"),
        (lambda c: c["files"]["a.txt"].update(sha256="zz"), "expected 64 hexadecimal digits"),
        (lambda c: c["numbers"].update(x=[1]), "numbers.x is"),
        (lambda c: c.update(files={}), "lists no files"),
        (lambda c: c.update(files=[]), "files holds a list; expected an object"),
        (lambda c: c.update(kind="cake"), "kind is 'cake'"),
    ],
)
def test_a_malformed_manifest_is_refused(artifact: Path, change, message: str):
    edit_manifest(artifact, change)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact, "tokenizer")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a list; expected an object"),
        (b" " * (16 * 1024 * 1024 + 1), "larger than the 16777216 bytes allowed"),
    ],
)
def test_a_manifest_that_is_no_json_is_refused(artifact: Path, data: bytes, message: str):
    (artifact / "manifest.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact, "tokenizer")


def test_folders_that_are_no_artifacts_are_told_apart(tmp_path: Path):
    with pytest.raises(ArtifactError, match="does not exist"):
        open_artifact(tmp_path / "nowhere", "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is not a folder"):
        open_artifact(tmp_path / "file", "model")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        open_artifact(tmp_path, "model")


def test_writers_must_write_regular_files_under_plain_names(tmp_path: Path):
    with pytest.raises(ArtifactError, match="at least one file"):
        write_artifact(tmp_path, "model", lambda folder: None)
    with pytest.raises(ArtifactError, match="taken by the manifest"):
        write_artifact(tmp_path, "model", lambda f: (f / "manifest.json").touch())
    with pytest.raises(ArtifactError, match="not allowed"):
        write_artifact(tmp_path, "model", lambda f: (f / ".x").touch())
    with pytest.raises(ArtifactError, match="not a regular file"):
        write_artifact(tmp_path, "model", lambda f: (f / "x").symlink_to("/etc/hosts"))
    with pytest.raises(ArtifactError, match="rate is nan"):
        write_artifact(tmp_path, "model", populate, numbers={"rate": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_content_version_depends_on_names_and_content_only(artifact: Path):
    files = read_manifest(artifact).files
    assert content_version(dict(reversed(files.items()))) == artifact.name
    renamed = {"z.txt" if name == "a.txt" else name: entry for name, entry in files.items()}
    assert content_version(renamed) != artifact.name


def test_files_are_readable_as_the_umask_says(tmp_path):
    def populate(folder):
        (folder / "private.bin").write_bytes(b"x")
        (folder / "private.bin").chmod(0o600)

    mask = os.umask(0o022)
    try:
        path = write_artifact(tmp_path, "catalog", populate)
    finally:
        os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}
