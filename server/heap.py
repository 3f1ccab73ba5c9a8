"""Short pauses of the garbage collector, which are pauses of everything that is answered.

It is there for cycles. Requests leave none behind, however they end, and what is loaded is freed by
its last user; so it may look seldom, and pass over what stays.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache

import torch

from server.engine.device.graphs import empty_cache

# A full collection follows so many of the middle generation, ten times Python's own number. It
# walks all requests that wait, some two hundred objects each.
_MIDDLE_BEFORE_FULL = 100


@cache
def pass_over_imports() -> None:
    """Have the collector pass over all that is there now; only the first call does anything.

    To be called when all modules are imported and no model is loaded yet. Half a million objects of
    modules stretch a collection from milliseconds to a quarter of a second, during which no request
    advances, and they never become garbage. What is made afterwards is collected as ever.
    """
    gc.collect()
    gc.freeze()


def pass_over_loaded() -> None:
    """The process has started: pass over all that it has loaded, and look through the rest seldom.

    What is passed over and becomes garbage in a cycle stays until :func:`collect_all`.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _MIDDLE_BEFORE_FULL)


def collect_all() -> None:
    """Collect what is passed over too: a quarter of a second in which no request advances."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def free_garbage(collect: Callable[[], object] = gc.collect) -> None:
    """Collect what was loaded and has no user any more; a GPU's memory of it is free then."""
    collect()
    if torch.cuda.is_available():
        empty_cache()
