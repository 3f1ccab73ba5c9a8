"""Rows of the embedding table, encoded before a prompt asks for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from server.proxy.encoded_table import EncodedTable

_log = structlog.get_logger(__name__)

# About a millisecond of work at a hidden size of 4,096: no request waits longer for it.
_GROUP_ROWS = 32
# Between two groups while requests are in flight; else the thread rests as long as it worked.
_BUSY_PAUSE_S = 0.05
_JOIN_S = 5.0


class AheadEncoder:
    """Encodes all rows of a table, one group after the other, on a thread of its own.

    Args:
        busy: whether requests are in flight, to which it then leaves nearly all of the time.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self, rows: EncodedTable) -> None:
        """Encode a table; work on another one ends. Nothing happens once closed."""
        with self._lock:
            self._end()
            if self._closed or rows.num_rows == 0:
                return
            # An event for each thread: one that did not end in time still ends.
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=[rows, self._stop], name="encode-ahead", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """End the work, done or not, for good."""
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
            self._thread = None

    def _run(self, rows: EncodedTable, stop: threading.Event) -> None:
        started = time.monotonic()
        for first in range(0, rows.num_rows, _GROUP_ROWS):
            began = time.monotonic()
            try:
                rows.encode_ahead(first, min(first + _GROUP_ROWS, rows.num_rows))
            except Exception:
                # For want of memory just now, for example: the prompt that asks for these encodes
                # them, and the others are not kept from it.
                _log.warning("embeddings not encoded ahead", first_row=first, exc_info=True)
            pause_s = _BUSY_PAUSE_S if self._busy() else time.monotonic() - began
            if stop.wait(pause_s):
                return
        seconds = round(time.monotonic() - started, 1)
        _log.info("embeddings encoded ahead", rows=rows.num_rows, seconds=seconds)
