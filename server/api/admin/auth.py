"""Who may use ``/admin``: holders of a key, or nobody."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.security import HTTPBearer

from server.api.strict_json import StrictJsonRoute
from server.errors import ErrorKind, ServiceError
from server.settings import SettingsError, env_name
from server.settings_operating import AdminSettings, require_admin_key

# Documents the scheme; the route class below does the checking, before a body is read.
BEARER = HTTPBearer(auto_error=False, scheme_name="AdminKey", description="A key of `admin.keys`.")

_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_MAX_KEYS_FILE_BYTES = 1 << 20


class AdminGuard:
    """Lets holders of a key in.

    Without any key everybody is refused, unless ``open_on_loopback`` lets callers of this machine
    in: by address, through no proxy, and not as a web page of another site that a browser of this
    machine shows.

    Args:
        settings: of the admin API.

    Raises:
        SettingsError: the file of keys cannot be read or holds a bad one.
    """

    def __init__(self, settings: AdminSettings) -> None:
        keys = [key.get_secret_value() for key in settings.keys]
        if settings.keys_file is not None:
            keys += _keys_of_file(settings.keys_file)
        self._digests = [_digest(key) for key in keys]
        self._open_on_loopback = settings.open_on_loopback

    def check(self, request: Request) -> None:
        """Refuse a request that may not pass.

        Raises:
            ServiceError: 401 for a missing or wrong key, 403 where there is no key to have.
        """
        if self._digests:
            if not self._has_key(request.headers.get("authorization", "")):
                raise ServiceError(
                    ErrorKind.UNAUTHORIZED,
                    "the admin key is missing or wrong; send Authorization: Bearer KEY",
                )
            return
        if not self._open_on_loopback:
            raise ServiceError(
                ErrorKind.FORBIDDEN,
                f"/admin is closed: no key is configured; set {env_name('admin.keys')}",
            )
        if not _is_of_this_machine(request):
            raise ServiceError(
                ErrorKind.FORBIDDEN, "/admin is open to callers of this machine only"
            )

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        found = False
        for digest in self._digests:
            # All of them, each in the same time whatever was given.
            found |= hmac.compare_digest(digest, given)
        return found and scheme.lower() == "bearer"


class AdminRoute(StrictJsonRoute):
    """A route that looks at the key before it reads the body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a strict JSON route, behind the guard."""
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            guard = request.app.state.admin_guard
            if not isinstance(guard, AdminGuard):
                raise TypeError(f"app.state.admin_guard is a {type(guard).__name__}")
            guard.check(request)
            return await handler(request)

        return guarded


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _keys_of_file(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_KEYS_FILE_BYTES + 1)
        if len(content) > _MAX_KEYS_FILE_BYTES:
            raise ValueError(f"it has more than the {_MAX_KEYS_FILE_BYTES} bytes allowed")
        keys = [line.strip() for line in content.decode("ascii").splitlines() if line.strip()]
        if not keys:
            raise ValueError("it holds no key")
        for place, key in enumerate(keys, start=1):
            require_admin_key(key, f"the key at place {place}")
    except UnicodeDecodeError:
        raise SettingsError(f"{env_name('admin.keys_file')} {path}: not ASCII") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SettingsError(f"{env_name('admin.keys_file')} {path}: {reason}") from None
    return keys


def _is_of_this_machine(request: Request) -> bool:
    client = request.client
    if client is None or not _is_loopback(client.host):
        return False
    if any(name in request.headers for name in _FORWARDED):
        return False
    # A name of another site may have been pointed at this machine.
    if not _is_loopback(urlsplit(f"//{request.headers.get('host', '')}").hostname or ""):
        return False
    origin = request.headers.get("origin")
    return origin is None or _is_loopback(urlsplit(origin).hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool(address.is_loopback or (mapped is not None and mapped.is_loopback))
