"""Following a store: what failed for a reason that has passed is put right, and leaves nothing."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest
import torch

from server.engine.types import EngineBrokenError
from server.release import ReleaseError
from server.release_source import ReleaseSource
from server.settings import load_settings
from tests.server.following_cases import follower_of, served, start
from tests.waiting import until


async def test_what_was_unloaded_comes_back_when_it_can_be_loaded_again(
    start_app, small_store, tiny_lm
):
    """Both failed: the new one for good, the old one for a moment."""
    running = await start(start_app, small_store)
    old = weakref.ref(running.service.release.engine)
    source = running.app.state.link._source
    source._available = lambda device: 1 << 40 if old() is None else 20_000
    load, moments = source.load, [1, 2, 3]

    def load_or_fail(version, beside):
        if old() is None and version == small_store.releases[2]:
            raise ReleaseError("made to order")
        if old() is None and moments:
            moments.pop()
            raise ReleaseError("the disk was away")
        return load(version, beside)

    source.load = load_or_fail
    assert await running.service.hold(10)
    small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
    small_store.activate(2)
    await until(lambda: moments == [])
    await served(running, 1, small_store)
    assert "made to order" in follower_of(running).status.failure.message
    running.service.resume()
    assert (await running.post({"history": ["1-1"]})).status_code == 200


async def test_what_failed_while_the_store_was_away_is_tried_as_soon_as_it_is_back(
    start_app, small_store, monkeypatch
):
    """However often the store was looked at in vain."""
    monkeypatch.setattr("server.catalogs._FIRST_RETRY_S", 3_600.0)
    monkeypatch.setattr("server.catalogs._MAX_RETRY_S", 7_200.0)
    running = await start(start_app, small_store)
    source, follower = running.app.state.link._source, follower_of(running)
    load, active = source.load, source.active

    def away(*_):
        raise ReleaseError("no route to host")

    source.load = away
    small_store.add(2)
    small_store.activate(2)
    await until(lambda: follower.status.failure and follower.status.failure.release)
    source.active = away
    await until(lambda: follower.status.failure.release is None)
    source.load, source.active = load, active
    await served(running, 2, small_store)
    assert (await running.client.get("/ready")).json()["store"]["failure"] is None


async def test_what_is_held_ready_is_let_go_in_time_though_the_store_is_away(
    start_app, small_store, monkeypatch
):
    monkeypatch.setattr("server.catalogs._CANDIDATE_S", 0.2)
    running = await start(start_app, small_store)
    small_store.add(2)
    follower, source = follower_of(running), running.app.state.link._source

    def away():
        raise ReleaseError("no route to host")

    async def before(serving):
        pass

    async def after(candidate):
        source.active = away
        return True

    await follower.prepare(small_store.releases[2], before, after)
    await until(lambda: follower.ready_release is None)
    await until(lambda: running.service.retired.gone)


async def test_what_was_held_ready_is_known_to_be_let_go_where_another_try_fails(
    start_app, small_store
):
    """Whatever is still in memory counts, or a third release would be loaded beside it."""
    running = await start(start_app, small_store)
    small_store.add(2)
    follower = follower_of(running)
    kept = []

    async def before(serving):
        if kept:
            raise RuntimeError("made to order")

    async def after(candidate):
        kept.append(candidate)
        return True

    await follower.prepare(small_store.releases[2], before, after)
    with pytest.raises(RuntimeError, match="made to order"):
        await follower.prepare(small_store.releases[2], before, after)
    assert follower.ready_release is None
    assert not running.service.retired.gone
    kept.clear()
    await until(lambda: running.service.retired.gone)


@pytest.mark.parametrize("error", [ReleaseError("no"), torch.OutOfMemoryError("no")])
def test_at_the_start_the_one_before_has_the_memory_of_the_one_that_failed(
    small_store, tiny_lm, monkeypatch, no_settings, error
):
    small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
    small_store.activate(2)
    settings = load_settings({"store.path": str(small_store.root), "engine.kv_memory_mib": "4"})
    source = ReleaseSource(settings, small_store.store)
    engines: list[weakref.ref] = []

    def tried(release):
        gone = [engine() is None for engine in engines]
        engines.append(weakref.ref(release.engine))
        if not gone:
            raise error
        assert gone == [True]

    monkeypatch.setattr("server.release_source.warm_up", tried)
    gc.disable()
    try:
        assert source.load_first(1.0, None).version == small_store.releases[1]
    finally:
        gc.enable()
    assert len(engines) == 2
    version, why = source.first_failure
    assert version == small_store.releases[2]
    assert "no" in str(why)


@pytest.mark.parametrize("way", ["refused", "late", "search fails"])
async def test_an_engine_is_told_of_a_catalog_that_it_will_not_search(
    start_app, small_store, monkeypatch, way
):
    """It may have made for it what takes as much memory as all its searches."""
    monkeypatch.setattr("server.catalogs._CANDIDATE_S", 0.2)
    running = await start(start_app, small_store)
    engine, follower = running.service.release.engine, follower_of(running)
    made, let_go, run = [], [], engine.run
    engine.get_ready = lambda trie: made.append(weakref.ref(trie.row_ptrs))
    engine.let_go = lambda trie: let_go.append(trie.row_ptrs is made[-1]())

    def fails_on_the_new(prepared, *rest):
        if prepared.trie.num_items == 50 and way == "search fails":
            raise RuntimeError("made to order")
        return run(prepared, *rest)

    engine.run = fails_on_the_new
    small_store.add(2, items=50)

    async def before(serving):
        pass

    async def after(candidate):
        return way == "late"

    with suppress(ReleaseError):
        await follower.prepare(small_store.releases[2], before, after)
    await until(lambda: let_go)
    assert let_go == [True]
    await until(lambda: running.service.retired.gone and made[0]() is None)


@pytest.mark.parametrize("step", ["get_ready", "load_parts", "warm_up"])
async def test_a_device_that_is_lost_while_a_release_is_loaded_fails_health(
    start_app, small_store, tiny_lm, monkeypatch, step
):
    """Though nobody asks the engine for anything."""
    running = await start(start_app, small_store)
    engine = running.service.release.engine

    def lost(*_):
        raise EngineBrokenError("unspecified launch failure")

    def failed(*_, **__):
        raise torch.AcceleratorError("unspecified launch failure")

    engine.run = lost
    model = None
    if step == "get_ready":
        engine.get_ready = failed
    elif step == "load_parts":
        monkeypatch.setattr("server.release_source.load_parts", failed)
    else:
        monkeypatch.setattr("server.release_source.warm_up", lost)
        model = small_store.add_model(tiny_lm("llama", seed=3))
    assert (await running.client.get("/health")).status_code == 200
    small_store.add(2, model=model)
    small_store.activate(2)

    async def is_dead():
        return (await running.client.get("/health")).status_code == 503

    await until(is_dead)


async def test_what_a_model_had_no_memory_for_is_made_once_the_one_before_has_gone(
    start_app, small_store, tiny_lm, monkeypatch
):
    running = await start(start_app, small_store)
    kept = running.service.release  # somebody still uses it
    asked = []
    monkeypatch.setattr(
        "server.engine.engine.Engine.get_ready", lambda engine, trie: asked.append((engine, trie))
    )
    small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
    small_store.activate(2)
    await served(running, 2, small_store)
    looks, active = [], running.app.state.link._source.active
    running.app.state.link._source.active = lambda: (looks.append(1), active())[1]
    await until(lambda: len(looks) > 3)
    assert asked == []
    del kept
    await until(lambda: asked)
    looks.clear()
    await until(lambda: len(looks) > 3)
    release = running.service.release
    assert asked == [(release.engine, release.trie)]


async def test_a_model_that_could_not_be_held_ready_is_freed(
    start_app, small_store, tiny_lm, monkeypatch
):
    """Models may hold themselves in cycles, and its memory is wanted for the next try."""
    running = await start(start_app, small_store)
    failed: list[weakref.ref] = []

    def warm_up(release):
        module = next(iter(release.engine.modules))
        module.itself = [module]
        failed.append(weakref.ref(module))
        raise ReleaseError("made to order")

    monkeypatch.setattr("server.release_source.warm_up", warm_up)
    small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))

    async def before(serving):
        pass

    async def after(candidate):
        return True

    gc.collect()
    gc.disable()
    try:
        with suppress(ReleaseError):
            await follower_of(running).prepare(small_store.releases[2], before, after)
        await until(lambda: failed and failed[0]() is None)
    finally:
        gc.enable()
