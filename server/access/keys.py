"""API keys: how one is made, and the file in which only their hashes stand.

A line of the file is ``NAME sha256:HEX``, and may go on with ``requests_per_minute=N`` and
``expires=2027-01-31T00:00:00Z``. A name may stand in several lines: these are keys of one caller,
as while a key is replaced. Empty lines and lines that begin with ``#`` say nothing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

KEY_PREFIX = "rtk_"
# Room for some thousand keys; callers are kept in memory, and each has its metrics.
MAX_FILE_BYTES = 1 << 20
# Of one caller.
MAX_REQUESTS_PER_MINUTE = 10_000_000
_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


class KeysFileError(ValueError):
    """The file of keys does not say what it should; the message names the line, never a key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key.

    Attributes:
        name: of the caller that holds it.
        digest: SHA-256 of the key.
        requests_per_minute: the caller's own limit; None leaves the service's.
        expires_s: Unix time from which on it lets nobody in; None is never.
    """

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    expires_s: float | None = None

    def line(self) -> str:
        """The line of the file that says this, without its end."""
        parts = [self.name, f"sha256:{self.digest.hex()}"]
        if self.requests_per_minute is not None:
            parts.append(f"requests_per_minute={self.requests_per_minute}")
        if self.expires_s is not None:
            when = datetime.fromtimestamp(self.expires_s, UTC)
            parts.append(f"expires={when:%Y-%m-%dT%H:%M:%SZ}")
        return " ".join(parts)


def new_key() -> str:
    """A key nobody can guess: 256 bits of the system's randomness.

    That is why a plain hash of it is enough: there is no list of likely keys to try.
    """
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def check_name(name: str) -> str:
    """The name of a caller, as it is.

    Raises:
        ValueError: it has characters that the file or the log could misread, or too many.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name is {name[:80]!r}; allowed are 1 to 64 letters, digits, '.', '_' and '-'"
        )
    return name


def parse_keys(content: bytes, *, limits: bool = True) -> Mapping[bytes, ApiKey]:
    """The keys of a file, by their hash.

    Args:
        content: of the file.
        limits: whether a line may name a limit of requests.

    Raises:
        KeysFileError: too large, not UTF-8, or a line that is not as the module says, or a key
            twice, or one caller with two limits.
    """
    if len(content) > MAX_FILE_BYTES:
        raise KeysFileError(f"it has over {MAX_FILE_BYTES} bytes, the most allowed")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise KeysFileError("it is not UTF-8") from None
    options = ("requests_per_minute", "expires") if limits else ("expires",)
    keys: dict[bytes, ApiKey] = {}
    limit_of: dict[str, int | None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        try:
            key = _parse_line(parts, options)
            if key.digest in keys:
                raise ValueError("this key stands in an earlier line too")
            if limit_of.setdefault(key.name, key.requests_per_minute) != key.requests_per_minute:
                raise ValueError(f"{key.name} has another limit in an earlier line")
        except ValueError as error:
            raise KeysFileError(f"line {number}: {error}") from None
        keys[key.digest] = key
    return MappingProxyType(keys)


def _parse_line(parts: list[str], allowed: Sequence[str]) -> ApiKey:
    name = check_name(parts[0])
    found = _HASH.fullmatch(parts[1]) if len(parts) > 1 else None
    if found is None:
        # It may be a key that somebody wrote here by mistake, so it is not repeated.
        raise ValueError(
            "what follows the name is not 'sha256:' and 64 hexadecimal digits (lower case)"
        )
    options: dict[str, str] = {}
    for part in parts[2:]:
        option, separator, value = part.partition("=")
        if not separator or option not in allowed:
            raise ValueError(
                f"{option[:40]!r} is not known here; allowed is {' and '.join(allowed)}, "
                "each with = and a value"
            )
        if option in options:
            raise ValueError(f"{option} stands there twice")
        options[option] = value
    return ApiKey(
        name,
        bytes.fromhex(found[1]),
        _per_minute(options.get("requests_per_minute")),
        _time(options.get("expires")),
    )


def _per_minute(value: str | None) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,8}", value) or not 1 <= int(value) <= MAX_REQUESTS_PER_MINUTE:
        raise ValueError(
            f"requests_per_minute is {value[:40]!r}; allowed are 1 to {MAX_REQUESTS_PER_MINUTE}"
        )
    return int(value)


def _time(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise ValueError(
            f"expires is {value[:40]!r}; allowed is a time with its zone, as 2027-01-31T00:00:00Z"
        )
    return when.timestamp()
