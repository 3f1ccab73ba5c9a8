"""Run the TurboQuant kernels in Triton's interpreter against the plain path; print JSON.

A program of its own, because the interpreter is chosen when triton is first imported.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from rectokens._turboquant.codec import block_rotation, codec_for, hadamard_rotation, packed_dim
from rectokens._turboquant.packing import unpack
from rectokens._turboquant.rows import decode_rows, encode_rows, row_tables
from rectokens.kernels.turboquant_launch import (
    LaunchSettings,
    kernel_tables,
    launch_decode,
    launch_encode,
    tile_shape,
)

CPU = torch.device("cpu")


def rotation_of(dim: int):
    return hadamard_rotation(dim, 42) if "/hd2/" in codec_for(dim) else block_rotation(dim, 42)


def sample(n: int, dim: int, dtype: torch.dtype, special: bool) -> torch.Tensor:
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(n * dim))
    if special:
        x[0] = 0
        x[1] = 1.0
        x[2] = 0
        x[2, dim // 3] = -1.0
        if dtype == torch.float32:
            x[3] *= 1e-36
            x[4] *= 1e33
            x[5] *= 1e-42
    return x.to(dtype)


def compare(dim, bits, n, dtype, special, settings) -> dict:
    rotation = rotation_of(dim)
    x = sample(n, dim, dtype, special)
    plain, tables = row_tables(dim, bits, rotation, CPU), kernel_tables(rotation, bits, CPU)
    width = packed_dim(dim, bits)
    packed = torch.empty(n, width, dtype=torch.uint8)
    norms = torch.empty(n)
    encode_rows(x, packed, norms, bits, rotation, plain)
    # One guard row before and after shows a write outside the output.
    guarded = torch.full((n + 2, width), 0xA5, dtype=torch.uint8)
    guarded_norms = torch.full((n + 2,), -7.0)
    launch_encode(x, guarded[1:-1], guarded_norms[1:-1], bits, rotation, tables, settings)
    levels = unpack(packed, bits, dim).int() - unpack(guarded[1:-1], bits, dim).int()

    expected = torch.empty(n, dim)
    decode_rows(packed, norms, expected, rotation, plain)
    out = torch.full((n + 2, dim), -7.0)
    launch_decode(packed, norms, out[1:-1], bits, rotation, tables, settings)
    exact, got = expected.double(), out[1:-1].double()
    relative = (got - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-300)
    norm_error = (guarded_norms[1:-1].double() - norms.double()).abs()
    # Next to 1e-45, the smallest float32, digits are lost on either side.
    norm_limit = 1e-6 * norms.double() + 3e-45
    # Constant and one-hot rows lie on a lattice that has points on boundaries, zero above all:
    # rounding decides these, so such rows are compared by their error instead.
    lattice = slice(1, 3) if special else slice(0, 0)
    regular = torch.ones(n, dtype=torch.bool)
    regular[lattice] = False
    again = torch.empty(n, dim)
    decode_rows(guarded[1:-1], norms, again, rotation, plain)
    error = (again - x.float())[lattice].square().sum(1)
    plain_error = (expected - x.float())[lattice].square().sum(1)
    return {
        "differ": levels[regular].ne(0).double().mean().item(),
        "lattice": bool(((error - plain_error).abs() <= 0.02 * plain_error).all()),
        "furthest": levels.abs().max().item(),
        "norms": bool((norm_error <= norm_limit).all()),
        "decode": relative[norms > 1e-37].max().item(),
        "zeros": not special or not got[0].any().item(),
        "guards": bool(
            (guarded[[0, -1]] == 0xA5).all()
            and (guarded_norms[[0, -1]] == -7).all()
            and (out[[0, -1]] == -7).all()
        ),
    }


def not_finite(dim: int, bits: int) -> dict:
    """Norms of rows with NaN or infinity, and of their neighbours in the same tile."""
    rotation = rotation_of(dim)
    x = sample(12, dim, torch.float32, special=False)
    x[3, dim - 1], x[5, 0], x[8, 7] = np.nan, np.inf, -np.inf
    packed = torch.empty(12, packed_dim(dim, bits), dtype=torch.uint8)
    norms = torch.empty(12)
    launch_encode(x, packed, norms, bits, rotation, kernel_tables(rotation, bits, CPU))
    return {"not_finite": (~torch.isfinite(norms)).nonzero().flatten().tolist()}


def main() -> None:
    results = {}
    stay, once = LaunchSettings(4, 3), LaunchSettings(4, 0)
    for dim in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 384, 640, 2560, 3072, 5120):
        n = max(6, 3 * tile_shape(rotation_of(dim)).rows + 2)
        for bits in (1, 2, 4, 8):
            # Whole tiles do not divide the rows; every program takes more than one tile.
            n_here = max(n, 15000 // dim)
            results[f"{dim}-{bits}"] = compare(dim, bits, n_here, torch.float32, True, None)
    for dim in (64, 4096, 2560):
        for name, settings in (("stay", stay), ("once", once)):
            results[f"{dim}-{name}"] = compare(dim, 4, 7, torch.float16, True, settings)
    results["one row"] = compare(4096, 4, 1, torch.float32, False, None)
    for dim, bits in ((64, 4), (1024, 8), (4096, 4), (2560, 2)):
        results[f"nan-{dim}-{bits}"] = not_finite(dim, bits)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
