"""Faults inside the real engine, as callers of the service meet them.

The model itself fails: out of memory in one batch, an exception in one of its kernels, NaN in its
weights, a device that is gone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from server.engine.pool_setup import PoolOptions
from tests.waiting import LIMIT_S, until

ALL_ITEMS = [f"item-{i}" for i in range(400)]
ITEMS = [f"item-{i}" for i in (1, 2, 3, 7, 8, 9, 10, 11)]


@pytest.fixture
def model(tiny_lm: Callable[..., Any]) -> Any:
    return tiny_lm("llama", 64, seed=6)


@pytest.fixture
def release(model: Any, make_real_release: Callable[..., Any]) -> Any:
    return make_real_release(model, pool=PoolOptions(memory_bytes=1 << 20))


def body(item: str, **fields: Any) -> dict[str, Any]:
    # Long enough for a page of the prefix cache.
    return {"history": [item] * 6, "top_k": 5, "beam_width": 8, **fields}


def items_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def nothing_leased(release: Any) -> bool:
    return release.engine._runner.prefix_cache._references == {}


def break_forward(
    monkeypatch: pytest.MonkeyPatch, release: Any, broken: Callable[[int], Exception | None]
) -> list[int]:
    """Let running the prompts of so many requests raise; the numbers that were asked."""
    runner = release.engine._runner
    whole = runner.run_prompts
    asked: list[int] = []

    def run_prompts(suffixes: Any, *rest: Any) -> Any:
        asked.append(len(suffixes))
        if (error := broken(len(suffixes))) is not None:
            raise error
        return whole(suffixes, *rest)

    monkeypatch.setattr(runner, "run_prompts", run_prompts)
    return asked


async def together(running: Any, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """Send them so that all but the first share a batch."""
    engine = running.service.release.engine
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    first, run = True, engine.run

    def held(*arguments: Any) -> Any:
        nonlocal first
        if first:
            first = False
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(timeout=LIMIT_S)
        return run(*arguments)

    engine.run = held
    try:
        head = asyncio.create_task(running.post(body("item-20")))
        await until(lambda: not first)
        tasks = [asyncio.create_task(running.post(one)) for one in bodies]
        # Admitted is not enough: they have to wait in the queue.
        room = running.service._batcher._room
        await until(lambda: len(room.snapshot()) == len(bodies))
        gate.set()
        await head
        return await asyncio.gather(*tasks)
    finally:
        del engine.run


async def test_a_batch_that_memory_is_too_small_for_is_answered_in_parts(
    start_app: Any, release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_app(release)
    bodies = [body(item) for item in ITEMS]
    expected = [items_of(await running.post(one)) for one in bodies]
    release.engine._runner.prefix_cache.clear()
    asked = break_forward(
        monkeypatch,
        release,
        lambda rows: torch.OutOfMemoryError("tried to allocate 8 GiB") if rows > 2 else None,
    )
    found = await together(running, bodies)
    assert [items_of(response) for response in found] == expected
    assert max(asked) == len(ITEMS)
    assert nothing_leased(release)
    assert (await running.client.get("/health")).status_code == 200


async def test_memory_that_is_never_enough_fails_one_request_after_the_other(
    start_app: Any, release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_app(release)
    with monkeypatch.context() as patch:
        break_forward(patch, release, lambda rows: torch.OutOfMemoryError("8 GiB"))
        for response in await together(running, [body(item) for item in ITEMS[:3]]):
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_fault"
    assert nothing_leased(release)
    assert len(items_of(await running.post(body("item-1")))) == 5


async def test_a_poisoned_request_fails_alone_with_an_id_and_poisons_nobody(
    start_app: Any, model: Any, release: Any
) -> None:
    running = await start_app(release)
    bodies = [body(item) for item in ITEMS]
    expected = [items_of(await running.post(one)) for one in bodies]
    release.engine._runner.prefix_cache.clear()
    # NaN in a weight that only one history needs: codes of the last level are read in prompts only.
    catalog, tokens = release.catalog, release.spec.item_tokens
    read = catalog.codes_of(catalog.index_of([*ITEMS, "item-20"]))[:, -1].tolist()
    codes = catalog.codes_of(catalog.index_of(ALL_ITEMS)).tolist()
    poison, path = next(
        (item, path) for item, path in zip(ALL_ITEMS, codes, strict=True) if path[-1] not in read
    )
    token = tokens.encode(path)[-1]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        kept = embedding[token].clone()
        embedding[token] = float("nan")

    poisoned, *found = await together(running, [body(poison), *bodies])
    assert poisoned.status_code == 500
    error = poisoned.json()["error"]
    assert (error["code"], error["type"]) == ("engine_fault", "server_error")
    assert "NaN" not in error["message"]
    assert poisoned.headers["x-request-id"]
    assert [items_of(response) for response in found] == expected

    # What was computed of its prompt is not kept for whoever comes later.
    with torch.no_grad():
        embedding[token] = kept
    again = await running.post(body(poison))
    assert len(items_of(again)) == 5
    assert again.json()["usage"]["cached_tokens"] == 0
    assert (await running.post(body(poison))).json()["usage"]["cached_tokens"] == 16
    assert nothing_leased(release)


async def test_an_exception_in_a_kernel_fails_the_request_that_causes_it(
    start_app: Any, release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_app(release)
    runner = release.engine._runner
    whole = runner.run_prompts
    poisoned = release.prompts.build([]).token_ids

    def run_prompts(suffixes: Any, *rest: Any) -> Any:
        if any(tuple(suffix) == tuple(poisoned) for suffix in suffixes):
            raise RuntimeError("CUDA error: an illegal instruction was encountered")
        return whole(suffixes, *rest)

    monkeypatch.setattr(runner, "run_prompts", run_prompts)
    bad, *found = await together(
        running, [{"history": [], "top_k": 5}, *(body(item) for item in ITEMS)]
    )
    assert bad.status_code == 500
    assert bad.json()["error"]["code"] == "engine_fault"
    assert "CUDA" not in bad.text
    for response in found:
        assert len(items_of(response)) == 5
    assert nothing_leased(release)


async def test_a_device_that_is_gone_answers_everybody_and_fails_health(
    start_app: Any, release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_app(release)
    everybody = threading.Event()

    def broken(rows: int) -> Exception:
        assert everybody.wait(LIMIT_S)
        return torch.AcceleratorError("unspecified failure")

    asked = break_forward(monkeypatch, release, broken)
    zeros = torch.zeros

    def gone(*arguments: Any, **options: Any) -> Any:
        # What the engine asks the device to find out whether it still works.
        if arguments == (1,):
            raise torch.AcceleratorError("unspecified failure")
        return zeros(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", gone)
    lines = asyncio.create_task(
        running.client.post(
            "/v1/recommend/batch", json={"requests": [body(item) for item in ITEMS]}
        )
    )
    # A call that comes later is refused as a whole.
    await until(lambda: asked)
    waiting = asyncio.create_task(running.post(body("item-1", beam_width=9)))
    await until(lambda: running.service._batcher.queued_beam_rows % 8 == 1)
    everybody.set()
    alone = await waiting
    assert alone.status_code == 503
    assert alone.json()["error"]["code"] == "engine_dead"
    streamed = [httpx.Response(200, content=line).json() for line in (await lines).iter_lines()]
    assert {line["status"] for line in streamed} == {503}
    assert {line["error"]["code"] for line in streamed} == {"engine_dead"}
    health = await running.client.get("/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
    assert running.service._batcher.queued_requests == 0


async def test_a_device_that_is_lost_while_a_batch_is_prepared_fails_health(
    start_app: Any, release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_app(release)
    assert len(items_of(await running.post(body("item-1")))) == 5
    zeros = torch.zeros

    def gone(*arguments: Any, **options: Any) -> Any:
        if arguments == (1,):
            raise torch.AcceleratorError("unspecified failure")
        return zeros(*arguments, **options)

    def copied(*_: Any) -> Any:
        raise torch.AcceleratorError("unspecified failure")

    monkeypatch.setattr(torch, "zeros", gone)
    monkeypatch.setattr("server.engine.engine.StepOptions.from_requests", copied)
    answer = await running.post(body("item-1"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert (await running.client.get("/health")).status_code == 503
    assert running.service._batcher.queued_requests == 0


async def test_memory_that_is_short_while_batches_are_prepared_is_short_no_longer_than_that(
    start_app: Any, release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_app(release)
    bodies = [body(item) for item in ITEMS]
    expected = [items_of(await running.post(one)) for one in bodies]
    engine = release.engine
    prepare = engine.prepare
    asked: list[int] = []

    def short(requests: Any, trie: Any) -> Any:
        asked.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("tried to allocate 8 GiB")
        return prepare(requests, trie)

    monkeypatch.setattr(engine, "prepare", short)
    found = await together(running, bodies)
    assert [items_of(response) for response in found] == expected
    assert max(asked) == len(ITEMS)
    assert nothing_leased(release)
    assert (await running.client.get("/health")).status_code == 200
