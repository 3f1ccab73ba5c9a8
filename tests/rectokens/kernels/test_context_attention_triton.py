"""The context attention kernels, interpreted on the CPU, agree with the definition."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("context_attention_interpreted.py")


@pytest.fixture(scope="module")
def results():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(("prefix", "count"), [("prompt", 30), ("beams", 60)])
def test_equal_to_the_definition(results, prefix, count):
    found = {name: right for name, right in results.items() if name.startswith(prefix)}
    assert len(found) == count
    assert all(found.values()), found
