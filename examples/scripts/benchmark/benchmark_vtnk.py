"""Constrained transitions: the fused op beside PyTorch, every row at the root of a flat trie.

``python -m examples.scripts.benchmark.benchmark_vtnk``

Arms: ``fused``, the fused linear op; ``kernel``, a product and the transition op; ``pytorch``,
compiled Linear and ``vtnk_pytorch``; ``sparse_pytorch``, compiled ``sparse_linear_pytorch``;
``trie_cpu`` (only if named), a walk of a Python trie to a mask, not at the largest B or V. Every
arm is compared with the reference before it is timed. ``ms_`` is graph replay; in the table of
details ``event_ms_`` is the time between events, ``floor_ms_`` what writing the (B, N) logits, and
gathering and multiplying the children's weights once, take in the same run, and ``times_floor``
how many times the larger of the two ``fused`` takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from rectokens.decoding.trie import Trie
from rectokens.decoding.vntk import sparse_linear_pytorch, vtnk_pytorch
from rectokens.ops.constrained_node_transition import (
    constrained_node_transition,
    fused_linear_constrained_node_transition,
)
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.state import ConstraintState

ALGORITHMS = ("fused", "kernel", "pytorch", "sparse_pytorch", "trie_cpu")
BATCHES = (256, 1024, 4096)
VOCABS = (512, 1024, 8192, 150_000)
HIDDEN = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def root_state(
    rows: int, vocab: int, sparsity: float, device: torch.device
) -> tuple[ConstraintState, int]:
    """All rows at the root of a trie of depth 1 with tokens 0..M-1, and M."""
    allowed = max(1, int(sparsity * vocab))
    items = torch.arange(allowed, device=device).unsqueeze(1)
    trie = CompactCSRTrie.from_sorted_batch(items, vocab, 1)
    return ConstraintState(0, trie, torch.zeros(rows, dtype=torch.long, device=device)), allowed


def arms_of(
    a: Tensor, weight: Tensor, state: ConstraintState, allowed: int, wanted: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """Calls that return (next_node, valid_idxs, logits), or logits alone."""
    device, trie = a.device, state.trie
    node = state.cur_node
    if node is None:
        raise ValueError("rows need nodes")
    arms: dict[str, Callable[[], Any]] = {}
    if "fused" in wanted:
        arms["fused"] = lambda: fused_linear_constrained_node_transition(a, weight.T, state)
    if "kernel" in wanted:
        arms["kernel"] = lambda: constrained_node_transition(a @ weight.T, state)
    if "pytorch" in wanted:
        dense = timing.compiled(
            lambda x, w, n: vtnk_pytorch(torch.nn.functional.linear(x, w), n, trie, 0), device
        )
        arms["pytorch"] = lambda: dense(a, weight, node)
    if "sparse_pytorch" in wanted:
        sparse = timing.compiled(lambda x, w, n: sparse_linear_pytorch(x, w, n, trie, 0), device)
        arms["sparse_pytorch"] = lambda: sparse(a, weight, node)
    if "trie_cpu" in wanted:
        walked = Trie()
        for token in range(allowed):
            walked.insert([token])

        def trie_cpu() -> Tensor:
            mask = torch.zeros(a.shape[0], weight.shape[0], dtype=torch.bool)
            for row in range(a.shape[0]):
                found = walked.find_prefix([])
                mask[row, list(found.children if found else ())] = True
            return (a @ weight.T).float().masked_fill(~mask.to(device), float("-inf"))

        arms["trie_cpu"] = trie_cpu
    return arms


def check(
    name: str, result: Any, expected: tuple[Tensor, Tensor, Tensor], tolerance: float
) -> None:
    """Compare an arm with the reference.

    Raises:
        RuntimeError: it differs.
    """
    parts = (result,) if isinstance(result, Tensor) else result
    for got, wanted in zip(parts[:-1], expected, strict=False):
        if not torch.equal(got, wanted):
            raise RuntimeError(f"{name}: children differ from the reference")
    logits = parts[-1].float()
    if not torch.allclose(logits, expected[2], atol=tolerance, rtol=tolerance):
        raise RuntimeError(f"{name}: logits differ from the reference")


def measure(rows: int, vocab: int, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    device = torch.device(options.device)
    state, allowed = root_state(rows, vocab, options.sparsity, device)
    dtype = DTYPES[options.dtype]
    a = torch.randn(rows, options.hidden, device=device).to(dtype)
    weight = (torch.randn(vocab, options.hidden, device=device) / options.hidden**0.5).to(dtype)
    wanted = list(options.algorithms)
    largest = rows == max(options.batches) or vocab == max(options.vocabs)
    if largest and "trie_cpu" in wanted and len(options.batches) * len(options.vocabs) > 1:
        wanted.remove("trie_cpu")
    line: dict[str, Any] = {"B": rows, "N": vocab}
    expected = sparse_linear_pytorch(a, weight, state.cur_node, state.trie, 0)  # type: ignore[arg-type]
    for name, call in arms_of(a, weight, state, allowed, wanted).items():
        rounding = dtype != torch.float32 and name in ("kernel", "pytorch", "trie_cpu")
        check(name, call(), expected, 5e-2 if rounding else 1e-2)
        taken = timing.time_call(call, device, graph=name != "trie_cpu")
        line[f"ms_{name}"] = round(taken.event if name == "trie_cpu" else taken.graph, 5)
        line[f"event_ms_{name}"] = round(taken.event, 5)
    for name in wanted:
        if name != "fused":
            line[f"speedup_fused_vs_{name}"] = timing.ratio(
                line.get(f"ms_{name}"), line.get("ms_fused")
            )
    line |= timing.floors(a, weight, torch.arange(allowed, device=device), vocab, device)
    floor = max(line["floor_ms_write"], line["floor_ms_product"])
    line["times_floor"] = timing.ratio(line.get("ms_fused"), floor)
    return line


def columns_of(algorithms: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns of the table, and those that its details add."""
    times = [f"ms_{name}" for name in algorithms]
    ratios = [f"speedup_fused_vs_{name}" for name in algorithms if name != "fused"]
    floors = [f"floor_ms_{name}" for name in ("write", "product", "product_bf16")]
    details = [*(f"event_ms_{name}" for name in algorithms), *floors, "times_floor"]
    return ["B", "N", *times, *ratios], details


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS[:4])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--sparsity", type=float, default=0.01, help="share of N that is allowed")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, measure, print, write."""
    options = parse(arguments)
    device = timing.device_of(options.device)
    print(f"{timing.describe(device)}, H={options.hidden}, {options.dtype}")
    lines = []
    for rows in options.batches:
        for vocab in options.vocabs:
            lines.append(measure(rows, vocab, options))
            print("  ".join(f"{name}={value}" for name, value in lines[-1].items()))
    columns, details = columns_of(options.algorithms)
    timing.write_tables(options.out, "bench_vtnk", columns, details, lines)
    ratios = [name for name in columns if name.startswith("speedup")]
    shown = ratios or [f"ms_{options.algorithms[0]}"]
    timing.heatmaps(options.out / "bench_vtnk.png", lines, "N", "B", shown)
    return lines


if __name__ == "__main__":
    main()
