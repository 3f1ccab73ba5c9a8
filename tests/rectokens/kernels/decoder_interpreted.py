"""Run the decoder kernels in Triton's interpreter against the definitions; print JSON.

A program of its own, because the interpreter is chosen when triton is first imported.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from rectokens.kernels import decoder_launch as launch
from rectokens.kernels.gated_linear_launch import LinearTile, launch_gated_linear
from rectokens.kernels.head_norm_launch import launch_linear_logsumexp
from rectokens.ops import decoder_pieces as pieces
from rectokens.ops import fp8
from rectokens.ops.head_norm import linear_logsumexp
from tests.rectokens.kernels import poisoned

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.float16)


Tensor.new_empty = poisoned.new_empty


def close(found, wanted):
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 4e-3
    return bool(
        torch.allclose(
            found.float(), wanted.float(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    )


def norms(results):
    for size in (1, 48, 64, 1000):
        for dtype in DTYPES:
            for offset in (False, True):
                for with_residual in (False, True):
                    g = torch.Generator().manual_seed(size)
                    wide = torch.randn(5, size + 8, generator=g).to(dtype)
                    x = wide[:, :size]
                    residual = torch.randn(5, size, generator=g).to(dtype)
                    norm = pieces.Norm(torch.randn(size, generator=g).to(dtype), 1e-5, offset)
                    mine, theirs = residual.clone(), residual.clone()
                    given = (mine, theirs) if with_residual else (None, None)
                    found = launch.launch_add_norm(
                        x, given[0], norm.weight, norm.eps, offset=offset
                    )
                    right = close(found, pieces.add_norm_(x, given[1], norm))
                    key = f"norm/{size}/{dtype}/{offset}/{with_residual}"
                    results[key] = right and torch.equal(mine, theirs)


def rotations(results):
    for dim, page_size in ((16, 16), (80, 1), (6, 32)):
        for dtype in DTYPES:
            for kind in ("none", "norm", "offset"):
                g = torch.Generator().manual_seed(dim)
                rows = torch.randn(19, 10 * dim, generator=g).to(dtype)
                angles = torch.rand(50, dim // 2, generator=g) * 6.28
                rotary = pieces.RotaryTable(angles.cos().to(dtype), angles.sin().to(dtype))
                positions = torch.randint(0, 50, (19,), generator=g)
                given = None
                if kind == "none":
                    positions = positions[:1].expand(19)  # as beams of one request have it
                else:
                    weights = torch.randn(2, dim, generator=g).to(dtype)
                    given = tuple(pieces.Norm(w, 1e-6, kind == "offset") for w in weights)
                pages = -(-40 // page_size)
                stored = [torch.zeros(pages, 2, page_size, dim).to(dtype) for _ in range(4)]
                slots = torch.randperm(pages * page_size, generator=g)[:19].int()
                slots[3] = -1
                mine, theirs = rows.clone(), rows.clone()
                launch.launch_rotate_store(
                    mine, rotary.cos, rotary.sin, positions,
                    None if given is None else (given[0].weight, given[1].weight), 1e-6,
                    *stored[:2], slots, 6, offset=kind == "offset",
                )  # fmt: skip
                wanted = pieces.rotate_store_(
                    theirs, positions, rotary, given, *stored[2:], slots, 6
                )
                results[f"rotate/{dim}/{page_size}/{dtype}/{kind}"] = (
                    close(mine[:, : 6 * dim], wanted.flatten(1))
                    and close(stored[0], stored[2])
                    and torch.equal(stored[1], stored[3])
                )


def stores(results):
    for dim, page_size in ((16, 16), (80, 1)):
        g = torch.Generator().manual_seed(dim)
        source = [torch.randn(2, 23, dim, generator=g).transpose(0, 1) for _ in "kv"]
        stored = [torch.zeros(48 // page_size, 2, page_size, dim) for _ in range(4)]
        slots = torch.randperm(48, generator=g)[:23].int()
        slots[5] = -1
        launch.launch_store(*source, *stored[:2], slots)
        pieces.store_(*source, *stored[2:], slots)
        results[f"store/{dim}"] = torch.equal(stored[0], stored[2]) and torch.equal(
            stored[1], stored[3]
        )


def gates(results):
    for activation in pieces.ACTIVATIONS:
        for dtype in DTYPES:
            x = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
            found = launch.launch_gate(x, activation)
            results[f"gate/{activation}/{dtype}"] = close(found, pieces.gate(x, activation))


def gated_products(results):
    # Tiles that do not divide rows, outputs or hidden elements; programs that take several.
    for rows, hidden, outputs in ((37, 40, 48), (150, 16, 96), (3, 72, 16)):
        for activation in pieces.ACTIVATIONS:
            for dtype in DTYPES:
                g = torch.Generator().manual_seed(rows)
                x = torch.randn(rows, hidden, generator=g).to(dtype)
                weight = torch.randn(outputs, hidden, generator=g).to(dtype)
                found = launch_gated_linear(x, weight, activation, LinearTile(16, 32, 16, 4, 2))
                wanted = pieces.gated_linear(x, weight, None, activation)
                tolerance = 1e-4 if dtype == torch.float32 else 2e-2
                results[f"product/{rows}/{activation}/{dtype}"] = bool(
                    torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)
                )


def same_fp8(found, wanted):
    """Equal scales, and values at most one step of FP8 apart where float32 rounds otherwise.

    Where rounding carries into the exponent the interpreter loses the carry: half of what is right.
    """
    values, scale = found
    steps = values.view(torch.int8).int() - wanted.values.view(torch.int8).int()
    halved = values.float() * 2 == wanted.values.float()
    return (
        bool(torch.allclose(scale, wanted.scale, rtol=1e-3))
        and bool(((steps.abs() <= 1) | halved).all())
        and bool((steps == 0).float().mean() > 0.9)
    )


def in_fp8(results):
    for size, dtype in ((48, torch.float32), (1000, torch.float16)):
        g = torch.Generator().manual_seed(size)
        x, residual = torch.randn(2, 6, size, generator=g).to(dtype)
        x[2] = residual[2] = 0  # a row of zeros has no scale of its own
        norm = pieces.Norm(torch.randn(size, generator=g).to(dtype), 1e-5)
        for with_residual in (False, True):
            mine, theirs = residual.clone(), residual.clone()
            given = (mine, theirs) if with_residual else (None, None)
            found = launch.launch_add_norm_fp8(x, given[0], norm.weight, 1e-5, offset=False)
            right = same_fp8(found, fp8.add_norm_fp8_(x, given[1], norm))
            results[f"fp8/norm/{size}/{with_residual}"] = right and torch.equal(mine, theirs)
        wide = torch.randn(7, 2 * size, generator=g).to(dtype) * 4
        for activation in pieces.ACTIVATIONS:
            found = launch.launch_gate_fp8(wide, activation)
            results[f"fp8/gate/{size}/{activation}"] = same_fp8(
                found, fp8.gate_fp8(wide, activation)
            )


def norms_of_heads(results):
    for batch, width, hidden, outputs in (
        (3, 1, 40, 70),
        (2, 20, 24, 33),
        (1, 70, 16, 300),
        (2, 2, 8, 2200),
    ):
        for dtype in DTYPES:
            for softcap, with_bias in ((None, False), (3.0, True)):
                g = torch.Generator().manual_seed(width)
                x = torch.randn(batch * width, hidden, generator=g).to(dtype)
                weight = torch.randn(outputs, hidden, generator=g).to(dtype)
                bias = torch.randn(outputs, generator=g).to(dtype) if with_bias else None
                kinds = (torch.arange(batch) % 2).int()
                arguments = (x, weight, bias, kinds, 0)
                found = launch_linear_logsumexp(*arguments, factor=0.7, softcap=softcap)
                wide = [t if t is None else t.float() for t in (x, weight, bias)]
                wanted = linear_logsumexp(*wide, kinds, 0, factor=0.7, softcap=softcap)
                asked = (kinds == 0).repeat_interleave(width)
                key = f"logsumexp/{batch}/{width}/{dtype}/{softcap}"
                results[key] = close(found[asked], wanted[asked]) and not bool(found[~asked].any())


results: dict[str, bool] = {}
norms(results)
rotations(results)
stores(results)
gates(results)
gated_products(results)
in_fp8(results)
norms_of_heads(results)
json.dump(results, sys.stdout)
