"""Batchers that are stopped when their test is over."""

from __future__ import annotations

import time

import pytest

from server.batching.batcher import Batcher, QueueLimits
from server.batching.policy import BatchLimits

LIMITS = BatchLimits(max_requests=8, max_beam_rows=1_000, max_prompt_tokens=1_000)


class Clock:
    """One that goes on when it is told only; a deadline of the real one is not before its own."""

    def __init__(self):
        self.now = time.monotonic()

    def __call__(self):
        return self.now


class Observer:
    def __init__(self):
        self.started: list[tuple[int, int]] = []
        self.queue_s: list[float] = []
        self.finished = 0

    def batch_started(self, requests, beam_rows, queue_s):
        self.started.append((requests, beam_rows))
        self.queue_s += queue_s

    def batch_finished(self, prefill_s, decode_s):
        self.finished += 1


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def release(dummy):
    return dummy.make_release()


@pytest.fixture
async def make_batcher():
    started: list[Batcher] = []

    def make(
        limits=LIMITS, max_queued_beam_rows=1_000, max_queued_requests=1_000, clock=time.monotonic
    ):
        queue_limits = QueueLimits(max_queued_requests, max_queued_beam_rows)
        batcher = Batcher(limits, queue_limits, Observer(), clock)
        batcher.start()
        started.append(batcher)
        return batcher

    yield make
    for batcher in started:
        await batcher.stop(timeout_s=60)
