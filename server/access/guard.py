"""Who may use the routes that recommend, and how often: callers with an API key."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.access.bucket import TokenBucket
from server.access.keys_file import KeysFile
from server.errors import ErrorKind, ServiceError
from server.settings import Settings
from server.settings_operating import AccessSettings

_SCHEME = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="An API key.")
_CALLER = "rectokens_caller"


class Caller:
    """Who makes requests, and what it may still ask for.

    Args:
        name: as in the file of keys.
        limit: requests a minute; None for any number.
        burst_s: seconds of the limit that may be made at once.
        clock: seconds that never go back.

    Attributes:
        requests: let in so far, those that one call carries counted each.
        refused: calls that were over the limit.
    """

    def __init__(
        self, name: str, limit: int | None, burst_s: float, clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.limit = limit
        self.requests = 0
        self.refused = 0
        self._bucket = None if limit is None else TokenBucket(limit, limit * burst_s / 60, clock)

    def admit(self) -> None:
        """Let one request in.

        Raises:
            ServiceError: 429, the caller has made too many.
        """
        if self._bucket is not None and (wait_s := self._bucket.wait_s()) > 0:
            self.refused += 1
            raise ServiceError(
                ErrorKind.RATE_LIMITED,
                f"{self.name} makes more than {self.limit} requests a minute; "
                f"the next one passes in {wait_s:.1f} seconds",
                retry_after_s=wait_s,
            )
        self.charge(1)

    def charge(self, cost: int) -> None:
        """Count what a request, once read, turned out to carry."""
        self.requests += cost
        if self._bucket is not None:
            self._bucket.pay(cost)


class ApiKeys(Collector):
    """The callers of a file of keys; see :class:`~server.access.keys_file.KeysFile`.

    A caller keeps its count while its name stands in the file with the same limit, whatever
    becomes of its keys. It is a collector of metrics: who asked how often.

    Args:
        settings: with a file of keys.
        prefix: of the metrics' names.
        clock: seconds that never go back.
        now: Unix time.

    Raises:
        SettingsError: the file cannot be read, or does not say what it should.
    """

    def __init__(
        self,
        settings: AccessSettings,
        *,
        prefix: str = "rectokens",
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        if settings.keys_file is None:
            raise ValueError("settings.keys_file is None; there are no keys to look at")
        self._settings = settings
        self._prefix = prefix
        self._clock = clock
        self._file = KeysFile(
            settings.keys_file,
            setting="access.keys_file",
            what="API key",
            reload_s=settings.reload_s,
            clock=clock,
            now=now,
        )
        self._callers: dict[str, Caller] = {}
        self._update_callers()

    def caller(self, authorization: str) -> Caller:
        """Who sends this header.

        Raises:
            ServiceError: 401, the key is missing, unknown or expired.
        """
        if self._file.look():
            self._update_callers()
        return self._callers[self._file.key_of(authorization).name]

    def collect(self) -> Iterator[Metric]:
        """What every caller has asked for, and may."""
        name = f"{self._prefix}_caller"
        requests = CounterMetricFamily(
            f"{name}_requests", "Requests of a caller that were let in.", labels=["caller"]
        )
        refused = CounterMetricFamily(
            f"{name}_refused", "Calls of a caller that were over its limit.", labels=["caller"]
        )
        limit = GaugeMetricFamily(
            f"{name}_limit_per_minute",
            "Requests a minute that a caller may make; none where there is no limit.",
            labels=["caller"],
        )
        for caller in list(self._callers.values()):
            requests.add_metric([caller.name], caller.requests)
            refused.add_metric([caller.name], caller.refused)
            if caller.limit is not None:
                limit.add_metric([caller.name], caller.limit)
        yield from (requests, refused, limit)

    def _update_callers(self) -> None:
        before, self._callers = self._callers, {}
        for key in self._file.keys:
            limit = key.requests_per_minute or self._settings.requests_per_minute
            kept = before.get(key.name)
            if kept is None or kept.limit != limit:
                kept = Caller(key.name, limit, self._settings.burst_s, self._clock)
            self._callers.setdefault(key.name, kept)


def documented_key(settings: Settings) -> list[Any]:
    """Dependencies of routes that need a key, for OpenAPI alone: none where no route does.

    ``ApiKeyMiddleware`` does the checking, before a body is read.
    """
    return [] if settings.access.keys_file is None else [Depends(_SCHEME)]


def set_caller(scope_state: dict[str, object], caller: Caller) -> None:
    """Remember in a request's state who makes it."""
    scope_state[_CALLER] = caller


def log_fields(scope_state: Mapping[str, object]) -> Mapping[str, str]:
    """What log lines tell of who makes a request; nothing where no key was asked for."""
    caller = scope_state.get(_CALLER)
    return {"caller": caller.name} if isinstance(caller, Caller) else {}


def charge(request: Request, cost: int) -> None:
    """Count what a request carries beyond the one that was counted when it came."""
    caller = getattr(request.state, _CALLER, None)
    if isinstance(caller, Caller) and cost > 0:
        caller.charge(cost)
