"""The server as a process of its own: a real one, and one that cannot start."""

from __future__ import annotations

import httpx
import pytest

from rectokens.artifacts.store import ArtifactStore
from server.demo.running import ServerStartError, serving
from tests.waiting import LIMIT_S


def test_a_server_that_cannot_start_says_why(tmp_path):
    with (
        pytest.raises(ServerStartError, match=r"exited with status 1:[\s\S]*nowhere"),
        serving(tmp_path / "nowhere"),
    ):
        pass


def test_a_server_that_is_too_slow_is_given_up(tmp_path, tiny_store):
    store = ArtifactStore(tiny_store)
    release = store.path("release", store.versions("release")[0])
    with (
        pytest.raises(ServerStartError, match=r"not ready within 0\.1 s"),
        serving(release, timeout_s=0.1),
    ):
        pass


def test_a_release_is_served_for_as_long_as_the_block_lasts(tiny_store, tiny_data, monkeypatch):
    # Settings of the caller's own service are none of this one's.
    monkeypatch.setenv("RECTOKENS_MODEL", "/elsewhere")
    store = ArtifactStore(tiny_store)
    release = store.path("release", store.versions("release")[0])
    with serving(release) as base_url:
        history = list(tiny_data.item_ids[:2])
        asked = {"history": history, "top_k": 3, "beam_width": 5}
        mixed = {"input": [{"text": "likes matte lipstick"}, {"item": history[0]}], "top_k": 3}
        for body in (asked, mixed):
            answer = httpx.post(
                f"{base_url}/v1/recommend", json=body, trust_env=False, timeout=LIMIT_S
            )
            assert answer.status_code == 200, answer.text
            returned = [item["item_id"] for item in answer.json()["items"]]
            assert len(returned) == 3
            assert set(returned) <= set(tiny_data.item_ids)
            assert history[0] not in returned
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{base_url}/health", trust_env=False)
