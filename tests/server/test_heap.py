"""Collections are short while requests are answered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import gc, sys, weakref
import torch
from server.heap import collect_all, pass_over_imports, pass_over_loaded

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

node = Node()
node.itself = node
gone = weakref.ref(node)
before = gc.get_threshold()
pass_over_loaded()
frozen = gc.get_freeze_count()
assert gc.get_threshold()[:2] == before[:2]
assert gc.get_threshold()[2] > before[2]
del node
gc.collect()
assert gone() is not None
collect_all()
assert gone() is None
assert gc.get_freeze_count() > frozen - 1_000
"""


def test_what_is_there_is_passed_over_and_other_garbage_is_not() -> None:
    subprocess.run([sys.executable, "-c", _SCRIPT], check=True, cwd=Path(__file__).parents[2])
