"""Who may use ``/admin``: holders of a key, or nobody."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.security import HTTPBearer

from server.access.keys import digest_of
from server.access.keys_file import KeysFile
from server.api.strict_json import StrictJsonRoute
from server.errors import ErrorKind, ServiceError
from server.settings import env_name
from server.settings_operating import AdminSettings

# Documents the scheme; the route class below does the checking, before a body is read.
BEARER = HTTPBearer(auto_error=False, scheme_name="AdminKey", description="A key of `admin.keys`.")

_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


class AdminGuard:
    """Lets holders of a key in.

    Without any key everybody is refused, unless ``open_on_loopback`` lets callers of this machine
    in: by address, through no proxy, and not as a web page of another site that a browser of this
    machine shows.

    Args:
        settings: of the admin API.
        reload_s: seconds between two looks at the file of keys.

    Raises:
        SettingsError: the file of keys cannot be read, or does not say what it should.
    """

    def __init__(self, settings: AdminSettings, reload_s: float) -> None:
        self._digests = [digest_of(key.get_secret_value()) for key in settings.keys]
        self._file = None
        if settings.keys_file is not None:
            self._file = KeysFile(
                settings.keys_file,
                setting="admin.keys_file",
                what="admin key",
                reload_s=reload_s,
                limits=False,
            )
        self._open_on_loopback = settings.open_on_loopback

    def check(self, request: Request) -> None:
        """Refuse a request that may not pass.

        Raises:
            ServiceError: 401 for a missing or wrong key, 403 where there is no key to have.
        """
        authorization = request.headers.get("authorization", "")
        if self._file is not None:
            self._file.look()
            if not self._has_key(authorization):
                self._file.key_of(authorization)
            return
        if self._digests:
            if not self._has_key(authorization):
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
        given = digest_of(key.strip())
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
