"""Following a store whose files are damaged: the old version serves on, and it is said why."""

from __future__ import annotations

import pytest
import structlog

from tests.server.following_cases import follower_of, force_active, served, start
from tests.waiting import until


@pytest.mark.parametrize("file", ["catalog/items.parquet", "catalog/trie.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
async def test_a_damaged_file_is_named_and_the_old_version_serves_on(
    start_app, small_store, file, damage, monkeypatch
):
    monkeypatch.setattr("server.catalogs._FIRST_RETRY_S", 3_600.0)
    running = await start(start_app, small_store)
    small_store.add(2)
    small_store.activate(2)
    await served(running, 2, small_store)
    small_store.activate(1)
    await served(running, 1, small_store)
    victim = small_store.root / "catalogs" / small_store.catalogs[2] / file.split("/")[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content if damage == "flip" else content[:-9])
    # The store refuses it by itself, so the pointer is moved behind its back.
    with pytest.raises(ValueError, match=victim.name):
        small_store.activate(2)
    with structlog.testing.capture_logs() as logs:
        force_active(small_store, 2)
        await until(lambda: follower_of(running).status.failure is not None)
    (said,) = [log for log in logs if log["event"] == "the active release is not served"]
    assert victim.name in said["reason"]
    assert said["log_level"] == "error"
    assert running.service.release.version == small_store.releases[1]
    assert (await running.post({"history": []})).status_code == 200
    ready = (await running.client.get("/ready")).json()
    assert ready["release_version"] == small_store.releases[1]
    assert ready["store"]["failure"]["release"] == small_store.releases[2]
    assert victim.name in ready["store"]["failure"]["message"]
    assert await running.metric("rectokens_swap_failures_total") == 1
    assert await running.metric("rectokens_release_behind") == 1
    # It is not tried again and again, but a pointer that moves is followed at once.
    small_store.add(3)
    small_store.activate(3)
    await served(running, 3, small_store)
    assert (await running.client.get("/ready")).json()["store"]["failure"] is None
    assert await running.metric("rectokens_release_behind") == 0


@pytest.mark.parametrize("damage", ["flip", "truncate"])
@pytest.mark.parametrize(
    "place", ["models/*/model.safetensors", "models/*/config.json", "releases/*/release.json"]
)
async def test_a_damaged_model_or_release_is_named_too(
    start_app, small_store, tiny_lm, place, damage
):
    running = await start(start_app, small_store)
    model = small_store.add_model(tiny_lm("llama", seed=3))
    small_store.add(2, model=model)
    kind, _, name = place.split("/")
    version = model if kind == "models" else small_store.releases[2]
    victim = small_store.root / kind / version / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x01
    victim.write_bytes(content if damage == "flip" else content[:-1])
    force_active(small_store, 2)
    await until(lambda: follower_of(running).status.failure is not None)
    assert victim.name in follower_of(running).status.failure.message
    assert running.service.release.version == small_store.releases[1]
    assert (await running.post({"history": []})).status_code == 200
