"""Runs the server as a process of its own for as long as a block lasts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from server.settings import ENV_PREFIX

_POLL_S = 0.1
_STOP_S = 15.0
_SHOWN_BYTES = 4000


class ServerStartError(RuntimeError):
    """The server did not become ready; the message ends with what it wrote last."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready.

    Attributes:
        base_url: where.
        pid: of its process.
    """

    base_url: str
    pid: int


@contextmanager
def running_server(
    *flags: str, timeout_s: float = 120.0, variables: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Serve on a free loopback port; gives the server once it is ready.

    The environment's own settings of the service are left out, so that what is measured is the
    service with default settings, ``flags`` and ``variables``.

    Raises:
        ServerStartError: it exits, or is not ready in time.
    """
    port = _free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
    environment |= variables or {}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_ready(process, base_url, output, timeout_s)
            yield RunningServer(base_url, process.pid)
        finally:
            _stop(process)


@contextmanager
def serving(
    release: Path, *, timeout_s: float = 120.0, flags: tuple[str, ...] = ()
) -> Iterator[str]:
    """Serve a release as :func:`running_server` does; gives the base URL."""
    with running_server("--release", str(release), *flags, timeout_s=timeout_s) as server:
        yield server.base_url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(
    process: subprocess.Popen[bytes], base_url: str, output: IO[bytes], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    with httpx.Client(base_url=base_url, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerStartError(
                    f"the server exited with status {process.returncode}:\n{_tail(output)}"
                )
            try:
                if client.get("/ready").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(_POLL_S)
    raise ServerStartError(f"the server was not ready within {timeout_s:g} s:\n{_tail(output)}")


def _tail(output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(output.tell() - _SHOWN_BYTES, 0))
    return output.read().decode(errors="replace").strip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
