"""Which of the waiting requests run next: a pure function, queue -> batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from server.batching.cost import BatchCost, BatchShape

# A long batch grows no more once company saves no more than so small a part of it.
_LITTLE = 0.08
_ROUNDING = 1e-12  # relative


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the policy needs to know of one queued request.

    Requests may differ in everything else (top k, filters, temperature, normalization) and still
    share a batch.

    Attributes:
        key: tells it from all others.
        deadline_s: monotonic time after which nobody wants the answer.
        beam_rows: W, its beam width.
        prompt_tokens: length of its prompt.
        release: identity of the release that it was admitted under.
    """

    key: int
    deadline_s: float
    beam_rows: int
    prompt_tokens: int
    release: Hashable


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The most one batch of several requests may hold.

    Attributes:
        max_requests: B, requests.
        max_beam_rows: requests × the widest beam among them, because the beams of a batch are
            padded to one width.
        max_prompt_tokens: requests × the longest prompt among them, because prompts are padded
            to one length.
    """

    max_requests: int
    max_beam_rows: int
    max_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Keys of the queue, each in exactly one of three places, each in queue order.

    Attributes:
        run: the batch; all of one release.
        expired: past their deadline or unable to meet it any more; to be answered so, never run.
        waiting: stay in the queue.
        full: somebody of the same release had to stay because a budget was reached, so that
            whoever arrives later has no claim to this batch.
    """

    run: tuple[int, ...]
    expired: tuple[int, ...]
    waiting: tuple[int, ...]
    full: bool


def form_batch(
    queue: Sequence[Waiting],
    limits: BatchLimits,
    now_s: float,
    cost: BatchCost | None = None,
    long_s: float = float("inf"),
) -> Decision:
    """Form the next batch.

    The oldest live request always runs, alone if it is over a budget by itself. The others
    follow in queue order. Each is taken if it is of the same release, fits the budgets, and,
    where the cost of batches is known, if

    - running it together costs no more than running it by itself: a long or wide request would
      otherwise pad everybody else to its size,
    - the batch is short as yet, or company still saves a good part of it, and
    - the batch still ends before the deadline of everybody in it.

    So a narrow request may pass a wide one that does not fit, but every batch takes the head: a
    request waits for at most as many batches as there were requests before it, however wide it
    is and whatever arrives after it.

    A request that could not meet its deadline even alone gives its place to those who can. Where
    nobody can, the estimate is not trusted: they run.

    Requests whose caller has gone are not in the queue: they leave it at that moment.

    Args:
        queue: in order of arrival, oldest first.
        limits: budgets of one batch.
        now_s: monotonic time.
        cost: seconds a batch takes; None where that is not known yet.
        long_s: from here on a batch is long. Worth it where the next one is begun before it ends:
            little is saved by company then, answers come sooner and fewer at once.
    """
    expired = {request.key for request in queue if request.deadline_s <= now_s}
    if cost is not None:
        late = {r.key for r in queue if now_s + _alone_s(r, cost) > r.deadline_s} - expired
        if len(expired) + len(late) < len(queue):
            expired |= late
        else:
            cost = None

    batch = _Batch(limits, now_s, cost, long_s)
    waiting = [r.key for r in queue if r.key not in expired and not batch.take(r)]
    return Decision(
        run=tuple(batch.keys),
        expired=tuple(request.key for request in queue if request.key in expired),
        waiting=tuple(waiting),
        full=batch.full,
    )


class _Batch:
    """A batch as it grows."""

    def __init__(
        self, limits: BatchLimits, now_s: float, cost: BatchCost | None, long_s: float
    ) -> None:
        self.keys: list[int] = []
        self.full = False
        self._limits, self._now_s, self._cost, self._long_s = limits, now_s, cost, long_s
        self._release: Hashable = None
        self._shape = BatchShape()
        self._first_deadline_s = float("inf")

    def take(self, request: Waiting) -> bool:
        """Add a request if it may join."""
        shape = self._shape.with_request(request.prompt_tokens, request.beam_rows)
        first_deadline_s = min(self._first_deadline_s, request.deadline_s)
        if self.keys:
            if request.release != self._release:
                return False
            if (
                shape.requests > self._limits.max_requests
                or shape.padded_rows > self._limits.max_beam_rows
                or shape.padded_tokens > self._limits.max_prompt_tokens
            ):
                self.full = True
                return False
            if self._cost is not None:
                so_far_s, together_s = self._cost.seconds(self._shape), self._cost.seconds(shape)
                apart_s = so_far_s + _alone_s(request, self._cost)
                if (
                    together_s > apart_s * (1 + _ROUNDING)
                    or self._now_s + together_s > first_deadline_s
                ):
                    return False
                if so_far_s >= self._long_s and apart_s - together_s <= _LITTLE * so_far_s:
                    self.full = True
                    return False
        self.keys.append(request.key)
        self._release = request.release
        self._shape, self._first_deadline_s = shape, first_deadline_s
        return True


def _alone_s(request: Waiting, cost: BatchCost) -> float:
    return cost.seconds(BatchShape().with_request(request.prompt_tokens, request.beam_rows))
