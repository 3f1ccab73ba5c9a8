"""A service without weights, in this process or in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import structlog

from tests.metrics_page import sample_of
from tests.waiting import LIMIT_S, ended, until

_SCRIPT = Path(__file__).with_name("dummy_service.py")


def _load_script(name: str = "dummy_service") -> ModuleType:
    # Tests are no package (importlib mode), so a sibling is loaded by its path.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def _quiet_logs() -> None:
    # structlog's default renders tracebacks richly, which takes seconds.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[])


@pytest.fixture(scope="session")
def dummy() -> ModuleType:
    """The module ``dummy_service``."""
    return _load_script()


@pytest.fixture(scope="session")
def real(tiny_lm: Callable[..., Any]) -> Any:
    """A release with weights; see ``real_release.py``."""
    return _load_script("real_release").make_real_release(tiny_lm("qwen3", 64, seed=1))


@pytest.fixture(scope="session")
def make_real_release() -> Callable[..., Any]:
    """``make_real_release(model, ...)``: see ``real_release.py``."""
    make: Callable[..., Any] = _load_script("real_release").make_real_release
    return make


class RunningApp:
    """An app whose lifespan runs, with a client for it."""

    def __init__(self, app: Any, client: httpx.AsyncClient) -> None:
        self.app = app
        self.service = app.state.service
        self.client = client

    async def post(self, body: Any, **kwargs: Any) -> httpx.Response:
        return await self.client.post("/v1/recommend", json=body, **kwargs)

    async def metric(self, line: str) -> float:
        """Value of one sample of /metrics, 0 if it is not there."""
        return sample_of((await self.client.get("/metrics")).text, line)


StartApp = Callable[..., Any]


@pytest.fixture
async def start_app(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartApp]:
    """``await start_app(release, **flags)``: a ready app; flags are dotted setting names.

    With ``store__path`` it follows that store, and needs no release.
    """
    from server.app import create_app
    from server.following import StoreLink
    from server.settings import load_settings

    for name in os.environ:
        if name.startswith("RECTOKENS_"):
            monkeypatch.delenv(name)

    async with AsyncExitStack() as stack:

        async def start(
            release: Any = None, *, load: Any = None, wait: bool = True, **flags: Any
        ) -> RunningApp:
            # However slow the machine is just now: few tests are about time.
            flags = {"defaults__timeout_ms": 60_000, **flags}
            settings = load_settings({k.replace("__", "."): v for k, v in flags.items()})
            link = None
            if settings.store.path is not None:
                link = StoreLink.open(settings)
                load = load or link.load_first
            app = create_app(settings, load or (lambda: release), link=link)
            await stack.enter_async_context(app.router.lifespan_context(app))
            client = await stack.enter_async_context(
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(app), base_url="http://test", timeout=60
                )
            )
            running = RunningApp(app, client)
            if wait:
                await until(lambda: running.service.phase == "ready" or running.service.load_error)
                assert running.service.load_error is None
            return running

        yield start


class ServerProcess:
    """A dummy service in a process of its own, on a port of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        # Read all the time: a service that cannot write its log stands still.
        self._unread: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.lines: list[dict[str, Any]] = []
        self.port = 0
        self.stdout = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read_until(self, event: str) -> dict[str, Any]:
        """Read log lines up to the one with that event."""
        with suppress(queue.Empty):
            while (line := self._unread.get(timeout=LIMIT_S)) is not None:
                record = json.loads(line) if line.startswith("{") else {"event": line.strip()}
                self.lines.append(record)
                if record["event"] == event:
                    return record
        raise AssertionError(f"no {event!r} among {self.lines}")

    def tell(self, word: str) -> None:
        """``hold``, ``step`` or ``go``, where its behaviour is ``told``; done when this returns."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        self.read_until(word)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        """Exit code and the rest of stderr."""
        assert self.process.stdout is not None
        ended(self.process, lambda: "".join(iter(self._unread.get, None)))
        self.stdout = self.process.stdout.read()
        return self.process.returncode, "".join(iter(self._unread.get, None))

    def end(self) -> None:
        """Kill it, unless it has ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._unread.put(line)
        self._unread.put(None)


@pytest.fixture
def start_process() -> Iterator[Callable[..., ServerProcess]]:
    """``start_process(behaviour, "setting=value", ...)``: listening, not yet ready."""
    started: list[ServerProcess] = []

    def start(behaviour: str = "ok", *flags: str) -> ServerProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RECTOKENS_")}
        process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), "0", behaviour, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        server = ServerProcess(process)
        started.append(server)
        server.port = server.read_until("listening")["port"]
        return server

    yield start
    for server in started:
        server.end()


@pytest.fixture(scope="session")
def fuzzing() -> ModuleType:
    """The module ``fuzzing``."""
    return _load_script("fuzzing")


@pytest.fixture(scope="session")
def stores() -> ModuleType:
    """The module ``stores``."""
    return _load_script("stores")


@pytest.fixture
def small_store(tmp_path: Path, tiny_lm: Any, stores: ModuleType) -> Any:
    """A store with a tiny model and one active release; see ``stores.SmallStore``."""
    return stores.make_store(tmp_path / "store", tiny_lm("qwen3"))
