"""Mixed traffic through the real engine: every answer checked, memory flat.

All routes at once: recommendations with filters, batches, scores, completions, callers that leave
or ask for nonsense, readers of ``/admin`` and of the metrics, while two releases take turns.

Runs for ``SOAK_SECONDS`` (default 8). ``make soak`` runs it for half an hour; ``SOAK_REPORT`` names
a CSV file for memory and requests over time.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.waiting import LIMIT_S

SECONDS = float(os.environ.get("SOAK_SECONDS", "8"))
REPORT = os.environ.get("SOAK_REPORT")
ITEMS = 400
CLIENTS = 12
# Growth that a leak of one small object per request would exceed within a long run, while
# allocator noise stays below it.
MAX_GROWTH_BYTES = 24 << 20
# Between two swaps; at least four of them in the shortest run.
SWAP_EVERY_S = min(SECONDS / 5, 10.0)
KEY = "a-key-of-the-tests"
START_TOKEN = 28
MEMBERS = {
    None: range(ITEMS),
    "even": range(0, ITEMS, 2),
    "few": range(7),
    ("even", "third"): range(0, ITEMS, 6),
}


def items_of(rng: random.Random, count: int) -> list[str]:
    return [f"item-{rng.randrange(ITEMS)}" for _ in range(count)]


def random_body(rng: random.Random) -> dict[str, Any]:
    top_k = rng.choice([1, 5, 10, 30])
    return {
        "history": items_of(rng, rng.randrange(15)),
        "top_k": top_k,
        "beam_width": top_k + rng.randrange(20),
        "temperature": rng.choice([0.0, 0.0, 0.8, 2.0]),
        "seed": rng.randrange(2**31),
        "normalization": rng.choice(["vocab", "level", "children"]),
        "exclude_history": rng.random() < 0.5,
        "exclude_items": items_of(rng, rng.randrange(40)),
        "constraint_set": rng.choice([None, None, "even", "few", ["even", "third"]]),
        "allow_items": rng.choice([None, None, items_of(rng, 50)]),
    }


def allowed_items(body: dict[str, Any]) -> set[str]:
    chosen = body["constraint_set"]
    rows = MEMBERS[tuple(chosen) if isinstance(chosen, list) else chosen]
    barred = set(body["exclude_items"])
    if body["exclude_history"]:
        barred |= set(body["history"])
    listed = {f"item-{row}" for row in rows} - barred
    return listed if body["allow_items"] is None else listed & set(body["allow_items"])


def check_answer(body: dict[str, Any], answer: dict[str, Any]) -> None:
    found = [item["item_id"] for item in answer["items"]]
    allowed = allowed_items(body)
    assert len(found) == len(set(found)) == min(body["top_k"], len(allowed))
    assert set(found) <= allowed
    assert (answer["shortfall"] is None) == (len(found) == body["top_k"])


class Caller:
    """Asks for one thing after another and checks what comes."""

    def __init__(self, running: Any, seed: int, counts: Counter[str]) -> None:
        self._client = running.client
        self._rng = random.Random(seed)
        self._counts = counts

    async def ask(self) -> None:
        kinds = {
            self._recommend: 12,
            self._batch: 2,
            self._score: 2,
            self._complete: 2,
            self._leave: 1,
            self._ask_nonsense: 1,
            self._read: 2,
        }
        (kind,) = self._rng.choices(list(kinds), list(kinds.values()))
        await kind()
        self._counts[kind.__name__] += 1

    async def _recommend(self) -> None:
        body = random_body(self._rng)
        check_answer(body, await self._post("/v1/recommend", body))

    async def _batch(self) -> None:
        bodies = [random_body(self._rng) for _ in range(self._rng.randint(1, 6))]
        response = await self._client.post("/v1/recommend/batch", json={"requests": bodies})
        assert response.status_code == 200, response.text
        lines = [json.loads(line) for line in response.text.splitlines()]
        assert sorted(line["index"] for line in lines) == list(range(len(bodies)))
        for line in lines:
            assert line["status"] == 200, line
            check_answer(bodies[line["index"]], line["answer"])

    async def _score(self) -> None:
        known = sorted(set(items_of(self._rng, 20)))
        body = {"history": items_of(self._rng, 5), "items": [*known, "nobody's"]}
        answer = await self._post("/v1/score", body)
        assert [item["item_id"] for item in answer["items"]] == body["items"]
        assert all(item["score"] <= 0 for item in answer["items"][:-1])
        assert answer["unscored_items"] == ["nobody's"]

    async def _complete(self) -> None:
        history = items_of(self._rng, self._rng.randint(1, 6))
        text = "".join(f"<item:{item}>" for item in history)
        tokens = [4 + 8 * level + self._rng.randrange(8) for level in range(3)]
        prompt = self._rng.choice([text, [text, text], [*tokens, START_TOKEN]])
        body = {"prompt": prompt, "n": 3, "beam_width": 10, "stream": self._rng.random() < 0.5}
        response = await self._client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"] if not body["stream"] else streamed(response.text)
        wanted = 3 * (2 if prompt == [text, text] else 1)
        assert sorted(choice["index"] for choice in choices) == list(range(wanted))
        assert {choice["item"]["item_id"] for choice in choices} <= {
            f"item-{row}" for row in range(ITEMS)
        }

    async def _leave(self) -> None:
        body = random_body(self._rng)
        request = asyncio.create_task(self._client.post("/v1/recommend", json=body))
        await asyncio.sleep(self._rng.random() * 0.01)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    async def _ask_nonsense(self) -> None:
        nonsense = {"history": ["nobody's"]}, {"history": [], "top_k": 10**6}, {"hystory": []}
        response = await self._client.post("/v1/recommend", json=self._rng.choice(nonsense))
        assert response.status_code == 422, response.text

    async def _read(self) -> None:
        paths = (
            "/admin/jobs",
            "/admin/releases",
            "/admin/catalogs",
            "/admin/constraint-sets",
            "/admin/constraint-sets/even",
            "/admin/tokenizers",
            "/v1/models",
            "/ready",
            "/health",
            "/metrics",
        )
        headers = {"Authorization": f"Bearer {KEY}"}
        response = await self._client.get(self._rng.choice(paths), headers=headers)
        assert response.status_code == 200, response.text

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = await self._client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()


def streamed(text: str) -> list[dict[str, Any]]:
    """Choices of server-sent events."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
    assert events[-1] == "[DONE]"
    return [choice for event in events[:-1] for choice in json.loads(event)["choices"]]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(samples: Sequence[tuple[float, int, int]]) -> float:
    """Bytes between the fifth eighth and the last; by half time caches have filled."""
    sizes = [size for _, size, _ in samples]
    count = len(sizes)
    settled = statistics.median(sizes[count // 2 : count * 5 // 8 + 1])
    last = statistics.median(sizes[count * 7 // 8 :])
    return last - settled


def write_report(
    path: Path, samples: Sequence[tuple[float, int, int]], counts: Counter[str]
) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seconds", "resident_mib", "requests"])
        writer.writerows([round(at, 1), round(size / 2**20, 1), n] for at, size, n in samples)
        writer.writerows([name.strip("_"), "", count] for name, count in counts.items())


async def test_every_answer_is_right_and_memory_is_flat(
    start_app: Any, small_store: Any, tmp_path: Path
) -> None:
    ids = [f"item-{row}" for row in range(ITEMS)]
    sets = {"even": ids[::2], "few": ids[:7], "third": ids[::3]}
    for number in (2, 3):  # the same items, other semantic IDs
        small_store.add(number, ids=ids, constraint_sets=sets)
    small_store.activate(2)
    running = await start_app(
        store__path=str(small_store.root),
        store__poll_s="0.1",
        jobs__folder=str(tmp_path / "jobs"),
        engine__kv_memory_mib="16",
        admin__keys=KEY,
        # However slow the machine: nothing here is about time.
        limits__max_timeout_ms="600000",
        defaults__timeout_ms="600000",
    )
    counts: Counter[str] = Counter()
    samples: list[tuple[float, int, int]] = []
    started = time.monotonic()
    elapsed = lambda: time.monotonic() - started  # noqa: E731

    served = {running.service.release.version}

    def goes_on() -> bool:
        """However slow the machine, until everything has happened."""
        enough = len(counts) == 7 and counts.total() >= 100 and len(served) > 1
        return elapsed() < (SECONDS if enough else SECONDS + LIMIT_S)

    async def call(seed: int) -> None:
        caller = Caller(running, seed, counts)
        while goes_on():
            await caller.ask()

    async def watch_memory() -> None:
        while goes_on():
            served.add(running.service.release.version)
            samples.append((elapsed(), resident_bytes(), counts.total()))
            await asyncio.sleep(SECONDS / 200)

    async def swap() -> None:
        number = 2
        while elapsed() + SWAP_EVERY_S < SECONDS:
            await asyncio.sleep(SWAP_EVERY_S)
            number = 5 - number
            await asyncio.to_thread(small_store.activate, number)

    try:
        await asyncio.gather(watch_memory(), swap(), *(call(seed) for seed in range(CLIENTS)))
    finally:
        if REPORT is not None:
            write_report(Path(REPORT), samples, counts)
    assert len(counts) == 7, counts
    assert running.service._batcher.queued_requests == 0
    assert await running.metric("rectokens_swap_seconds_count") >= 1
    assert await running.metric("rectokens_swap_failures_total") == 0
    assert await running.metric('rectokens_rejected_total{reason="internal"}') == 0
    assert growth(samples) < MAX_GROWTH_BYTES
