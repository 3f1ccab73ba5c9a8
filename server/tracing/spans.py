"""Where the time of a request went, for a tracing system; nothing by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import MappingProxyType

from starlette.types import ASGIApp

from server.recommender import Recommendation
from server.settings import Settings, SettingsError, env_name

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Spans:
    """What is told of requests while they are answered. This one tells nobody."""

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app, with a span around every request."""
        return app

    def began(self, request_id: str) -> Mapping[str, str]:
        """A request has its id; returns what its log lines shall have beside it."""
        return _NOTHING

    def routed(self, method: str, route: str) -> None:
        """The route of the request is known, and its answer begins."""

    @contextmanager
    def search(self) -> Iterator[Callable[[Recommendation], None]]:
        """A span around a search; the function it yields is told the outcome."""
        yield _ignore

    def pass_on(self, headers: MutableMapping[str, str]) -> None:
        """Add what tells another service which trace its request belongs to."""

    def close(self) -> None:
        """Send what is left; takes a few seconds at most."""


def make_spans(settings: Settings, service_name: str) -> Spans:
    """The spans that the settings ask for.

    Args:
        settings: ``tracing`` says whether there are any.
        service_name: of this service in traces, where ``OTEL_SERVICE_NAME`` names no other.

    Raises:
        SettingsError: tracing is on, but its packages are not installed.
    """
    if not settings.tracing:
        return Spans()
    try:
        from server.tracing.otel import OtelSpans, otlp_provider
    except ImportError as error:
        raise SettingsError(
            f"{env_name('tracing')} is on, but {error.name} is not installed; "
            "pip install 'rectokens[otel]'"
        ) from None
    return OtelSpans(otlp_provider(service_name))


def _ignore(found: Recommendation) -> None:
    """What became of a search that nobody asks about."""
