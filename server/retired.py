"""Releases that are served no more, for as long as they are in memory."""

from __future__ import annotations

import asyncio
import weakref

from server.release import Release

_LOOK_AGAIN_S = 0.02


class RetiredReleases:
    """Knows when what was replaced has gone: when the last batch that used it is done.

    Nothing is freed here and nothing is kept alive: references are weak.
    """

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[object] = weakref.WeakSet()

    def add(self, release: Release, successor: Release | None) -> None:
        """A release was replaced; what its successor still uses does not count."""
        self._alive.add(release)
        if successor is None or successor.catalog is not release.catalog:
            self._alive.add(release.catalog)
        if successor is None or successor.engine is not release.engine:
            self._alive.add(release.engine)
            # A model in a cycle outlives its engine, and its memory is most of all.
            self._alive.update(release.engine.modules)

    @property
    def gone(self) -> bool:
        """Whether all of it has left memory."""
        return not self._alive

    async def wait_until_gone(self, timeout_s: float) -> bool:
        """Wait until all of it has left memory.

        Returns:
            Whether it had within ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self.gone:
                    await asyncio.sleep(_LOOK_AGAIN_S)
        except TimeoutError:
            return False
        return True
