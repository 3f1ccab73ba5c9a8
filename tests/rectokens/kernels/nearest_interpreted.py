"""Run the nearest-codeword kernel in Triton's interpreter against the definition; print JSON.

A program of its own, because the interpreter is chosen when triton is first imported.
"""

import json
import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from rectokens.kernels.nearest_launch import NearestSettings, launch_nearest
from rectokens.ops.nearest_reference import nearest_direct, squared_distances
from tests.rectokens.kernels import poisoned

torch.set_num_threads(1)
SMALL = NearestSettings(rows=16, codes=16, dims=16, look_codes=16, look_dims=16, half=torch.float16)
PARTS = replace(SMALL, parts=3, length_dims=64)


Tensor.new_empty = poisoned.new_empty


def sample(rows, dim, codes, offset, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows * 1000 + dim * 10 + codes)
    x = (torch.randn(rows, dim, generator=g) + offset).to(dtype)
    return x, (torch.randn(codes, dim, generator=g) + offset).to(dtype)


def single(results):
    # One tile of 16 or several, whole or not, of rows, of numbers and of codes.
    shapes = ((1, 1, 1), (17, 7, 5), (18, 64, 30), (17, 33, 17), (32, 16, 64), (3, 130, 2))
    for rows, dim, codes in shapes:
        for offset in (0.0, 1e4):
            for dtype in (torch.float32, torch.float16):
                if dtype == torch.float16 and offset:
                    continue
                x, book = sample(rows, dim, codes, offset, dtype)
                wanted = nearest_direct(x, book)
                right = squared_distances(x, book, wanted)
                for form, chosen in (("single", SMALL), ("parts", PARTS)):
                    found, distances = launch_nearest(
                        x, book.unsqueeze(0), with_distance=True, settings=chosen
                    )
                    results[f"{form}/{rows}/{dim}/{codes}/{offset}/{dtype}"] = bool(
                        torch.equal(found[:, 0], wanted)
                        and torch.allclose(distances, right, rtol=1e-5, atol=1e-6)
                    )


def ties(results):
    """Small integers: many codes are equally near; some are copies of one another."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (40, 3), generator=g).float()
    book = torch.randint(-1, 2, (40, 3), generator=g).float()
    found, _ = launch_nearest(x, book.unsqueeze(0), settings=SMALL)
    results["ties"] = torch.equal(found[:, 0], nearest_direct(x, book))
    found, _ = launch_nearest(x, book.unsqueeze(0), settings=PARTS)
    results["ties in parts"] = torch.equal(found[:, 0], nearest_direct(x, book))


def extremes(results):
    """Large numbers overflow float32's squares, small ones vanish; NaN rows get some code."""
    for scale in (1e25, 1e-25):
        x, book = sample(20, 12, 9, 0.0)
        x, book = x * scale, book * scale
        for form, chosen in (("scale", SMALL), ("parts at scale", PARTS)):
            found, _ = launch_nearest(x, book.unsqueeze(0), settings=chosen)
            results[f"{form} {scale}"] = torch.equal(found[:, 0], nearest_direct(x, book))
    x, book = sample(20, 12, 9, 0.0)
    x[3, 2], x[5, 0] = float("nan"), float("inf")
    wanted = nearest_direct(x, book)
    keep = torch.ones(20, dtype=torch.bool)
    keep[[3, 5]] = False
    for form, chosen in (("not finite", SMALL), ("parts, not finite", PARTS)):
        found, _ = launch_nearest(x, book.unsqueeze(0), settings=chosen)
        in_range = bool((found >= 0).all() and (found < 9).all())
        results[form] = in_range and torch.equal(found[keep, 0], wanted[keep])


def residual(results):
    for rows, dim, codes, levels in ((70, 24, 17, 3), (5, 40, 8, 4), (33, 16, 20, 2)):
        x, _ = sample(rows, dim, codes, 0.0)
        g = torch.Generator().manual_seed(levels)
        books = (
            torch.randn(levels, codes, dim, generator=g)
            * torch.logspace(0, -1, levels)[:, None, None]
        )
        left, wanted = x, []
        for book in books:
            wanted.append(nearest_direct(left, book))
            left = left - book[wanted[-1]]
        found, _ = launch_nearest(x, books, settings=SMALL)
        results[f"residual/{rows}/{levels}"] = torch.equal(found, torch.stack(wanted, 1))


def rounded(results):
    """The TF32 form rounds, but the interpreter's product does not: equal but for near ties."""
    x, book = sample(40, 20, 30, 0.0)
    found, _ = launch_nearest(x, book.unsqueeze(0), exact=False, settings=SMALL)
    agree = (found[:, 0] == nearest_direct(x, book)).double().mean().item()
    results["tf32"] = agree > 0.95


def main() -> None:
    results: dict[str, bool] = {}
    for part in (single, ties, extremes, residual, rounded):
        part(results)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
