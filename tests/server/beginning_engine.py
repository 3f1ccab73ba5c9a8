"""An engine made to order that begins batches before others are finished."""

from __future__ import annotations

import asyncio
import threading

from server.engine.types import nobody_left
from tests.server.dummy_service import LIMIT_S, DummyEngine


class Run:
    def __init__(self, engine, prepared):
        self.engine, self.prepared = engine, prepared
        self.number = len(engine.begun) - 1

    def wait_for_prompts(self):
        assert self.engine.prompts.wait(LIMIT_S)

    def finish(self):
        self.engine.log.append(("finished", self.number))
        return DummyEngine.run(self.engine, self.prepared)


class BeginningEngine(DummyEngine):
    """Begins batches; prompts are done once ``prompts`` is set, the rest is when ``gate`` is."""

    def __init__(self):
        super().__init__()
        self.begun = []
        self.log = []
        self.had_left = []
        self.on_begin = lambda requests: None
        self.prompts = threading.Event()
        self.gate.clear()

    def begin(self, prepared, has_left=nobody_left):
        requests = list(prepared.requests)
        self.on_begin(requests)
        self.had_left.append([has_left(row) for row in range(len(requests))])
        self.log.append(("begun", len(self.begun)))
        with self._changed:
            self.begun.append(requests)
            self._changed.notify_all()
        return Run(self, prepared)

    async def wait_for_begun(self, count):
        def wait():
            with self._changed:
                assert self._changed.wait_for(lambda: len(self.begun) >= count, LIMIT_S)

        await asyncio.to_thread(wait)
