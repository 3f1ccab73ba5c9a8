"""Short pauses of the garbage collector."""

from __future__ import annotations

import gc
from functools import cache


@cache
def pass_over_imports() -> None:
    """Have the collector pass over all that is there now; only the first call does anything.

    To be called when all modules are imported and no model is loaded yet. Half a million objects of
    modules stretch a collection from milliseconds to a quarter of a second, during which no request
    advances, and they never become garbage. What is made afterwards is collected as ever.
    """
    gc.collect()
    gc.freeze()
