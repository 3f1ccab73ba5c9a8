"""A service that follows a small store."""

from __future__ import annotations

from rectokens.artifacts.activation import next_activation
from tests.waiting import until

FAST = {"store__poll_s": "0.02"}


async def start(start_app, small_store, **flags):
    return await start_app(store__path=str(small_store.root), **{**FAST, **flags})


def follower_of(running):
    return running.app.state.link.follower


async def served(running, number, small_store):
    def is_so():
        release = running.service.release
        return release is not None and release.version == small_store.releases[number]

    await until(is_so)


def force_active(small_store, number):
    """Move the pointer without the checks of the store."""
    storage = small_store.store._storage
    assert storage.commit(next_activation(storage.current(), small_store.releases[number], None))
