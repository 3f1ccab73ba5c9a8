"""Which of the waiting requests run next: a pure function, queue -> batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the policy needs to know of one queued request.

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
        max_beam_rows: sum of their beam widths.
        max_prompt_tokens: requests × the longest prompt among them, because prompts of a batch
            are padded to one length.
    """

    max_requests: int
    max_beam_rows: int
    max_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Keys of the queue, each in exactly one of three places, each in queue order.

    Attributes:
        run: the batch; all of one release.
        expired: past their deadline; to be answered so, never run.
        waiting: stay in the queue.
    """

    run: tuple[int, ...]
    expired: tuple[int, ...]
    waiting: tuple[int, ...]


def form_batch(queue: Sequence[Waiting], limits: BatchLimits, now_s: float) -> Decision:
    """Form the next batch.

    The oldest live request always runs, alone if it is over a budget by itself. The others
    follow in queue order, each taken if it is of the same release and still fits. So a narrow
    request may pass a wide one that does not fit, but every batch takes the head: a request
    waits for at most as many batches as there were requests before it, however wide it is.

    Requests whose caller has gone are not in the queue: they leave it at that moment.

    Args:
        queue: in order of arrival, oldest first.
        limits: budgets of one batch.
        now_s: monotonic time.
    """
    run: list[int] = []
    expired: list[int] = []
    waiting: list[int] = []
    release: Hashable = None
    beam_rows = longest = 0
    for request in queue:
        if request.deadline_s <= now_s:
            expired.append(request.key)
            continue
        rows = beam_rows + request.beam_rows
        tokens = max(longest, request.prompt_tokens)
        fits = not run or (
            request.release == release
            and len(run) < limits.max_requests
            and rows <= limits.max_beam_rows
            and tokens * (len(run) + 1) <= limits.max_prompt_tokens
        )
        if not fits:
            waiting.append(request.key)
            continue
        run.append(request.key)
        release, beam_rows, longest = request.release, rows, tokens
    return Decision(tuple(run), tuple(expired), tuple(waiting))
