"""Returning users through HTTP: the same answers as without a cache, told and counted."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rectokens.prompts.recipe import PromptRecipe
from server.engine.pool_setup import PoolOptions

SECONDS = float(os.environ.get("SOAK_SECONDS", "4"))
USERS, MAX_ITEMS = 40, 25
PAGE_BYTES = 16 * 3 * 2 * 2 * 8 * 4
PAGES = 60  # a tenth of what all users' histories take
MAX_GROWTH_BYTES = 24 << 20

MakeRelease = Callable[..., Any]


@pytest.fixture(scope="module")
def releases(tiny_lm: Callable[..., Any], make_real_release: MakeRelease) -> tuple[Any, Any]:
    """One release that keeps prompts, and the same that does not."""
    recipe = PromptRecipe("item_history", 1, {"max_items": MAX_ITEMS})
    pool = PoolOptions(memory_bytes=PAGES * PAGE_BYTES)
    return (
        make_real_release(tiny_lm("mistral-sliding", 64, seed=5), pool=pool, recipe=recipe),
        make_real_release(tiny_lm("mistral-sliding", 64, seed=5), recipe=recipe),
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_growing_histories_under_pressure(start_app: Any, releases: tuple[Any, Any]) -> None:
    kept, fresh = await start_app(releases[0]), await start_app(releases[1])
    rng = random.Random(3)
    histories: list[list[str]] = [[] for _ in range(USERS)]
    cached = asked = 0
    resident = None
    begun = time.monotonic()
    while time.monotonic() < begun + SECONDS or asked < 200:
        # By then everything has been done once, however slow the machine.
        if resident is None and asked >= 100 and time.monotonic() > begun + SECONDS / 2:
            resident = resident_bytes()
        user = min(int(rng.expovariate(0.15)), USERS - 1)
        history = histories[user]
        history += [f"item-{rng.randrange(400)}" for _ in range(rng.randint(1, 3))]
        if len(history) > MAX_ITEMS:
            history.clear()
            continue
        body = {"history": history, "top_k": 5, "beam_width": 8, "exclude_history": False}
        found, expected = [(await app.post(body)).json() for app in (kept, fresh)]
        assert [item["score"] for item in found["items"]] == pytest.approx(
            [item["score"] for item in expected["items"]], abs=1e-5
        )
        scores = {item["item_id"]: item["score"] for item in expected["items"]}
        worst = expected["items"][-1]["score"]
        for item in found["items"]:
            assert item["score"] == pytest.approx(scores.get(item["item_id"], worst), abs=1e-5)
        assert expected["usage"]["cached_tokens"] == 0
        assert found["usage"]["cached_tokens"] < found["usage"]["prompt_tokens"]
        cached += found["usage"]["cached_tokens"]
        asked += 1
    assert resident is not None
    assert resident_bytes() - resident < MAX_GROWTH_BYTES
    assert cached > 0
    assert await kept.metric("rectokens_prefix_cache_hit_tokens_total") == cached
    assert await kept.metric("rectokens_prefix_cache_evictions_total") > 0
    assert await kept.metric("rectokens_prefix_cache_pages") == PAGES
    assert 0 < await kept.metric("rectokens_prefix_cache_pages_used") <= PAGES
    assert await fresh.metric("rectokens_prefix_cache_pages") == 0
    assert await fresh.metric("rectokens_prefix_cache_queried_tokens_total") == 0
    cache = releases[0].engine._runner.prefix_cache
    assert cache._references == {}, "a page is leased by nobody's request"


async def test_a_history_over_the_models_limit_keeps_its_prompts_beginning(
    start_app: Any, tiny_lm: Callable[..., Any], make_real_release: MakeRelease
) -> None:
    recipe = PromptRecipe("item_history", 1, {"max_items": 1_000})
    kept = make_real_release(tiny_lm("qwen3", 64), pool=PoolOptions(4 << 20), recipe=recipe)
    running = await start_app(kept)
    fits = kept.engine.max_prompt_tokens // 4  # items, of four tokens each
    assert fits == 31
    history = [f"item-{number}" for number in range(60)]
    began_anew = 0
    for length in range(20, 61):
        body = {"history": history[:length], "top_k": 5, "beam_width": 8}
        usage = (await running.post(body)).json()["usage"]
        assert usage["truncated_items"] + usage["history_items"] == length
        assert usage["history_items"] > fits - fits // 4 or length <= fits
        if usage["cached_tokens"] == 0:
            began_anew += 1
        else:  # all but the newest item and what does not fill a page
            assert usage["cached_tokens"] >= usage["prompt_tokens"] - 5 - 15
    assert began_anew == 1 + 5  # the first prompt, then a block of seven items at a time


async def test_completions_tell_it_too(start_app: Any, releases: tuple[Any, Any]) -> None:
    running = await start_app(releases[0])
    prompt = torch.randint(4, 40, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    body = {"model": "real", "prompt": [*prompt, 1], "n": 2}
    for expected in (0, 32):
        usage = (await running.client.post("/v1/completions", json=body)).json()["usage"]
        assert usage["cached_tokens"] == expected
        assert usage["prompt_tokens_details"] == {"cached_tokens": expected}
