"""``python -m server new-key``."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from rectokens.core.atomic_file import fsync_folder
from server.access.keys import (
    MAX_REQUESTS_PER_MINUTE,
    ApiKey,
    KeysFileError,
    check_name,
    digest_of,
    new_key,
    parse_keys,
)
from server.flags import USAGE_ERROR, fail

_DAY_S = 86_400
# Of a file that is mounted by itself, or lies in a folder, or is of an owner, that is not ours.
_NOT_REPLACEABLE = (errno.EBUSY, errno.EACCES, errno.EPERM)


def add_access_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command("new-key")(new_key_command)


def new_key_command(
    name: Annotated[str, typer.Argument(help="Of the caller, for the log and its limit.")],
    file: Annotated[Path, typer.Option(help="File of keys; made if there is none.")],
    requests_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_REQUESTS_PER_MINUTE,
            help="Limit of this caller, instead of the service's.",
        ),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(min=0, max=36_500, help="Days after which the key ends.")
    ] = None,
) -> None:
    """Make an API key, print it once, and add its hash to a file: NAME --file FILE.

    A running service (--access.keys-file FILE) takes it up by itself. To replace a key, make a
    second one for the same name, and take the old line out once the caller has changed over.

    Exit code: 0, 1 if the file cannot be used, 2 for options that are not allowed.
    """
    try:
        check_name(name)
    except ValueError as error:
        fail(str(error), USAGE_ERROR)
    key = new_key()
    entry = ApiKey(
        name,
        digest_of(key),
        requests_per_minute,
        None if expires_days is None else time.time() + expires_days * _DAY_S,
    )
    try:
        add_to_file(file, entry)
    except KeysFileError as error:
        fail(f"{file}: {error}", 1)
    except OSError as error:
        fail(f"{file}: {error.strerror or error}", 1)
    typer.echo(key)


def add_to_file(path: Path, entry: ApiKey) -> None:
    """Add a key, so that the file has all of its line or is as it was; a new file is its owner's.

    Raises:
        KeysFileError: what is in the file, or would be, does not say what it should.
        OSError: it cannot be read or written.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    with _alone_in(path.parent):
        try:
            before = path.read_bytes()
        except FileNotFoundError:
            before = None
        content = before or b""
        line = b"" if not content or content.endswith(b"\n") else b"\n"
        line += entry.line().encode() + b"\n"
        parse_keys(content + line)
        try:
            _replace(path, content + line)
        except OSError as error:
            if before is None or error.errno not in _NOT_REPLACEABLE:
                raise
            _append(path, line)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other commands waiting meanwhile, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of one, with its owner and permissions."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # of a command that was killed
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                found = path.stat()
                if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, found.st_uid, found.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    fsync_folder(path.parent)


def _append(path: Path, line: bytes) -> None:
    """Write a line behind a file; what did not get there whole is cut off again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        try:
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
