"""Collections are short while requests are answered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import gc, sys, weakref
import torch
from server.heap import pass_over_imports

class Node: pass

assert gc.get_freeze_count() == 0
pass_over_imports()
frozen = gc.get_freeze_count()
assert frozen > 50_000, frozen
node = Node()
node.itself = node
gone = weakref.ref(node)
del node
pass_over_imports()  # a second model: what was made since is not passed over
assert gc.get_freeze_count() <= frozen
gc.collect()
assert gone() is None
"""


def test_imports_are_passed_over_once_and_garbage_is_not() -> None:
    subprocess.run([sys.executable, "-c", _SCRIPT], check=True, cwd=Path(__file__).parents[2])
