"""A batch on its way: enqueued on the device, its answers yet to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rectokens.schemas.search import SearchResult
from server.engine.base import soundness
from server.engine.device.timer import Timer
from server.engine.prompt_leases import PromptLeases
from server.engine.types import BatchOutcome, EngineFault

Answer = SearchResult | EngineFault


@dataclass(frozen=True, slots=True)
class Part:
    """Requests of a batch whose prompts lie in the pool together; all their work is enqueued.

    Attributes:
        rows: their places in the batch.
        leases: pages of their prompts.
        timer: marks before the prompts, between prompts and searches, and at the end.
        read: gives their answers, once the device is through.
    """

    rows: Sequence[int]
    leases: PromptLeases
    timer: Timer
    read: Callable[[], list[Answer]]


class DeviceRun:
    """A batch whose work is enqueued, in one part or several.

    Args:
        faults: one a request, None for those that are searched.
        ended: told at the end, and what went wrong; may raise what the caller is to hear.

    Attributes:
        parts: enqueued and not read yet, in order.
    """

    def __init__(
        self,
        faults: Sequence[Answer | None],
        ended: Callable[[DeviceRun, Exception | None], None],
    ) -> None:
        self.results: list[Answer | None] = list(faults)
        self.parts: list[Part] = []
        self._ended = ended
        self._cached = [0] * len(faults)
        self._seconds = [0.0, 0.0]
        self._error: Exception | None = None

    def wait_for_prompts(self) -> None:
        """Wait until the device is through with the prompts; failures are told by ``finish``."""
        if self.parts:
            self.parts[-1].timer.wait_for(1)

    def settle(self) -> None:
        """Wait for the device, read the answers and give the pages back; raises nothing."""
        try:
            while self.parts:
                self._read(self.parts[0])
                self.parts.pop(0).leases.close()
        except Exception as error:
            self._error = error
            self.abandon()

    def abandon(self) -> None:
        """Give the pages back; what is enqueued runs before anything that may fill them again."""
        while self.parts:
            self.parts.pop(0).leases.close()

    def finish(self) -> BatchOutcome:
        """The answers, in the order of the requests; waits for them.

        Raises:
            EngineBrokenError: the device does not work any more.
        """
        self.settle()
        error, self._error = self._error, None
        try:
            self._ended(self, error)
            if error is not None:
                raise error
        finally:
            # Its frames have this run, which would stay in memory in a cycle, and its batch too.
            del error
        return BatchOutcome(
            tuple(r for r in self.results if r is not None),
            self._seconds[0],
            self._seconds[1],
            tuple(self._cached),
        )

    def _read(self, part: Part) -> None:
        part.leases.get_ready()
        times = part.timer.wait()
        answers = part.read()
        part.leases.commit([soundness(answer) for answer in answers])
        for row, answer, cached in zip(part.rows, answers, part.leases.cached_tokens, strict=True):
            self.results[row], self._cached[row] = answer, cached
        self._seconds = [a + b for a, b in zip(self._seconds, times, strict=True)]
