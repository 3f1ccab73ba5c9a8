"""Programs that run kernels in Triton's interpreter, which is chosen when triton is imported."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def results(request):
    """What the test module's ``PROGRAM`` prints."""
    program = request.module.PROGRAM
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(request.config.rootpath),
    }
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)
