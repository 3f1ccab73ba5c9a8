"""Files over HTTP: resumed where they broke off, never half-read."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

import httpx

from rectokens.cli.progress import progress_bar
from rectokens.core.atomic_file import fsync_folder
from server.demo.data import DataFolderError

_log = logging.getLogger(__name__)


class _BrokenOffError(Exception):
    """The connection ended early; what came is kept."""


def fetch(
    url: str, path: Path, *, attempts: int = 5, pause_s: float = 2.0, timeout_s: float = 60.0
) -> Path:
    """Fetch a file, unless ``path`` is there already.

    What has come lies in ``{path}.part`` until it is all there, and only then under its name. A
    later attempt, of this call or of another program, asks for the rest alone, where the server
    says that the file is still the same one; otherwise it begins anew.

    Args:
        url: of the file.
        path: where to; parents are created.
        attempts: before giving up.
        pause_s: between attempts.
        timeout_s: without a byte, after which a connection counts as broken.

    Raises:
        DataFolderError: the server refuses, cannot be reached, or keeps breaking off; the disk
            is full. The message says whether another call would resume.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    problem = ""
    for attempt in range(attempts):
        if attempt:
            _log.warning("%s: %s; trying again", url, problem)
            time.sleep(pause_s)
        try:
            _receive(url, partial, timeout_s)
        except httpx.HTTPStatusError as error:
            problem = f"the server answered {error.response.status_code}"
            if error.response.status_code < 500:
                break
        except (httpx.TransportError, _BrokenOffError) as error:
            problem = str(error) or type(error).__name__
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DataFolderError(
                    f"the disk of {path.parent} is full; {_kept(partial)} bytes of {url} are "
                    "kept and another run goes on from there"
                ) from error
            raise
        else:
            _identity_of(partial).unlink(missing_ok=True)
            os.replace(partial, path)
            fsync_folder(path.parent)
            return path
    kept = _kept(partial)
    raise DataFolderError(
        f"cannot fetch {url}: {problem}"
        + (f"; {kept} bytes are kept and another run goes on from there" if kept else "")
    )


def _receive(url: str, partial: Path, timeout_s: float) -> None:
    """One attempt; returns when the whole file is there."""
    identity = _identity_of(partial)
    known = identity.read_text() if identity.is_file() else ""
    held = _kept(partial) if known else 0
    headers = {"Accept-Encoding": "identity"}
    if held:
        headers |= {"Range": f"bytes={held}-", "If-Range": known}
    with httpx.stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=timeout_s
    ) as answer:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            _forget(partial)
            raise _BrokenOffError("the file is shorter than what was kept of it")
        answer.raise_for_status()
        goes_on = answer.status_code == httpx.codes.PARTIAL_CONTENT
        if goes_on and not answer.headers.get("Content-Range", "").startswith(f"bytes {held}-"):
            _forget(partial)
            raise _BrokenOffError("the server sent another part than asked for")
        if not goes_on:
            held = 0
            _forget(partial)
            # Weak tags do not promise equal bytes.
            tag = answer.headers.get("ETag", "")
            known = tag if tag and not tag.startswith("W/") else ""
            known = known or answer.headers.get("Last-Modified", "")
            if known:
                identity.write_text(known)
        announced = answer.headers.get("Content-Length")
        total = held + int(announced) if announced else None
        with (
            open(partial, "ab" if goes_on else "wb") as file,
            progress_bar(f"fetching {partial.stem}", total or 1.0) as show,
        ):
            # As they arrive: gathered into larger ones, the last of them would be lost.
            for chunk in answer.iter_raw():
                file.write(chunk)
                held += len(chunk)
                if total:
                    show(held)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and held != total:
        raise _BrokenOffError(f"{held} of {total} bytes came")


def _identity_of(partial: Path) -> Path:
    """Where it is written down which version of the file a partial one is of."""
    return partial.with_name(f"{partial.name}.identity")


def _kept(partial: Path) -> int:
    return partial.stat().st_size if partial.is_file() else 0


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _identity_of(partial).unlink(missing_ok=True)
