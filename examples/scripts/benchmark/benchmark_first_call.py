"""How long the first call of each kernel's op takes, and later ones with other numbers of rows.

``TRITON_CACHE_DIR=$(mktemp -d) python -m examples.scripts.benchmark.benchmark_first_call``

With an empty cache the first call compiles all that it needs; ``first_s`` has it. ``again_s``
is the longest of calls of the same op with other numbers of rows, which must compile nothing
(``recompiled`` counts calls over a tenth of a second). The sum is printed last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from examples.scripts.benchmark.benchmark_constrained_serving import skewed_state
from rectokens.kernels.nn_quantize import quantize_fwd, residual_quantize_fwd
from rectokens.ops.constrained_node_transition import (
    constrained_node_transition,
    draw_children,
    fused_linear_constrained_node_transition,
    rank_children,
)

COLUMNS = ("op", "first_s", "again_s", "recompiled")
ROWS = (50, 1, 7, 64, 333, 4096)
LONG = 0.1


def calls_of(
    hidden: int, vocab: int, most: int, device: torch.device
) -> dict[str, Callable[[int], Any]]:
    """Ops as functions of the number of rows; bf16 layers, fp32 codebooks."""
    weight = torch.randn(vocab, hidden, device=device).bfloat16()
    x = torch.randn(max(ROWS), 64, device=device)
    books = torch.randn(4, 256, 64, device=device)
    seed = torch.zeros((), dtype=torch.long, device=device)

    def at(rows: int) -> tuple[Tensor, Any]:
        state = skewed_state(rows, vocab, min(vocab, 4 * most), most, device)[0]
        return torch.randn(rows, hidden, device=device).bfloat16(), state

    def transition(rows: int) -> Any:
        a, state = at(rows)
        return constrained_node_transition(a @ weight.T, state)

    def fused(rows: int) -> Any:
        a, state = at(rows)
        return fused_linear_constrained_node_transition(a, weight.T, state)

    def top(rows: int) -> Any:
        a, state = at(rows)
        return rank_children(a, weight.T, state, min(50, most))

    def draw(rows: int) -> Any:
        a, state = at(rows)
        return draw_children(a, weight.T, state, 1, rng_seed=seed)

    return {
        "constrained_node_transition": transition,
        "fused_linear_constrained_node_transition": fused,
        "rank_children": top,
        "draw_children": draw,
        "quantize_fwd": lambda rows: quantize_fwd(x[:rows], books[0]),
        "residual_quantize_fwd": lambda rows: residual_quantize_fwd(x[:rows], books),
    }


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the device's work included."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--most", type=int, default=256, help="most children of a node")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write."""
    options = parse(arguments)
    device = timing.device_of(options.device)
    print(timing.describe(device))
    # The device and its libraries are started, which is none of the kernels' doing.
    seconds(lambda: torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device), device)
    lines: list[dict[str, Any]] = []
    for name, call in calls_of(options.hidden, options.vocab, options.most, device).items():
        first = seconds(partial(call, ROWS[0]), device)
        # A bucket of the number of rows may have tile shapes of its own: seen twice before.
        for rows in ROWS:
            call(rows)
        again = [seconds(partial(call, rows + 1 if rows < max(ROWS) else rows), device)
                 for rows in ROWS]  # fmt: skip
        lines.append(
            {
                "op": name,
                "first_s": round(first, 3),
                "again_s": round(max(again), 4),
                "recompiled": sum(taken > LONG for taken in again),
            }
        )
        print("  ".join(f"{column}={value}" for column, value in lines[-1].items()))
    print(f"all first calls: {sum(line['first_s'] for line in lines):.1f} s")
    timing.write_csv(options.out / "bench_first_call.csv", COLUMNS, lines)
    return lines


if __name__ == "__main__":
    main()
