"""Running the service in a process: socket, signals, graceful end, exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.connections import (
    PARSER_HEAD_BYTES,
    ConnectionLimits,
    bounded_protocol,
    file_limit,
)
from server.following import StoreLink
from server.heap import pass_over_loaded
from server.logs import configure_logging
from server.metrics import HttpMetrics
from server.proxy.service import Proxy
from server.release import ReleaseError, ReleaseLoader
from server.service import Service
from server.settings import Settings

_log = structlog.get_logger(__name__)

# After the drain only connections that send or read nothing are left.
_CLOSE_CONNECTIONS_S = 3
_BACKLOG = 2_048


class ListenError(OSError):
    """The address cannot be listened on; the message names it."""


def run_service(
    settings: Settings,
    load_release: ReleaseLoader,
    on_ready: Callable[[str], None] = lambda base_url: None,
    proxy: Proxy | None = None,
    link: StoreLink | None = None,
) -> int:
    """Serve until a signal; listens at once, ready when the release is loaded.

    SIGTERM or SIGINT: not ready from that moment, running requests get
    ``settings.drain_timeout_s`` to finish. A second signal ends the process at once.

    Args:
        settings: of the service.
        load_release: loads what is served.
        on_ready: called with the base URL once requests are answered.
        proxy: served too, below ``/proxy``.
        link: to the store that is followed.

    Returns:
        Exit code: 0 after a signal, 1 if the release could not be loaded (said on stderr).

    Raises:
        ListenError: the address is taken or not ours.
        SettingsError: a file of keys cannot be used.
    """
    configure_logging(settings.log_level)
    listener = listen(settings.host, settings.port)
    app = create_app(settings, load_release, proxy, link)
    service: Service = app.state.service

    async def drain(timeout_s: float) -> bool:
        drains = [service.drain(timeout_s), *([] if proxy is None else [proxy.drain(timeout_s)])]
        return all(await asyncio.gather(*drains))

    def on_server(server: GracefulServer, base_url: str) -> None:
        service.on_load_failed = server.end

        def ready() -> None:
            pass_over_loaded()
            on_ready(base_url)

        service.on_ready = ready

    with _worker(settings, link):
        serve_app(app, settings, listener, drain, service.metrics, on_server)
    code = 0
    if service.load_error is not None:
        _report(service.load_error)
        code = 1
    _log.info("stopped", exit_code=code)
    if service.busy_threads:
        # A thread inside native code cannot be stopped, and tearing the interpreter down under
        # it may crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextmanager
def _worker(settings: Settings, link: StoreLink | None) -> Iterator[None]:
    """Jobs are run beside the service while it serves, if that is wanted."""
    if link is None or not settings.jobs.start_worker:
        yield
        return
    from server.jobs.worker_process import WorkerProcess

    worker = WorkerProcess(settings)
    worker.start()
    try:
        yield
    finally:
        worker.stop()


def serve_app(
    app: FastAPI,
    settings: Settings,
    listener: socket.socket,
    drain: Callable[[float], Awaitable[bool]],
    metrics: HttpMetrics,
    on_server: Callable[[GracefulServer, str], None] = lambda server, base_url: None,
) -> None:
    """Run an app on a socket until a signal.

    Args:
        app: with its lifespan.
        settings: of HTTP.
        listener: listening.
        drain: begun at the first signal, with the seconds it may take; the app answers meanwhile.
        metrics: told of connections.
        on_server: told the server and its base URL before it begins.
    """
    limits = ConnectionLimits(settings.http, metrics, file_limit(settings.http.max_connections))
    server = GracefulServer(
        uvicorn.Config(
            app,
            http=bounded_protocol(limits),
            h11_max_incomplete_event_size=PARSER_HEAD_BYTES,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.http.keep_alive_s,
            timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
            # The app has no websockets.
            ws="none",
        ),
        lambda: drain(settings.drain_timeout_s),
    )
    host, port = listener.getsockname()[:2]
    on_server(server, _base_url(host, port))
    _log.info("listening", host=host, port=port)
    server.run(sockets=[listener])


def _base_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 takes a free one.

    Raises:
        ListenError: the address is taken or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ListenError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


class GracefulServer(uvicorn.Server):
    """uvicorn, but draining first: it keeps answering (``/ready`` says 503) until idle."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[bool]]) -> None:
        super().__init__(config)
        self._drain_app = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    def end(self) -> None:
        """End without draining."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal, end at the second.

        uvicorn's own handler would raise the signal again after shutting down, and the process
        would not exit with 0.
        """
        if self._loop is None:
            self.end()
            return
        name = signal.Signals(sig).name
        self._loop.call_soon_threadsafe(self._on_signal, name)

    def _on_signal(self, name: str) -> None:
        if self._drain is not None:
            _log.warning("second signal, ending at once", signal=name)
            self.end()
            self.force_exit = True
            return
        _log.info("signal", signal=name)
        self._drain = asyncio.ensure_future(self._drain_and_end())

    async def _drain_and_end(self) -> None:
        await self._drain_app()
        self.end()


def _report(error: BaseException) -> None:
    """What stopped the start: one message where it is ours, a traceback where it is a bug."""
    if isinstance(error, ReleaseError):
        print(f"error: {error}", file=sys.stderr)
    else:
        _log.error("loading failed", exc_info=error)
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
