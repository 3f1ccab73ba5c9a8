"""Following a store: load its active release beside the one served, try it, switch, free the old.

The store's pointer decides; every replica reads it for itself. Whatever fails on the way leaves
the release that is served where it is.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import structlog

from rectokens.artifacts.activation import Activation
from server.heap import collect_all, free_garbage
from server.memory import NotEnoughMemoryError
from server.release import Release, ReleaseError
from server.release_source import ReleaseSource
from server.service import Service

T = TypeVar("T")

_log = structlog.get_logger(__name__)

# A release that could not be loaded is tried again after so long, doubled every time: what was
# wrong may have been the network or the memory.
_FIRST_RETRY_S, _MAX_RETRY_S = 5.0, 300.0
# Beyond the longest request: the last batch of the release before must have ended.
_MARGIN_S = 10.0
_TRY_S = 60.0
# How long a release is held that was prepared and does not become active.
_CANDIDATE_S = 60.0
# Loading shares the machine with the requests, and may take longer for it.
_LOADER_NICENESS = 10
# Between two looks while something is about to happen: the first release is loaded, or the pointer
# reaches one that is held ready.
_SOON_S = 0.05
# How long what was replaced may stay in memory before cycles are collected; then twice as long.
_FIRST_COLLECTION_S = 0.25


@dataclass(frozen=True, slots=True)
class SwapFailure:
    """A release that is active in the store and is not served.

    Attributes:
        release: its version, None if the pointer itself could not be read.
        message: why not.
        at: UTC, ISO 8601, of the last attempt.
        attempts: so far.
    """

    release: str | None
    message: str
    at: str
    attempts: int


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How a service stands to the store that it follows.

    Attributes:
        active: what the store says, None before it was read or while there is none.
        failure: why that is not served; None where it is, or is on its way.
    """

    active: Activation | None = None
    failure: SwapFailure | None = None


class ReleaseFollower:
    """Keeps a service on the active release of a store.

    At most two releases are in memory: a new one is loaded only when the one before last is gone.

    Attributes:
        status: how the service stands to the store.
        loading: the version that is being loaded, None for none.
        news: set whenever another release is served, or cannot be.

    Args:
        service: what serves.
        source: what loads.
        poll_s: seconds between two looks at the pointer.
        max_request_s: the longest a request may take.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        service: Service,
        source: ReleaseSource,
        *,
        poll_s: float,
        max_request_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._source = source
        self._poll_s = poll_s
        self._free_timeout_s = max_request_s + _MARGIN_S
        self._clock = clock
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="follow", initializer=_yield_to_requests
        )
        # Held while anything is loaded: a look at the pointer and a rehearsal never overlap.
        self._loading = asyncio.Lock()
        # Prepared for the pointer to reach it, until then.
        self._candidate: Release | None = None
        self._candidate_until_s = 0.0
        self._prepared = asyncio.Event()
        self._retry_at_s = 0.0
        # What was unloaded to make room for a release that is not served yet.
        self._unloaded: str | None = None
        # When what was replaced last must have left memory.
        self._gone_by_s = math.inf
        # Whether the model that is served was loaded beside another, which may be in memory yet.
        self._new_model = False
        # Whether something was refused before it was held ready, and may be in memory yet.
        self._refused = False
        self.loading: str | None = None
        self.news = asyncio.Event()
        self._stop = threading.Event()
        self.status = StoreStatus()

    def load_first(self) -> Release:
        """Load what is served first; called on a thread of its own. See ``ReleaseSource``.

        Raises:
            ReleaseError: nothing could be loaded.
        """
        return self._source.load_first(self._poll_s, self._stop)

    async def run(self) -> None:
        """Look at the pointer again and again, until cancelled."""
        while self._service.release is None:
            await asyncio.sleep(min(_SOON_S, self._poll_s))
        while True:
            try:
                await self.step()
            except Exception:
                # Nothing may end the following: the next look starts afresh.
                _log.exception("following the store failed")
            await self._until_next_look()

    async def step(self) -> None:
        """Look at the pointer once, and follow it if it has moved."""
        await self._look()
        if self._unloaded is not None:
            await self._take_back()

    async def _look(self) -> None:
        self._take_over_first_failure()
        await self._free_what_was_refused()
        if self._clock() > self._gone_by_s:
            await self._free_what_is_left()
        if self._new_model and self._service.retired.gone:
            await self._complete_model()
        try:
            active = await self._call(self._source.active)
        except ReleaseError as error:
            self._failed(None, error)
            self._drop_late_candidate()
            return
        self._drop_late_candidate()
        failure = self.status.failure
        # What was in the way of reading the pointer may have been in the way of the release.
        moved = active != self.status.active or (failure is not None and failure.release is None)
        self.status = StoreStatus(active, self.status.failure)
        serving = self._service.release
        served = None if serving is None else serving.version
        del serving  # must not be what keeps it in memory while the next one is loaded
        self._service.metrics.store_read(active, served)
        if active is None or served == active.release:
            self._succeeded()
            return
        if not moved and self._clock() < self._retry_at_s:
            return
        busy = self.busy
        async with self._loading:
            try:
                if busy and await self._call(self._source.active) != active:
                    return  # it has moved on while something was tried; the next look follows
                await self._switch_to(active.release)
            except Exception as error:
                if not isinstance(error, ReleaseError):
                    _log.exception("unexpected error while loading a release")
                self._failed(active.release, error)
            else:
                self._succeeded()
                return
            # Only now is what was half loaded held by nothing but itself.
            await self._call(free_garbage)

    @property
    def busy(self) -> bool:
        """Whether something is being loaded or tried."""
        return self._loading.locked()

    @property
    def ready_release(self) -> str | None:
        """Version of the release that is held ready for the pointer, None for none."""
        return None if self._candidate is None else self._candidate.version

    async def prepare(
        self,
        version: str,
        before: Callable[[Release], Awaitable[None]],
        after: Callable[[Release], Awaitable[bool]],
    ) -> None:
        """Load a release and hold it ready for the pointer to reach it.

        It is let go again where the pointer does not within a minute, or another is prepared.

        Args:
            version: of the release.
            before: called with what is served, before anything is loaded.
            after: called with what was loaded; False lets go of it at once.

        Raises:
            ReleaseError: it cannot be loaded.
        """
        async with self._loading:
            candidate, self._candidate = self._candidate, None
            if candidate is not None and candidate.version != version:
                self._discard(candidate)
                candidate = None
            accepted = False
            try:
                serving = self._service.release
                if serving is not None:
                    await before(serving)
                del serving
                if candidate is None:
                    candidate = await self._load(version)
                accepted = await after(candidate)
            finally:
                self._refused = self._refused or not accepted
                if not accepted and candidate is not None:
                    self._discard(candidate)
            if accepted:
                self._candidate = candidate
                self._candidate_until_s = self._clock() + _CANDIDATE_S
                self._prepared.set()

    async def stop(self) -> None:
        """Let go of the loader thread and of what it prepared."""
        self._stop.set()
        self._candidate = None
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _until_next_look(self) -> None:
        """Wait until it is time to look at the pointer: soon, where a release is held ready."""
        if self._candidate is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._prepared.wait()
        self._prepared.clear()
        if self._candidate is not None:
            await asyncio.sleep(min(_SOON_S, self._poll_s))

    async def _switch_to(self, version: str) -> None:
        """Serve a release; on failure nothing has changed."""
        started = self._clock()
        if self._candidate is not None and self._candidate.version == version:
            candidate, self._candidate = self._candidate, None
        else:
            self._drop_candidate()
            candidate = await self._load(version)
        new_model = _model_of(candidate) != _model_of(self._service.release)
        self._service.activate(candidate)
        self._unloaded = None
        self._service.metrics.swapped(self._clock() - started)
        self.news.set()
        self._new_model = self._new_model or new_model
        if new_model:
            # Models may hold themselves in cycles, and a device's memory is freed only with them.
            del candidate
            await self._call(free_garbage)
        self._gone_by_s = self._clock() + self._free_timeout_s

    async def _load(self, version: str) -> Release:
        """Load and try a release: beside the one served or, if it was drained, in its place."""
        self.loading = version
        try:
            return await self._load_beside(version)
        except NotEnoughMemoryError:
            if not (self._service.held and self._service.idle and self._service.release):
                raise
        finally:
            self.loading = None
        return await self._load_instead(version)

    async def _load_beside(self, version: str) -> Release:
        """Load and try a release while another is served."""
        await self._free_what_was_refused()
        if not await self._retired_gone():
            raise ReleaseError(
                f"the release before last is still in memory after {self._free_timeout_s:g} s; a "
                "third is not loaded beside it"
            )
        serving = self._service.release
        _log.info("loading a release", release=version, serving=serving and serving.version)
        try:
            candidate = await self._call(self._source.load, version, serving)
        except ReleaseError:
            raise
        except Exception:
            # It may be the device that is gone, of which the engine knows nothing while idle.
            if serving is not None:
                with suppress(ReleaseError):
                    await self._service.try_release(serving, _TRY_S)
            raise
        if serving is not None and candidate.engine is serving.engine:
            try:
                await self._service.try_release(candidate, _TRY_S)
            except BaseException:
                self._discard(candidate)
                raise
        return candidate

    async def _retired_gone(self) -> bool:
        """Wait for what was replaced to leave memory; False if it does not within the time.

        What keeps it there may be garbage in a cycle, though nothing of ours makes one, and the
        collector comes by itself too seldom.
        """
        left_s, wait_s = self._free_timeout_s, _FIRST_COLLECTION_S
        while left_s > 0:
            if await self._service.retired.wait_until_gone(min(wait_s, left_s)):
                return True
            await self._call(free_garbage)
            left_s, wait_s = left_s - wait_s, 2 * wait_s
        await self._free_what_is_left()
        return self._service.retired.gone

    async def _free_what_was_refused(self) -> None:
        """Free what :meth:`prepare` loaded in vain; what raised its error holds it no more."""
        if self._refused:
            self._refused = False
            await self._call(free_garbage)

    async def _free_what_is_left(self) -> None:
        """Free what was replaced, has nobody who uses it, and is in a cycle that is passed over."""
        self._gone_by_s = math.inf
        if not self._service.retired.gone:
            await self._call(free_garbage, collect_all)

    async def _complete_model(self) -> None:
        """Let the model that is served make what it had no memory for beside the one before."""
        async with self._loading:
            self._new_model = False
            serving = self._service.release
            if serving is not None:
                await self._call(serving.engine.get_ready, serving.trie)

    async def _load_instead(self, version: str) -> Release:
        """Load a release in the place of the one served, which a drained service can spare."""
        old = self._service.deactivate()
        assert old is not None
        old_version = old.version
        assert old_version is not None
        _log.warning("unloading a release to make room", release=old_version)
        self._unloaded = old_version
        self._service.retired.add(old, None)
        del old
        await self._call(free_garbage, collect_all)  # nobody waits meanwhile
        try:
            return await self._load_beside(version)
        except Exception as error:
            reason = _reason(error)
        # Here, where the error's frames hold nothing of the release that failed any more.
        await self._call(free_garbage)
        try:
            self._service.activate(await self._load_beside(old_version))
        except Exception as error:
            reason = f"{reason} (the release before cannot be loaded either: {_reason(error)})"
            raise ReleaseError(reason) from None
        self._unloaded = None
        raise ReleaseError(f"{reason} (the release before was loaded again)")

    async def _take_back(self) -> None:
        """Serve what was unloaded for a release that did not come, and could not be loaded again.

        Tried at every look: nothing is served until then.
        """
        async with self._loading:
            version = self._unloaded
            if version is None or self._candidate is not None:
                return
            try:
                self._service.activate(await self._load_beside(version))
            except Exception as error:
                _log.error("nothing is served", unloaded=version, reason=_reason(error))
                return
            self._unloaded = None
            self.news.set()

    def _drop_late_candidate(self) -> None:
        if self._candidate is not None and self._clock() > self._candidate_until_s:
            _log.warning("a release held ready was not activated", release=self._candidate.version)
            self._drop_candidate()

    def _drop_candidate(self) -> None:
        if self._candidate is not None:
            self._discard(self._candidate)
            self._candidate = None

    def _discard(self, candidate: Release) -> None:
        """Let go of what was loaded and is not going to be served."""
        self._service.retired.add(candidate, self._service.release)
        # On the thread that loads: what the engine made for it takes a while to free.
        self._pool.submit(candidate.engine.let_go, candidate.trie)

    def _take_over_first_failure(self) -> None:
        failure, self._source.first_failure = self._source.first_failure, None
        if failure is not None:
            self._failed(*failure)

    def _failed(self, release: str | None, error: Exception) -> None:
        known = self.status.failure
        again = known is not None and known.release == release
        attempts = known.attempts + 1 if known is not None and again else 1
        message = _reason(error)
        failure = SwapFailure(release, message, _now(), attempts)
        self.status = StoreStatus(self.status.active, failure)
        self._retry_at_s = self._clock() + min(_FIRST_RETRY_S * 2 ** (attempts - 1), _MAX_RETRY_S)
        self._service.metrics.swap_failed()
        self.news.set()
        serving = self._service.release
        _log.error(
            "the active release is not served",
            release=release,
            serving=serving and serving.version,
            reason=message,
            attempts=attempts,
        )

    def _succeeded(self) -> None:
        self.status = StoreStatus(self.status.active)
        self._retry_at_s = 0.0

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        """A blocking function's result, from the loader thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ReleaseError) else f"{type(error).__name__}: {error}"


def _model_of(release: Release | None) -> int | None:
    return None if release is None else id(release.engine)


def _yield_to_requests() -> None:
    """Let the scheduler prefer the threads that answer requests to the one that loads."""
    if sys.platform == "linux":  # where a thread has a niceness of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADER_NICENESS)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
