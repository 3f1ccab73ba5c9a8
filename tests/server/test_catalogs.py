"""Following a store: the swap, what it leaves in memory, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import weakref
from functools import partial

import fsspec
import pytest
import torch

from rectokens.artifacts.open_store import open_release_store
from server.memory import NotEnoughMemoryError
from server.release import ReleaseError
from server.release_source import ReleaseSource
from server.settings import load_settings
from tests.server.following_cases import FAST, follower_of, served, start
from tests.waiting import LIMIT_S, until


def only_of(answer, number):
    return all(item["item_id"].startswith(f"{number}-") for item in answer["items"])


async def test_it_starts_with_what_is_active_and_follows_the_pointer(start_app, small_store):
    running = await start(start_app, small_store)
    engine = running.service.release.engine
    answer = (await running.post({"history": ["1-3"], "top_k": 5})).json()
    assert answer["catalog_version"] == small_store.catalogs[1]
    assert len(answer["items"]) == 5
    assert only_of(answer, 1)

    small_store.add(2, items=50)
    small_store.activate(2)
    await served(running, 2, small_store)
    answer = (await running.post({"history": ["2-3"], "top_k": 5})).json()
    assert answer["catalog_version"] == small_store.catalogs[2]
    assert only_of(answer, 2)
    assert running.service.release.engine is engine  # the model was not loaded again

    small_store.store.rollback()
    await served(running, 1, small_store)
    assert only_of((await running.post({"history": []})).json(), 1)

    ready = (await running.client.get("/ready")).json()
    assert ready["release_version"] == small_store.releases[1]
    assert ready["store"]["active_release"] == small_store.releases[1]
    assert ready["store"]["failure"] is None
    assert 0 <= ready["active_s"] < 60
    assert 0 <= ready["catalog_age_s"] < 600
    assert await running.metric("rectokens_swap_seconds_count") == 2
    assert await running.metric("rectokens_release_behind") == 0
    assert await running.metric("rectokens_store_activations") == 3
    assert await running.metric("rectokens_catalog_items") == 40
    assert 0 <= await running.metric("rectokens_catalog_age_seconds") < 600


async def test_constraint_sets_in_use_are_counted_before_the_swap(start_app, small_store):
    running = await start(start_app, small_store)
    await running.post({"history": ["1-3"], "constraint_set": "even"})
    small_store.add(2)
    small_store.activate(2)
    await served(running, 2, small_store)
    assert running.service.release.catalog._prefixes.names() == [("even",)]


async def test_what_was_replaced_leaves_memory_with_its_last_batch(start_app, small_store):
    running = await start(start_app, small_store)
    await running.post({"history": ["1-3"], "constraint_set": "even"})
    release = running.service.release
    remains = [weakref.ref(one) for one in (release, release.catalog, release.trie.codes)]
    del release
    gc.disable()  # what is freed is freed by its last user, not by a later collection
    try:
        small_store.add(2)
        small_store.activate(2)
        await served(running, 2, small_store)
        await until(lambda: running.service.retired.gone)
        await until(lambda: [one() for one in remains] == [None, None, None])
    finally:
        gc.enable()


async def test_a_running_batch_keeps_the_version_it_was_admitted_under(start_app, small_store):
    running = await start(start_app, small_store)
    engine = running.service.release.engine
    inside, go_on = asyncio.Event(), asyncio.Event()
    loop, run = asyncio.get_running_loop(), engine.run
    held = []

    def slow_run(prepared, *args):
        if not held:
            held.append(True)
            loop.call_soon_threadsafe(inside.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(LIMIT_S)
        return run(prepared, *args)

    engine.run = slow_run
    old = asyncio.create_task(running.post({"history": ["1-1"]}))
    await inside.wait()
    small_store.add(2)
    small_store.activate(2)
    # The new version is tried by a search between two batches, so it waits for the old one.
    await until(lambda: follower_of(running).loading == small_store.releases[2])
    await asyncio.sleep(0.2)
    assert running.service.release.version == small_store.releases[1]
    go_on.set()
    answer = (await old).json()
    assert answer["catalog_version"] == small_store.catalogs[1]
    assert only_of(answer, 1)
    await served(running, 2, small_store)


async def test_a_catalog_is_made_ready_on_the_loader_thread_before_it_is_tried(
    start_app, small_store
):
    running = await start(start_app, small_store)
    engine = running.service.release.engine
    get_ready, search, done = engine.get_ready, engine.run, []

    def noting_ready(trie):
        done.append(("ready", threading.current_thread().name.partition("_")[0], trie.num_items))
        get_ready(trie)

    def noting_run(prepared, *args):
        done.append(("run", threading.current_thread().name, None))
        return search(prepared, *args)

    engine.get_ready, engine.run = noting_ready, noting_run
    small_store.add(2, items=50)
    small_store.activate(2)
    await served(running, 2, small_store)
    assert done[0] == ("ready", "follow", 50)
    assert done[1][:2] == ("run", "engine")
    assert len(done) == 2


async def test_a_third_version_waits_until_the_first_has_gone(start_app, small_store):
    running = await start(start_app, small_store)
    kept = running.service.release  # somebody still uses it
    for number in (2, 3):
        small_store.add(number)
    small_store.activate(2)
    await served(running, 2, small_store)
    small_store.activate(3)
    await until(lambda: follower_of(running).loading == small_store.releases[3])
    await asyncio.sleep(0.3)
    assert running.service.release.version == small_store.releases[2]
    del kept
    await served(running, 3, small_store)


@pytest.mark.parametrize("passed_over", [False, True], ids=["young", "passed over"])
async def test_a_third_version_does_not_wait_for_the_garbage_collector(
    start_app, small_store, passed_over
):
    running = await start(start_app, small_store)
    cycle = [running.service.release]  # nobody uses it, as after a request that failed
    cycle.append(cycle)
    for number in (2, 3):
        small_store.add(number)
    gc.collect()
    gc.disable()
    if passed_over:
        follower_of(running)._free_timeout_s = 0.3
        gc.freeze()  # as at the end of a process's start
    try:
        del cycle
        small_store.activate(2)
        await served(running, 2, small_store)
        small_store.activate(3)
        await served(running, 3, small_store)
    finally:
        gc.enable()
        gc.unfreeze()


async def test_a_replaced_model_that_holds_itself_is_freed(start_app, small_store, tiny_lm):
    running = await start(start_app, small_store)
    follower = follower_of(running)
    follower._free_timeout_s = 0.2
    module = next(iter(running.service.release.engine.modules))
    module.itself = [module]
    left = weakref.ref(module)
    del module
    small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
    gc.collect()
    gc.disable()
    gc.freeze()  # as at the end of a process's start
    try:
        small_store.activate(2)
        await served(running, 2, small_store)
        await until(lambda: left() is None)
        await until(lambda: running.service.retired.gone)
    finally:
        gc.enable()
        gc.unfreeze()


async def test_a_new_model_is_loaded_beside_the_old_one(start_app, small_store, tiny_lm):
    running = await start(start_app, small_store)
    old = weakref.ref(running.service.release.engine)
    small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
    small_store.activate(2)
    await served(running, 2, small_store)
    assert (await running.post({"history": ["2-1"]})).status_code == 200
    await until(lambda: old() is None)


async def test_an_unreadable_pointer_leaves_the_old_version_serving(start_app, small_store):
    running = await start(start_app, small_store)
    pointer = small_store.root / "active.json"
    content = pointer.read_bytes()
    pointer.write_bytes(b"{")
    await until(lambda: follower_of(running).status.failure is not None)
    failure = (await running.client.get("/ready")).json()["store"]["failure"]
    assert failure["release"] is None
    assert "active.json" in failure["message"]
    assert (await running.post({"history": []})).status_code == 200
    pointer.write_bytes(content)
    await until(lambda: follower_of(running).status.failure is None)


async def test_a_store_that_is_away_leaves_the_old_version_serving(start_app, small_store):
    running = await start(start_app, small_store)
    source = running.app.state.link._source
    active = source._store.active

    class DriverError(Exception):
        pass

    def away():
        raise DriverError("no route to host")

    source._store.active = away
    await until(lambda: follower_of(running).status.failure is not None)
    failure = (await running.client.get("/ready")).json()["store"]["failure"]
    assert "DriverError: no route to host" in failure["message"]
    assert (await running.post({"history": []})).status_code == 200
    source._store.active = active
    await until(lambda: follower_of(running).status.failure is None)


async def test_two_hosts_on_an_object_store(start_app, small_store, tmp_path):
    url = f"memory://{tmp_path.name}/store"
    bucket = fsspec.filesystem("memory")
    for path in sorted(small_store.root.rglob("*")):
        name = path.relative_to(small_store.root).as_posix()
        if path.is_file() and name.count("/") == 2:  # artifacts, without the pointer
            bucket.pipe_file(f"/{tmp_path.name}/store/{name}", path.read_bytes())
    remote = open_release_store(url, cache=tmp_path / "operator")
    remote.activate(small_store.releases[1])
    hosts = [
        await start_app(store__path=url, store__cache=str(tmp_path / host), **FAST)
        for host in ("one", "two")
    ]
    small_store.add(2)
    for kind, versions in (("catalogs", small_store.catalogs), ("releases", small_store.releases)):
        folder = small_store.root / kind / versions[2]
        for path in folder.iterdir():
            bucket.pipe_file(
                f"/{tmp_path.name}/store/{kind}/{versions[2]}/{path.name}", path.read_bytes()
            )
    remote.activate(small_store.releases[2])
    for host in hosts:
        await served(host, 2, small_store)
        answer = (await host.post({"history": ["2-3"]})).json()
        assert answer["catalog_version"] == small_store.catalogs[2]
        assert only_of(answer, 2)
    assert (tmp_path / "one" / "catalogs" / small_store.catalogs[2]).is_dir()


async def test_a_start_with_a_broken_active_release_serves_the_one_before_and_says_so(
    start_app, small_store
):
    small_store.add(2)
    small_store.activate(2)
    shutil.rmtree(small_store.root / "catalogs" / small_store.catalogs[2])
    running = await start(start_app, small_store)
    assert running.service.release.version == small_store.releases[1]
    await until(lambda: follower_of(running).status.failure is not None)
    failure = (await running.client.get("/ready")).json()["store"]["failure"]
    assert failure["release"] == small_store.releases[2]
    assert small_store.catalogs[2] in failure["message"]


async def test_a_start_with_nothing_but_a_broken_release_fails_with_its_reason(
    start_app, small_store
):
    shutil.rmtree(small_store.root / "catalogs" / small_store.catalogs[1])
    running = await start(start_app, small_store, wait=False)
    await until(lambda: running.service.load_error is not None)
    assert isinstance(running.service.load_error, ReleaseError)
    assert small_store.catalogs[1] in str(running.service.load_error)


async def test_an_empty_store_is_waited_for(start_app, tmp_path, tiny_lm, stores):
    root = tmp_path / "later"
    root.mkdir()
    running = await start_app(store__path=str(root), wait=False, **FAST)
    await asyncio.sleep(0.1)
    assert (await running.client.get("/ready")).status_code == 503
    stores.make_store(root, tiny_lm("qwen3"))
    await until(lambda: running.service.phase == "ready")
    assert (await running.post({"history": []})).status_code == 200


async def test_a_search_that_fails_on_the_new_catalog_keeps_the_old(start_app, small_store):
    running = await start(start_app, small_store)
    engine = running.service.release.engine
    run = engine.run

    def run_or_fail(prepared, *args):
        if prepared.trie.num_items == 50:
            raise RuntimeError("made to order")
        return run(prepared, *args)

    engine.run = run_or_fail
    small_store.add(2, items=50)
    small_store.activate(2)
    await until(lambda: follower_of(running).status.failure is not None)
    assert "made to order" in follower_of(running).status.failure.message
    assert running.service.release.version == small_store.releases[1]


class TestMemory:
    async def test_a_model_that_does_not_fit_is_refused_with_the_bytes_missing(
        self, start_app, small_store, tiny_lm
    ):
        running = await start(start_app, small_store)
        running.app.state.link._source._available = lambda device: 20_000
        small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
        small_store.activate(2)
        await until(lambda: follower_of(running).status.failure is not None)
        message = follower_of(running).status.failure.message
        assert "bytes are missing" in message
        assert "drain" in message
        assert running.service.release.version == small_store.releases[1]

    async def test_a_drained_service_loads_it_in_the_place_of_the_old(
        self, start_app, small_store, tiny_lm
    ):
        running = await start(start_app, small_store)
        old = weakref.ref(running.service.release.engine)

        def available(device):
            return 1 << 40 if old() is None else 20_000

        running.app.state.link._source._available = available
        assert await running.service.hold(10)
        small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
        small_store.activate(2)
        await until(
            lambda: (
                running.service.release is not None
                and running.service.release.version == small_store.releases[2]
            )
        )
        assert (await running.client.get("/ready")).status_code == 503
        running.service.resume()
        assert (await running.post({"history": ["2-1"]})).status_code == 200

    async def test_a_drained_service_takes_the_old_one_back_if_the_new_one_fails(
        self, start_app, small_store, tiny_lm
    ):
        key = "a-key-of-the-tests"
        running = await start(start_app, small_store, admin__keys=key)
        old = weakref.ref(running.service.release.engine)
        source = running.app.state.link._source
        source._available = lambda device: 1 << 40 if old() is None else 20_000
        load = source.load

        def load_or_fail(version, beside):
            if old() is None and version == small_store.releases[2]:
                raise ReleaseError("made to order")
            return load(version, beside)

        source.load = load_or_fail
        assert await running.service.hold(10)
        small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
        small_store.activate(2)
        await until(lambda: follower_of(running).status.failure is not None)
        assert "made to order" in follower_of(running).status.failure.message
        assert running.service.release.version == small_store.releases[1]
        # A drained service is not ready; the operator sees the reason all the same.
        releases = await running.client.get(
            "/admin/releases", headers={"Authorization": f"Bearer {key}"}
        )
        told = releases.json()
        assert told["served"] == small_store.releases[1]
        assert told["store"]["failure"]["release"] == small_store.releases[2]
        assert "made to order" in told["store"]["failure"]["message"]
        running.service.resume()
        assert (await running.post({"history": ["1-1"]})).status_code == 200

    def test_the_error_names_what_is_missing(self):
        error = NotEnoughMemoryError("the release", 1_000, 400)
        assert error.missing_bytes == 600
        assert "600 bytes are missing" in str(error)

    async def test_what_the_new_model_keeps_prompts_in_counts(
        self, start_app, small_store, tiny_lm
    ):
        running = await start(start_app, small_store, engine__kv_memory_mib="64")
        running.app.state.link._source._available = lambda device: 64 << 20
        small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
        small_store.activate(2)
        await until(lambda: follower_of(running).status.failure is not None)
        assert "bytes are missing" in follower_of(running).status.failure.message
        # A catalog for the model that is there needs no such room.
        small_store.add(3)
        small_store.activate(3)
        await served(running, 3, small_store)

    @pytest.mark.parametrize(("device", "refused"), [("cuda", True), ("cpu", False)])
    def test_a_gpu_takes_that_room_even_where_nothing_is_kept(self, small_store, device, refused):
        settings = load_settings(
            {"device": device, "engine": {"prefix_cache": False, "kv_memory_mib": 64}}
        )
        source = ReleaseSource(settings, small_store.store, lambda place: 64 << 20)
        small_store.add(2)
        load = partial(source.load, small_store.releases[2], None)
        if refused:
            with pytest.raises(NotEnoughMemoryError, match="bytes are missing"):
                load()
        else:
            assert load().engine.prefix_cache is None


async def test_a_pointer_that_moves_on_while_it_waits_is_not_followed_to_where_it_was(
    start_app, small_store
):
    running = await start(start_app, small_store)
    follower, switched = follower_of(running), []
    activate = running.service.activate

    def told(release):
        switched.append(release.version)
        activate(release)

    def seen():
        return follower.status.active and follower.status.active.release

    running.service.activate = told
    small_store.add(2)
    small_store.add(3)
    async with follower._loading:  # as while a release is rehearsed
        small_store.activate(2)
        await until(lambda: seen() == small_store.releases[2])
        small_store.activate(3)
    await served(running, 3, small_store)
    assert switched == [small_store.releases[3]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(small_store):
    source = ReleaseSource(load_settings({"device": "cuda"}), small_store.store)
    with pytest.raises(ReleaseError, match="torch finds no GPU; use auto or cpu"):
        source.load_first(0.01, threading.Event())
