"""Keeps a proxy on the model and the catalog that are active in a store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from rectokens.artifacts.activation import Activation
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.release_store import ReleaseStore
from server.proxy.errors import ProxyError
from server.proxy.service import Proxy, load_parts
from server.settings import Settings

_log = structlog.get_logger(__name__)

# A release that could not be loaded, or a store that could not be read, is not tried all the time.
_TRY_AGAIN_S = 30.0


class ProxyFollower:
    """Follows a store as the servers behind the proxy do, on a thread of its own.

    Embeddings of one model mean nothing to another, so that a proxy must not stay behind. It gets
    there within ``store.poll_s`` and the time that a tokenizer takes to load; a prompt that is
    encoded at the very moment of a change may still meet the other model.

    Args:
        settings: of the proxy.
        store: what is followed.
    """

    def __init__(self, settings: Settings, store: ReleaseStore) -> None:
        self._settings = settings
        self._store = store
        self._sequence = 0
        self._stop = threading.Event()

    def first(self) -> tuple[Path, Path]:
        """Folders of the model and the catalog that are active.

        Raises:
            ProxyError: none are, or they cannot be read.
        """
        try:
            active = self._store.active()
            if active is None:
                raise ProxyError(f"no release is active in the store {self._settings.store.path}")
            folders = self._folders(active)
        except (ArtifactError, OSError) as error:
            raise ProxyError(str(error)) from error
        self._sequence = active.sequence
        return folders

    def look(self, proxy: Proxy) -> bool:
        """Give the proxy what is active, if that is not what it has.

        Returns:
            Whether there was something new.

        Raises:
            ProxyError: it cannot be used.
            ArtifactError: it is damaged, or the store is.
            OSError: the store cannot be read.
        """
        active = self._store.active()
        if active is None:
            return False
        proxy.metrics.store_read(active, self._sequence)
        if active.sequence == self._sequence:
            return False
        with suppress(Exception):  # to make room; should it be needed, the copying says so
            self._store.clean_local()
        proxy.replace(load_parts(self._settings.proxy, *self._folders(active)))
        self._sequence = active.sequence
        proxy.metrics.store_read(active, self._sequence)
        _log.info("following", release=active.release)
        return True

    @contextmanager
    def following(self, proxy: Proxy) -> Iterator[None]:
        """Look again and again meanwhile."""
        thread = threading.Thread(target=self._run, args=[proxy], name="follow", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(5)

    def _folders(self, active: Activation) -> tuple[Path, Path]:
        release = self._store.open_release(active.release)
        return release.model_path, release.catalog_path

    def _run(self, proxy: Proxy) -> None:
        wait_s = self._settings.store.poll_s
        while not self._stop.wait(wait_s):
            try:
                self.look(proxy)
                wait_s = self._settings.store.poll_s
            except Exception as error:
                proxy.metrics.follow_failed()
                # Drivers of object stores each have errors of their own.
                _log.error("not following; keeping what is served", reason=str(error))
                wait_s = max(_TRY_AGAIN_S, self._settings.store.poll_s)
