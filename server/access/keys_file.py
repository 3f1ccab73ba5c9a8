"""A file of keys that is looked at again while the service runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import structlog

from server.access.keys import MAX_FILE_BYTES, ApiKey, KeysFileError, digest_of, parse_keys
from server.errors import ErrorKind, ServiceError
from server.settings import SettingsError, env_name

_log = structlog.get_logger(__name__)


class KeysFile:
    """The keys of a file, which may change.

    A change is seen within ``reload_s``. A file that has become unreadable or wrong changes
    nothing but is logged; one that has no keys lets nobody in.

    Args:
        path: of the file.
        setting: dotted name of the setting that names it.
        what: these keys are, in messages: ``API key``.
        reload_s: seconds between two looks.
        limits: whether its lines may name a limit of requests.
        clock: seconds that never go back.
        now: Unix time.

    Raises:
        SettingsError: the file cannot be read, or does not say what it should.
    """

    def __init__(
        self,
        path: Path,
        *,
        setting: str,
        what: str,
        reload_s: float,
        limits: bool = True,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._what = what
        self._reload_s = reload_s
        self._limits = limits
        self._clock = clock
        self._now = now
        try:
            self._content = _read(path)
            self._keys: Mapping[bytes, ApiKey] = parse_keys(self._content, limits=limits)
        except (OSError, KeysFileError) as error:
            raise SettingsError(f"{env_name(setting)} {path}: {_reason(error)}") from None
        self._problem: str | None = None
        self._next_look = clock() + reload_s
        if not self._keys:
            _log.warning(f"no {what} in the file, nobody is let in", file=str(path))

    @property
    def keys(self) -> Iterable[ApiKey]:
        """All keys of the file as it was at the last look, expired ones too."""
        return self._keys.values()

    def look(self) -> bool:
        """Look at the file if it is time to, and tell whether its keys are others now."""
        if self._clock() < self._next_look:
            return False
        self._next_look = self._clock() + self._reload_s
        try:
            content = _read(self._path)
            if content == self._content:
                self._problem = None
                return False
            keys = parse_keys(content, limits=self._limits)
        except (OSError, KeysFileError) as error:
            reason = _reason(error)
            if reason != self._problem:
                _log.error(f"{self._what}s not reloaded", file=str(self._path), reason=reason)
            self._problem = reason
            return False
        self._content, self._keys, self._problem = content, keys, None
        _log.info(f"{self._what}s reloaded", file=str(self._path), keys=len(keys))
        return True

    def key_of(self, authorization: str) -> ApiKey:
        """The key that this header names.

        Raises:
            ServiceError: 401, the key is missing, unknown or expired.
        """
        scheme, _, given = authorization.partition(" ")
        # Found by its hash: what the time of that may tell is of no use without the key.
        key = self._keys.get(digest_of(given.strip())) if scheme.lower() == "bearer" else None
        if key is None:
            raise ServiceError(
                ErrorKind.UNAUTHORIZED,
                f"the {self._what} is missing or wrong; send Authorization: Bearer KEY",
            )
        if key.expires_s is not None and self._now() >= key.expires_s:
            raise ServiceError(
                ErrorKind.UNAUTHORIZED, f"the {self._what} of {key.name} has expired"
            )
        return key


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _reason(error: OSError | KeysFileError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
