"""Requests for a batcher whose engine is made to order."""

from __future__ import annotations

import asyncio
import time

from rectokens.schemas.search import SearchRequest
from tests.waiting import until


def search(beam_width=10, prompt_tokens=3):
    return SearchRequest(
        prompt=(1,) * prompt_tokens, beam_width=beam_width, top_k=min(2, beam_width)
    )


async def ask(batcher, release, request=None, timeout_s=600.0):
    request = request or search()
    with batcher.admit(request.beam_width, time.monotonic() + timeout_s) as place:
        return await batcher.run(place, release, request)


async def settled():
    """Let every task run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def begun(engine, batches):
    await asyncio.to_thread(engine.wait_for_batches, batches)


async def prepared_ahead(batcher, engine, requests):
    """Wait until exactly these are prepared to be the next batch."""
    await asyncio.to_thread(engine.wait_for_prepared, requests)

    def is_so():
        ahead = batcher._prefetcher._ahead
        return ahead is not None and len(ahead.keys) == len(requests)

    await until(is_so, lambda: batcher._prefetcher._ahead)


async def ask_while_busy(batcher, release, requests):
    """Tasks for requests that all wait in the queue while one batch is held at the gate."""
    release.engine.gate.clear()
    done = len(release.engine.batches)
    head = asyncio.create_task(ask(batcher, release))
    await begun(release.engine, done + 1)
    tasks = [asyncio.create_task(ask(batcher, release, request)) for request in requests]
    await settled()
    return head, tasks
