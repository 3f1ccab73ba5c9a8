"""Mixed traffic through the real engine: every answer checked, memory flat.

Runs for ``SOAK_SECONDS`` (default 8). ``make soak`` runs it for half an hour.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("SOAK_SECONDS", "8"))
ITEMS = 400
CLIENTS = 12
# Growth that a leak of one small object per request would exceed within a long run, while
# allocator noise stays below it.
MAX_GROWTH_BYTES = 24 << 20


def random_body(rng: random.Random) -> dict[str, Any]:
    top_k = rng.choice([1, 5, 10, 30])
    return {
        "history": [f"item-{rng.randrange(ITEMS)}" for _ in range(rng.randrange(15))],
        "top_k": top_k,
        "beam_width": top_k + rng.randrange(20),
        "temperature": rng.choice([0.0, 0.0, 0.8, 2.0]),
        "seed": rng.randrange(2**31),
        "normalization": rng.choice(["vocab", "level", "children"]),
        "exclude_history": rng.random() < 0.5,
        "exclude_items": [f"item-{rng.randrange(ITEMS)}" for _ in range(rng.randrange(40))],
        "constraint_set": rng.choice([None, None, "even", "few", ["even", "third"]]),
        "allow_items": rng.choice(
            [None, None, [f"item-{rng.randrange(ITEMS)}" for _ in range(50)]]
        ),
    }


def allowed_items(body: dict[str, Any]) -> set[str]:
    members = {
        None: range(ITEMS),
        "even": range(0, ITEMS, 2),
        "few": range(7),
        ("even", "third"): range(0, ITEMS, 6),
    }
    chosen = body["constraint_set"]
    rows = members[tuple(chosen) if isinstance(chosen, list) else chosen]
    barred = set(body["exclude_items"])
    if body["exclude_history"]:
        barred |= set(body["history"])
    listed = {f"item-{row}" for row in rows} - barred
    return listed if body["allow_items"] is None else listed & set(body["allow_items"])


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_every_answer_is_right_and_memory_is_flat(start_app: Any, real: Any) -> None:
    running = await start_app(real)
    ends = time.monotonic() + SECONDS
    answered = 0

    async def client(seed: int) -> None:
        nonlocal answered
        rng = random.Random(seed)
        while time.monotonic() < ends:
            body = random_body(rng)
            request = asyncio.create_task(running.post(body))
            if rng.random() < 0.05:  # a caller that leaves
                await asyncio.sleep(rng.random() * 0.01)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
                continue
            response = await request
            assert response.status_code == 200, response.text
            answer = response.json()
            found = [item["item_id"] for item in answer["items"]]
            allowed = allowed_items(body)
            assert len(found) == len(set(found)) == min(body["top_k"], len(allowed))
            assert set(found) <= allowed
            assert (answer["shortfall"] is None) == (len(found) == body["top_k"])
            answered += 1

    settled = 0

    async def watch_memory() -> None:
        nonlocal settled
        await asyncio.sleep(SECONDS / 2)  # caches and allocators have filled by then
        settled = resident_bytes()

    await asyncio.gather(watch_memory(), *(client(seed) for seed in range(CLIENTS)))
    assert answered > SECONDS * 5
    assert running.service._batcher.queued_requests == 0
    assert resident_bytes() - settled < MAX_GROWTH_BYTES
