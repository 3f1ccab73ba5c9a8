"""Swaps while requests flow, two servers on one store, and processes killed during a swap.

``CHAOS_ROUNDS`` is how many kills, with twice as many swaps; ``make chaos`` asks for more.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from typing import Any

import httpx

from server.catalogs import ReleaseFollower
from tests.waiting import LIMIT_S, until, wait_until

SWAPS = 2 * int(os.environ.get("CHAOS_ROUNDS", "6"))
KILLS = int(os.environ.get("CHAOS_ROUNDS", "1"))
CATALOGS, CLIENTS = 4, 6
HISTORY = [f"{number}-{row}" for number in range(1, CATALOGS + 1) for row in (3, 8)]
KEY = "a-key-of-the-tests"


class Traffic:
    """Clients that check every answer against the version it names."""

    def __init__(self, running: Any, catalogs: dict[int, str]) -> None:
        self._client = running.client
        self._number_of = {version: number for number, version in catalogs.items()}
        self.seen: set[int] = set()
        self.answers = 0
        self.ends = False

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.ends:
            ask = rng.choice([self._recommend, self._recommend, self._batch, self._score])
            await ask(rng)
            await asyncio.sleep(0)

    async def _recommend(self, rng: random.Random) -> None:
        body = {
            "history": HISTORY if rng.random() < 0.8 else [],
            "top_k": 4,
            "constraint_set": rng.choice([None, "even"]),
            "temperature": rng.choice([0.0, 1.0]),
        }
        self._check(await self._client.post("/v1/recommend", json=body))

    async def _batch(self, rng: random.Random) -> None:
        body = {"requests": [{"history": HISTORY, "top_k": 3}] * rng.randint(1, 3)}
        response = await self._client.post("/v1/recommend/batch", json=body)
        assert response.status_code == 200, response.text
        lines = [json.loads(line) for line in response.text.splitlines()]
        assert len(lines) == len(body["requests"])
        for line in lines:
            assert line["status"] == 200, line
            self._check_answer(line["answer"])

    async def _score(self, rng: random.Random) -> None:
        items = [f"{number}-{rng.randrange(40)}" for number in range(1, CATALOGS + 1)]
        body = {"history": HISTORY, "items": items}
        response = await self._client.post("/v1/score", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        number = self._number_of[answer["catalog_version"]]
        scored = [item["item_id"] for item in answer["items"] if item["score"] is not None]
        assert scored == [item for item in items if item.startswith(f"{number}-")]
        self.answers += 1

    def _check(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.text
        self._check_answer(response.json())

    def _check_answer(self, answer: Any) -> None:
        number = self._number_of[answer["catalog_version"]]
        assert answer["items"]
        for item in answer["items"]:
            assert item["item_id"].startswith(f"{number}-"), answer
        self.seen.add(number)
        self.answers += 1


async def test_no_request_fails_and_none_mixes_versions(
    start_app: Any, small_store: Any, tiny_lm: Any
) -> None:
    for number in range(2, CATALOGS + 1):
        # One comes with a model of its own, so that both kinds of swap happen.
        model = small_store.add_model(tiny_lm("llama", seed=3)) if number == CATALOGS else None
        small_store.add(number, items=30 + 10 * number, model=model)
    running = await start_app(
        store__path=str(small_store.root), store__poll_s="0.01", engine__kv_memory_mib="4"
    )
    service = running.service
    catalogs = weakref.WeakSet([service.release.catalog])
    engines = weakref.WeakSet([service.release.engine])
    activate, most = service.activate, [1, 1]

    def watched(release: Any) -> None:
        catalogs.add(release.catalog)
        engines.add(release.engine)
        most[:] = [max(most[0], len(catalogs)), max(most[1], len(engines))]
        activate(release)

    service.activate = watched
    traffic = Traffic(running, small_store.catalogs)
    clients = [asyncio.create_task(traffic.client(seed)) for seed in range(CLIENTS)]
    rng = random.Random(0)
    current = 1

    async def swap(number: int) -> None:
        await asyncio.to_thread(small_store.activate, number)
        wanted, before = small_store.releases[number], traffic.answers

        def served() -> bool:
            assert not any(client.done() for client in clients)  # they end by an error only
            return service.release.version == wanted and traffic.answers > before

        await until(served)

    try:
        for _ in range(SWAPS):
            current = rng.choice([n for n in range(1, CATALOGS + 1) if n != current])
            await swap(current)
    finally:
        traffic.ends = True
        await asyncio.gather(*clients)
    assert len(traffic.seen) > 1
    assert await running.metric("rectokens_swap_seconds_count") == SWAPS
    assert await running.metric("rectokens_swap_failures_total") == 0
    # The new one and the one before; never a third.
    assert most == [2, 2]
    await until(lambda: service.retired.gone)


async def test_two_servers_on_one_store_follow_within_seconds(
    start_app: Any, small_store: Any
) -> None:
    flags = {"store__path": str(small_store.root), "jobs__start_worker": False}
    servers = [await start_app(**flags) for _ in range(2)]  # looking once a second, the default
    small_store.add(2)
    for number in (2, 1):
        await asyncio.to_thread(small_store.activate, number)
        await until(
            lambda number=number: all(
                one.service.release.version == small_store.releases[number] for one in servers
            )
        )
        for one in servers:
            answer = (await one.post({"history": []})).json()
            assert answer["catalog_version"] == small_store.catalogs[number]
            ready = (await one.client.get("/ready")).json()
            assert ready["store"]["active_release"] == small_store.releases[number]
    board = servers[0].app.state.link._board
    wanted = [small_store.releases[1]] * 2

    async def seen() -> bool:
        return [state.release for state in await asyncio.to_thread(board.servers)] == wanted

    await until(seen)  # by jobs, too


async def test_one_server_that_cannot_follow_does_not_hold_up_the_other(
    start_app: Any, small_store: Any
) -> None:
    flags = {"store__path": str(small_store.root), "store__poll_s": "0.05"}
    healthy, short = await start_app(**flags), await start_app(**flags)
    short.app.state.link._source._available = lambda device: 0
    small_store.add(2)
    await asyncio.to_thread(small_store.activate, 2)
    follower: ReleaseFollower = short.app.state.link.follower
    await until(lambda: healthy.service.release.version == small_store.releases[2])
    await until(lambda: follower.status.failure is not None)
    assert (await short.post({"history": []})).json()["catalog_version"] == small_store.catalogs[1]
    assert (await short.client.get("/ready")).json()["store"]["failure"]["attempts"] >= 1


def serve(small_store: Any, log: Any) -> tuple[subprocess.Popen[bytes], int]:
    """A service in a process of its own, listening."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RECTOKENS_")}
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--cpu-threads", "1"]
    command += ["--store.path", str(small_store.root), "--store.poll-s", "0.02"]
    command += ["--jobs.no-start-worker", "--engine.kv-memory-mib", "4"]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, env=environment)

    def port() -> int | None:
        assert process.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                record = json.loads(line)
                if record["event"] == "listening":
                    return int(record["port"])
        return None

    try:
        return process, wait_until(port, log.read_text)
    except BaseException:
        process.kill()
        raise


def ready(process: subprocess.Popen[bytes], port: int, log: Any) -> Any:
    """What /ready says once it is."""

    def said() -> Any:
        assert process.poll() is None, log.read_text()
        response = httpx.get(f"http://127.0.0.1:{port}/ready", timeout=LIMIT_S)
        return response.json() if response.status_code == 200 else None

    return wait_until(said, log.read_text)


def test_killed_during_a_swap_it_comes_back_with_what_is_active(
    small_store: Any, tmp_path: Any, stores: Any
) -> None:
    small_store.add(2, items=3_000)
    rng = random.Random(0)
    active = small_store.releases[1]
    for kill in range(KILLS + 1):
        log = tmp_path / f"log-{kill}"
        process, port = serve(small_store, log)
        try:
            assert ready(process, port, log)["release_version"] == active
            if kill == KILLS:
                break
            for _ in range(rng.randint(1, 4)):
                active = small_store.activate(rng.choice([1, 2]))
                time.sleep(rng.random() * 0.15)  # seen after 0.02 s; then it loads
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        store = stores.open_release_store(small_store.root)
        assert store.active().release == active
        store.open_active()  # verified: every file's size and checksum
