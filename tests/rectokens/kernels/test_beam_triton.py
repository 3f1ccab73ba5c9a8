"""The beam-step kernels, interpreted on the CPU, give what the definition gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("beam_interpreted.py")


def test_equal_to_the_definition():
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(PROGRAM.parents[3]),
    }
    run = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads(run.stdout)
    assert len(results) >= 8
    assert {name: result for name, result in results.items() if result != "ok"} == {}
