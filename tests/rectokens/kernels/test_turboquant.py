"""The TurboQuant kernels, interpreted on the CPU, give what the plain path gives."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from rectokens._turboquant.assign import float32_boundaries
from rectokens.kernels.turboquant_launch import boundary_guess

PROGRAM = Path(__file__).with_name("turboquant_interpreted.py")
DIMS = [16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 384, 640, 2560, 3072, 5120]
# Products of fp16 numbers, summed in fp32: a coordinate near a boundary may fall beside it.
MAX_DIFFERING = {1: 0.001, 2: 0.001, 4: 0.003, 8: 0.03}


def check(result, bits):
    assert result["differ"] <= MAX_DIFFERING[bits]
    assert result["furthest"] <= 1
    assert result["lattice"]
    assert result["norms"]
    assert result["decode"] <= 1e-3
    assert result["zeros"]
    assert result["guards"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", DIMS)
def test_every_size(results, dim, bits):
    check(results[f"{dim}-{bits}"], bits)


@pytest.mark.parametrize("name", ["stay", "once"])
@pytest.mark.parametrize("dim", [64, 4096, 2560])
def test_programs_that_loop_and_programs_that_do_not(results, dim, name):
    check(results[f"{dim}-{name}"], 4)


def test_one_row(results):
    check(results["one row"], 4)


@pytest.mark.parametrize(("dim", "bits"), [(64, 4), (1024, 8), (4096, 4), (2560, 2)])
def test_rows_that_are_not_finite_have_such_norms_and_only_they(results, dim, bits):
    assert results[f"nan-{dim}-{bits}"]["not_finite"] == [3, 5, 8]


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 640, 1024, 2560, 4096, 5120, 16384])
def test_the_guess_lands_beside_the_right_boundary(dim):
    """Every magnitude must be guessed to one of the two boundaries around it."""
    coefficients = boundary_guess(dim, 8).numpy()
    boundaries = float32_boundaries(dim, 8)
    magnitudes = np.linspace(0, boundaries[-1] * 1.5, 200_001, dtype=np.float32)
    inside = np.minimum(magnitudes, boundaries[-1])
    square = inside * inside
    guess = np.full_like(inside, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        guess = guess * square + coefficient
    rounded = (guess * inside + np.float32(2**23)).view(np.int32) & 255
    nearest = np.maximum(rounded, 1)
    below = np.searchsorted(boundaries, magnitudes, side="left")
    assert ((nearest == below) | (nearest == below + 1)).all()
    assert nearest.max() <= 127


def test_the_library_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, rectokens.prompt_embeds\n"
        "from rectokens.turboquant import encode_embeddings\n"
        "print(encode_embeddings(torch.ones(2, 64))[0].shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "torch.Size([2, 32])", run.stderr
    assert importlib.util.find_spec("rectokens.kernels.turboquant") is not None
