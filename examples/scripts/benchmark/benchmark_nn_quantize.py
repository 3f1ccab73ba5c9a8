"""Nearest-codeword search: both ops beside compiled ``torch.cdist`` and FAISS.

``python -m examples.scripts.benchmark.benchmark_nn_quantize``

One table for each N, the codebook's rows. Both ops must agree with float64 on every row whose two
best distances differ by more than float32 rounding, or nothing is timed; for the other arms the
share of such rows is printed. ``ms_`` is graph replay (events for FAISS, which cannot be
captured); in the table of details ``event_ms_`` is the time between events, ``floor_ms`` what
reading x once and writing its codes takes at the measured copy rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from rectokens.kernels.nn_quantize import quantize_fwd, quantize_fwd_mm

ALGORITHMS = ("quantize_fwd", "quantize_fwd_mm", "cdist_compiled", "faiss_search")
EXACT = ("quantize_fwd", "quantize_fwd_mm")
BATCHES = (32, 256, 1024, 4096, 16_384, 32_768, 65_536)
DIMS = (64, 128, 256)
CODES = (64, 128, 256, 512)
PAIRS = {
    "speedup_fwd_vs_mm": ("quantize_fwd_mm", "quantize_fwd"),
    "speedup_fwd_vs_cdist": ("cdist_compiled", "quantize_fwd"),
    "speedup_mm_vs_cdist": ("cdist_compiled", "quantize_fwd_mm"),
    "speedup_fwd_vs_faiss": ("faiss_search", "quantize_fwd"),
    "speedup_mm_vs_faiss": ("faiss_search", "quantize_fwd_mm"),
}


def arms_of(x: Tensor, codebook: Tensor, wanted: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    """Calls that return codes (B,). FAISS only where it is installed with GPU support."""
    arms: dict[str, Callable[[], Tensor]] = {}
    if "quantize_fwd" in wanted:
        arms["quantize_fwd"] = lambda: quantize_fwd(x, codebook)
    if "quantize_fwd_mm" in wanted:
        arms["quantize_fwd_mm"] = lambda: quantize_fwd_mm(x, codebook)[0]
    if "cdist_compiled" in wanted:
        cdist = timing.compiled(lambda p, q: torch.cdist(p, q).argmin(dim=1), x.device)
        arms["cdist_compiled"] = lambda: cdist(x, codebook)
    if "faiss_search" in wanted and x.is_cuda:
        try:
            import faiss
            import faiss.contrib.torch_utils

            from rectokens.ops.faiss_quantize import make_gpu_index
        except ImportError:
            return arms
        if hasattr(faiss, "StandardGpuResources"):
            index = make_gpu_index(codebook)
            arms["faiss_search"] = lambda: index.search(x, 1)[1].view(-1)
    return arms


def agreement(codes: Tensor, x: Tensor, codebook: Tensor) -> float:
    """Share of rows, of those that rounding cannot decide, with the code that float64 finds."""
    right = decided = 0
    for begin in range(0, x.shape[0], 4096):
        part = torch.cdist(x[begin : begin + 4096].double(), codebook.double()).square()
        best, first = part.topk(min(2, part.shape[1]), dim=1, largest=False)
        clear = best[:, -1] - best[:, 0] > 1e-6 * best[:, -1]
        decided += int(clear.sum())
        right += int((codes[begin : begin + 4096][clear] == first[clear, 0]).sum())
    return right / decided if decided else 1.0


def measure(
    rows: int, dim: int, num_codes: int, options: argparse.Namespace, rate: float
) -> dict[str, Any]:
    """One line of the table; ``rate`` in bytes a second.

    Raises:
        RuntimeError: an op of the library is not exact.
    """
    device = torch.device(options.device)
    x = torch.randn(rows, dim, device=device)
    codebook = torch.randn(num_codes, dim, device=device)
    line: dict[str, Any] = {"B": rows, "D": dim, "BN": num_codes}
    for name, call in arms_of(x, codebook, options.algorithms).items():
        share = agreement(call(), x, codebook)
        if name in EXACT and share < 1:
            raise RuntimeError(f"{name}: {share:.4%} of rows agree with float64, B={rows} D={dim}")
        taken = timing.time_call(call, device, graph=name != "faiss_search")
        line[f"ms_{name}"] = round(taken.event if name == "faiss_search" else taken.graph, 5)
        line[f"event_ms_{name}"] = round(taken.event, 5)
        line[f"agreement_{name}"] = round(share, 6)
    for column, (slow, fast) in PAIRS.items():
        line[column] = timing.ratio(line.get(f"ms_{slow}"), line.get(f"ms_{fast}"))
    line["floor_ms"] = round((4 * rows * dim + 8 * rows) / rate * 1000, 5)
    return line


def columns_of(algorithms: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns of the table, and those that its details add."""
    times = [f"ms_{name}" for name in algorithms]
    more = [f"{kind}_{name}" for kind in ("event_ms", "agreement") for name in algorithms]
    return ["B", "D", "BN", *times, *PAIRS], [*more, "floor_ms"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--codes", type=int, nargs="+", default=CODES, help="N, one table each")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, measure, print, write."""
    options = parse(arguments)
    device = timing.device_of(options.device)
    rate = timing.rate_of(device, copy=True)
    print(f"{timing.describe(device)}, copy {rate / 1e9:.0f} GB/s")
    everything = []
    for num_codes in options.codes:
        lines = []
        for rows in options.batches:
            for dim in options.dims:
                lines.append(measure(rows, dim, num_codes, options, rate))
                print("  ".join(f"{name}={value}" for name, value in lines[-1].items()))
        stem = f"bench_nn_quantize_N{num_codes}"
        timing.write_tables(options.out, stem, *columns_of(options.algorithms), lines)
        timing.heatmaps(options.out / f"{stem}.png", lines, "D", "B", list(PAIRS))
        everything += lines
    return everything


if __name__ == "__main__":
    main()
