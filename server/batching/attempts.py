"""Running a batch so that what breaks it breaks as few of its requests as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog

from server.batching.interfaces import BatchObserver
from server.batching.waiting_room import Place
from server.engine.types import (
    BatchOutcome,
    EngineBrokenError,
    EngineFault,
    RunningBatch,
)

_log = structlog.get_logger(__name__)

Deliver = Callable[[Sequence[Place], BatchOutcome], None]


def run_batch(
    batch: Sequence[Place],
    prepared: Any,
    deliver: Deliver,
    observer: BatchObserver,
    is_live: Callable[[Place], bool],
    running: RunningBatch | None = None,
) -> bool:
    """Run a batch; where it fails, its halves, and their halves.

    A request that breaks every batch it is in is found in few steps and fails alone; a batch
    that the device has too little memory for runs in smaller parts.

    Args:
        batch: at least one place, all of one release.
        prepared: by the release's engine, for exactly this batch; None if it has yet to be.
        deliver: told every outcome, one or more times.
        observer: told of every forward pass.
        is_live: whether a place is still worth running, asked before a half is run.
        running: what the engine has begun of it; None where it has yet to be run.

    Returns:
        Whether the batch ran as a whole.

    Raises:
        EngineBrokenError: there is no sense in going on.
    """
    outcome, failure = _attempt(batch, prepared, running, observer)
    del running
    # The error is gone by now, and with its traceback what the failed batch held on the device.
    if outcome is not None:
        deliver(batch, outcome)
        return True
    if len(batch) == 1:
        deliver(batch, BatchOutcome((EngineFault(failure),), prefill_s=0.0, decode_s=0.0))
        return False
    _log.warning("batch failed; running its halves", requests=len(batch), failure=failure)
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        live = [place for place in half if is_live(place)]
        if live:
            run_batch(live, None, deliver, observer, is_live)
    return False


def begin_batch(batch: Sequence[Place], prepared: Any) -> tuple[Any, RunningBatch | None]:
    """Begin a batch behind whatever runs.

    Args:
        batch: as of :func:`run_batch`.
        prepared: likewise.

    Returns:
        Both for :func:`run_batch`: the batch prepared, and what was begun of it; None for what
        failed or cannot be begun.

    Raises:
        EngineBrokenError: there is no sense in going on.
    """
    try:
        if prepared is None:
            prepared = _prepare(batch)
        engine = batch[0].work.release.engine
        return prepared, engine.begin(prepared, lambda row: not batch[row].is_wanted)
    except EngineBrokenError:
        raise
    except Exception as error:
        # With the device to itself it may do better; where it does not, its halves are tried.
        failure = f"{type(error).__name__}: {error}"
    _log.warning("batch not begun; it is run by itself", requests=len(batch), failure=failure)
    return prepared, None


def _prepare(batch: Sequence[Place]) -> Any:
    release = batch[0].work.release
    return release.engine.prepare([place.work.search for place in batch], release.trie)


def _attempt(
    batch: Sequence[Place], prepared: Any, running: RunningBatch | None, observer: BatchObserver
) -> tuple[BatchOutcome | None, str]:
    """The outcome, or None and what went wrong."""
    release = batch[0].work.release
    try:
        if running is not None:
            outcome = running.finish()
        else:
            ready = _prepare(batch) if prepared is None else prepared
            outcome = release.engine.run(ready, lambda row: not batch[row].is_wanted)
        if len(outcome.results) != len(batch):
            raise RuntimeError(
                f"engine gave {len(outcome.results)} results for {len(batch)} requests"
            )
    except EngineBrokenError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    observer.batch_finished(outcome.prefill_s, outcome.decode_s)
    return outcome, ""
