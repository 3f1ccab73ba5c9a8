"""A catalog's trie from unsorted codes on a device: seconds, bytes an item, peak memory.

``python -m examples.scripts.benchmark.benchmark_trie_build``

Codes are drawn at random, the worst case: real semantic IDs share prefixes more often. The median
of ``--repeats`` builds; leaves are compared with the codes they came from before that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.scripts.benchmark import kernel_timing as timing
from rectokens.schemas.catalog_trie import CatalogTrie

COLUMNS = ("items", "levels", "codebook_size", "first_s", "median_s", "bytes_per_item", "peak_gb")


def build(codes: torch.Tensor, codebook_size: int) -> tuple[float, CatalogTrie, torch.Tensor]:
    """Seconds, the trie, and the order its items are in."""
    if codes.is_cuda:
        torch.cuda.synchronize(codes.device)
    started = time.perf_counter()
    trie, order = CatalogTrie.from_codes(codes, codebook_size)
    if codes.is_cuda:
        torch.cuda.synchronize(codes.device)
    return time.perf_counter() - started, trie, order


def measure(items: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One line of the table.

    Raises:
        RuntimeError: a leaf's codes are not those of its item.
    """
    g = torch.Generator(device=device).manual_seed(0)
    shape = (items, options.levels)
    codes = torch.randint(options.codebook_size, shape, device=device, generator=g).int()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, trie, order = build(codes, options.codebook_size)
    leaves = torch.arange(min(10_000, trie.leaf_item_ptrs.numel() - 1), device=device)
    wanted = codes[order[trie.leaf_item_ptrs[leaves].long()]].long()
    if not torch.equal(trie.leaf_codes(leaves), wanted):
        raise RuntimeError("leaves differ from the codes they came from")
    size = trie.nbytes
    del trie, order
    times = [build(codes, options.codebook_size)[0] for _ in range(options.repeats)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "items": items,
        "levels": options.levels,
        "codebook_size": options.codebook_size,
        "first_s": round(first, 5),
        "median_s": round(statistics.median(times), 5),
        "bytes_per_item": round(size / items, 2),
        "peak_gb": round(peak / 1e9, 2),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--items", type=int, nargs="+", default=(1_000_000, 20_000_000))
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--codebook-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, measure, print, write."""
    options = parse(arguments)
    device = timing.device_of(options.device)
    print(timing.describe(device))
    lines = []
    for items in options.items:
        lines.append(measure(items, options, device))
        print("  ".join(f"{name}={value}" for name, value in lines[-1].items()))
    timing.write_csv(options.out / "bench_trie_build.csv", COLUMNS, lines)
    return lines


if __name__ == "__main__":
    main()
