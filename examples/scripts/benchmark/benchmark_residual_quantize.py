"""Residual codes of several levels: one pass over x, beside a search a level.

``python -m examples.scripts.benchmark.benchmark_residual_quantize``

Arms: ``one_pass``, the residual op; ``by_level``, the search op and a subtraction a level;
``cdist_compiled``, compiled ``torch.cdist``, argmin and subtraction. The first two must agree with
each other on every row, or nothing is timed. ``floor_ms`` is what reading x once and writing its
codes takes at the measured copy rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from rectokens.kernels.nn_quantize import quantize_fwd, residual_quantize_fwd

ALGORITHMS = ("one_pass", "by_level", "cdist_compiled")
COLUMNS = (
    *("B", "D", "K", "L"),
    *(f"ms_{name}" for name in ALGORITHMS),
    *("speedup_vs_by_level", "speedup_vs_cdist", "rows_per_s", "floor_ms", "agreement_cdist"),
)


def by_level(x: Tensor, codebooks: Tensor, search: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Codes (B, L) by a search and a subtraction a level."""
    codes = []
    for codebook in codebooks.unbind(0):
        codes.append(search(x, codebook))
        x = x - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


def measure(
    rows: int, dim: int, num_codes: int, levels: int, device: torch.device, rate: float
) -> dict[str, Any]:
    """One line of the table; ``rate`` in bytes a second.

    Raises:
        RuntimeError: one pass and level by level differ.
    """
    x = torch.randn(rows, dim, device=device)
    books = torch.stack(
        [torch.randn(num_codes, dim, device=device) * 0.7**level for level in range(levels)]
    )
    cdist = timing.compiled(
        lambda p, q: by_level(p, q, lambda a, b: torch.cdist(a, b).argmin(dim=1)), device
    )
    arms: dict[str, Callable[[], Tensor]] = {
        "one_pass": lambda: residual_quantize_fwd(x, books),
        "by_level": lambda: by_level(x, books, quantize_fwd),
        "cdist_compiled": lambda: cdist(x, books),
    }
    found = {name: call() for name, call in arms.items()}
    if not torch.equal(found["one_pass"], found["by_level"]):
        raise RuntimeError("one pass and level by level differ")
    line: dict[str, Any] = {"B": rows, "D": dim, "K": num_codes, "L": levels}
    for name, call in arms.items():
        line[f"ms_{name}"] = round(timing.time_call(call, device).graph, 5)
    line["speedup_vs_by_level"] = timing.ratio(line["ms_by_level"], line["ms_one_pass"])
    line["speedup_vs_cdist"] = timing.ratio(line["ms_cdist_compiled"], line["ms_one_pass"])
    line["rows_per_s"] = round(rows / line["ms_one_pass"] * 1000)
    line["floor_ms"] = round((4 * rows * dim + 8 * rows * levels) / rate * 1000, 5)
    same = found["one_pass"] == found["cdist_compiled"]
    line["agreement_cdist"] = round(float(same.all(dim=1).double().mean()), 6)
    return line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--batches", type=int, nargs="+", default=(1024, 65_536))
    parser.add_argument("--dims", type=int, nargs="+", default=(64, 256))
    parser.add_argument("--codes", type=int, default=256, help="of a level (default: 256)")
    parser.add_argument("--levels", type=int, default=4, help="default: 4")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, measure, print, write."""
    options = parse(arguments)
    device = timing.device_of(options.device)
    rate = timing.rate_of(device, copy=True)
    print(f"{timing.describe(device)}, copy {rate / 1e9:.0f} GB/s")
    lines = []
    for rows in options.batches:
        for dim in options.dims:
            lines.append(measure(rows, dim, options.codes, options.levels, device, rate))
            print("  ".join(f"{name}={value}" for name, value in lines[-1].items()))
    timing.write_csv(options.out / "bench_residual_quantize.csv", COLUMNS, lines)
    return lines


if __name__ == "__main__":
    main()
