"""Loading the releases of a store, one beside another."""

from __future__ import annotations

import threading

import structlog
import torch

from rectokens.artifacts.activation import Activation
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.release_store import ReleaseStore
from server.errors import let_go
from server.heap import free_garbage
from server.memory import AvailableBytes, available_bytes, memory_need, require_room
from server.release import Release, ReleaseError, load_parts, warm_up
from server.settings import Settings

_log = structlog.get_logger(__name__)


class ReleaseSource:
    """Loads releases of a store for a service. Everything here blocks.

    Args:
        settings: of the service.
        store: where releases come from.
        available: bytes that are free on a device.

    Attributes:
        first_failure: the active release that could not be loaded at the start, and why, if the
            one before it is served in its place.
    """

    def __init__(
        self,
        settings: Settings,
        store: ReleaseStore,
        available: AvailableBytes = available_bytes,
    ) -> None:
        self._settings = settings
        self._store = store
        self._available = available
        self.first_failure: tuple[str, Exception] | None = None

    def active(self) -> Activation | None:
        """The store's record of what is active.

        Raises:
            ReleaseError: it cannot be read.
        """
        try:
            return self._store.active()
        except Exception as error:
            raise ReleaseError(f"the store cannot be read: {_told(error)}") from error

    def load(self, version: str, beside: Release | None) -> Release:
        """Load a release, verify it and, where it brings its own model, try it.

        Args:
            version: of the release.
            beside: what is served; its model is kept where it is the same. Such a release has
                not been tried: its engine belongs to another thread.

        Raises:
            ReleaseError: a part is missing or damaged (names the file), does not fit the other
                or the memory, or the model cannot search.
        """
        self._forget_copies()
        try:
            artifact = self._store.open_release(version)
        except Exception as error:
            raise ReleaseError(_told(error)) from error
        try:
            kept = beside is not None and beside.model_version == artifact.model_version
            device = _device(self._settings) if beside is None else beside.trie.device
            need = memory_need(
                artifact.catalog_path,
                None if kept else artifact.model_path,
                device,
                self._settings.dtype,
                _prompt_bytes(self._settings, device),
            )
        except (ArtifactError, OSError) as error:
            raise ReleaseError(str(error)) from error
        require_room(need, device, self._available)
        release = load_parts(
            self._settings,
            artifact.model_path,
            artifact.catalog_path,
            version=version,
            beside=beside if kept else None,
        )
        if beside is not None:
            release.catalog.prepare_sets_of(beside.catalog)
        if kept:
            try:
                release.engine.get_ready(release.trie)
            except ValueError as error:
                raise ReleaseError(str(error)) from error
        else:
            warm_up(release)
        return release

    def load_first(self, poll_s: float, stop: threading.Event) -> Release:
        """Load the active release; waits for one where the store has none yet.

        An active release that cannot be loaded is passed over for the one before it, if there is
        one: a service with yesterday's catalog is better than none. ``first_failure`` tells.

        Args:
            poll_s: seconds between two looks while there is none.
            stop: ends the wait.

        Raises:
            ReleaseError: neither could be loaded, or the store cannot be read at the first look; or
                the wait was ended.
        """
        active = self.active()
        if active is None:
            _log.warning("no release is active in the store yet; waiting for one")
        while active is None:
            if stop.wait(poll_s):
                raise ReleaseError("stopped before a release was active")
            try:
                active = self.active()
            except ReleaseError as error:
                _log.error("still waiting for a release", reason=str(error))
        try:
            return self.load(active.release, None)
        except Exception as error:
            if active.previous is None:
                raise
            why = error
        _log.error(
            "the active release cannot be loaded; taking the one before",
            release=active.release,
            previous=active.previous,
            reason=str(why),
            exc_info=None if isinstance(why, ReleaseError) else why,
        )
        # What was loaded of it is in the error's frames, and the one before needs the memory.
        let_go(why)
        free_garbage()
        try:
            release = self.load(active.previous, None)
        except Exception:
            raise why from None
        self.first_failure = (active.release, why)
        return release

    def _forget_copies(self) -> None:
        """Make room for the copy of another release; a host that runs no jobs has nobody else."""
        try:
            removed = self._store.clean_local()
        except Exception as error:
            _log.warning("copies of the store cannot be cleaned", reason=_told(error))
        else:
            if removed:
                _log.info("copies removed", removed=removed)


def _told(error: Exception) -> str:
    """Drivers of object stores each have errors of their own, which only their names explain."""
    ours = isinstance(error, (ArtifactError, OSError))
    return str(error) if ours else f"{type(error).__name__}: {error}"


def _device(settings: Settings) -> torch.device:
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prompt_bytes(settings: Settings, device: torch.device) -> int:
    """What a model takes to keep prompts in; a GPU's default is a share of what is free then.

    On a GPU attention reads prompts there whether or not they are kept from batch to batch.
    """
    engine = settings.engine
    if device.type == "cpu" and not engine.prefix_cache:
        return 0
    if engine.kv_memory_mib is not None:
        return engine.kv_memory_mib << 20
    if device.type != "cpu":
        return 0
    # Here, because transformers takes seconds that a refused release should not cost.
    from server.engine.pool_setup import DEFAULT_CPU_BYTES

    return DEFAULT_CPU_BYTES
