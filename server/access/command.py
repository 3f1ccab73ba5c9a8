"""``python -m server new-key``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

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
    """Append a key; a new file is its owner's alone.

    Raises:
        KeysFileError: what is in the file, or would be, does not say what it should.
        OSError: it cannot be read or written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "rb+") as file:
        before = file.read()
        line = (b"" if not before or before.endswith(b"\n") else b"\n") + entry.line().encode()
        parse_keys(before + line)
        file.write(line + b"\n")
