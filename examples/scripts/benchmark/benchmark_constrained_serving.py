"""Constrained ops on what serving has: every row at its own node, fan-out skewed, bf16 weights.

``python -m examples.scripts.benchmark.benchmark_constrained_serving``

The trie has ``--nodes`` inner nodes with 1 to 256 children, few of them with many, tokens at random
among V codes; rows stand at random nodes. Arms: ``fused``, masked (B, V) logits; ``topk`` and
``sample``, k of the children and no tensor of that size; ``sparse_pytorch``, compiled, left out
where its (B, M, H) gather would not fit. Every arm is compared with a float32 reference on some
rows before it is timed.

``gathered_mb``: weight rows of all children of all rows, read once for each row. ``moved_mb``:
the least that must move, distinct weight rows, hidden states and outputs once; ``floor_ms`` is its
time at the measured copy rate, ``times_floor`` how far the arm is from it, ``gb_per_s`` the arm's
rate on ``gathered_mb`` plus outputs, part of which a cache may serve.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from examples.scripts.benchmark.benchmark_vtnk import DTYPES
from rectokens.decoding.vntk import sparse_linear_pytorch
from rectokens.ops.constrained_node_transition import (
    draw_children,
    fused_linear_constrained_node_transition,
    rank_children,
)
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.state import ConstraintState

ALGORITHMS = ("fused", "topk", "sample", "sparse_pytorch")
ROWS = (50, 256, 1024, 4096, 10_240, 40_960)
HIDDENS = (1024, 2048, 4096)
_CHECKED_ROWS = 64


@dataclass(frozen=True)
class Record:
    """One line of the table; megabytes are 1e6 bytes."""

    algorithm: str
    B: int
    N: int
    H: int
    M: int
    mean_children: float
    ms: float
    event_ms: float
    gathered_mb: float
    moved_mb: float
    gb_per_s: float
    floor_ms: float
    times_floor: float


def skewed_state(
    rows: int, vocab: int, num_nodes: int, most: int, device: torch.device
) -> tuple[ConstraintState, Tensor]:
    """Rows at random nodes of depth 1, and the number of children of each row's node."""
    g = torch.Generator().manual_seed(vocab + num_nodes)
    num_nodes = min(num_nodes, vocab)
    most = min(most, vocab)
    # A Pareto tail of exponent 1.2: the median node has one or two children, a few have `most`.
    counts = torch.rand(num_nodes, generator=g).pow(-1 / 1.2).long().clamp(1, most)
    counts[0] = most
    items = torch.cat(
        [
            torch.stack((torch.full((n,), node), torch.randperm(vocab, generator=g)[:n]), 1)
            for node, n in enumerate(counts.tolist())
        ]
    )
    trie = CompactCSRTrie.from_sorted_batch(items.to(device), vocab, 1)
    at = torch.randint(num_nodes, (rows,), generator=g)
    return ConstraintState(1, trie, (1 + at).to(device)), counts[at]


def arms_of(
    a: Tensor, weight: Tensor, state: ConstraintState, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Calls; each returns the op's own result."""
    device, trie, node = a.device, state.trie, state.cur_node
    seed = torch.zeros((), dtype=torch.long, device=device)
    arms: dict[str, Callable[[], Any]] = {
        "fused": lambda: fused_linear_constrained_node_transition(a, weight.T, state),
        "topk": lambda: rank_children(a, weight.T, state, options.topk),
        "sample": lambda: draw_children(a, weight.T, state, 1, rng_seed=seed),
    }
    gathered = a.shape[0] * trie.layer_max_branches[1] * a.shape[1] * 4
    if gathered <= options.max_gib * (1 << 30):
        sparse = timing.compiled(lambda x, w, n: sparse_linear_pytorch(x, w, n, trie, 1), device)
        arms["sparse_pytorch"] = lambda: sparse(a, weight, node)
    return {name: call for name, call in arms.items() if name in options.algorithms}


def check(
    name: str, result: Any, a: Tensor, weight: Tensor, state: ConstraintState, k: int
) -> None:
    """Compare the first rows with the float32 reference.

    Raises:
        RuntimeError: they differ.
    """
    rows = slice(0, _CHECKED_ROWS)
    if state.cur_node is None:
        raise ValueError("rows need nodes")
    wanted = sparse_linear_pytorch(a[rows].float(), weight.float(), state.cur_node[rows],
                                   state.trie, 1)  # fmt: skip
    right = torch.equal(result[0][rows], wanted[0]) and torch.equal(result[1][rows], wanted[1])
    if name in ("fused", "sparse_pytorch"):
        right = right and torch.allclose(result[2][rows], wanted[2], atol=1e-2)
    elif name == "topk":
        best = wanted[2].topk(min(k, wanted[2].shape[1]), dim=1).values
        right = right and torch.allclose(result.logits[rows, : best.shape[1]], best, atol=1e-2)
    else:
        right = right and bool((result.idxs[rows] == wanted[1]).any(dim=1).all())
    if not right:
        raise RuntimeError(f"{name}: differs from the reference")


def output_bytes(name: str, rows: int, vocab: int, most: int, k: int) -> int:
    """Bytes of an op's results: children, and logits or choices."""
    ids = 16 * rows * most
    if name in ("fused", "sparse_pytorch"):
        return ids + 4 * rows * vocab
    return ids + rows * (k if name == "topk" else 1) * 24


def measure(rows: int, hidden: int, options: argparse.Namespace, rate: float) -> list[Record]:
    """Every arm at one size."""
    device, dtype, vocab = torch.device(options.device), DTYPES[options.dtype], options.vocab
    state, children = skewed_state(rows, vocab, options.nodes, options.most, device)
    a = torch.randn(rows, hidden, device=device).to(dtype)
    weight = (torch.randn(vocab, hidden, device=device) / hidden**0.5).to(dtype)
    most = state.trie.layer_max_branches[1]
    records = []
    for name, call in arms_of(a, weight, state, options).items():
        result = call()
        check(name, result, a, weight, state, options.topk)
        distinct = int(result[1].unique().numel()) - int((result[1] < 0).any())
        del result
        taken = timing.time_call(call, device)
        written = output_bytes(name, rows, vocab, most, options.topk)
        size = hidden * dtype.itemsize
        gathered = int(children.sum()) * size
        moved = (distinct + rows) * size + written
        floor = moved / rate * 1000
        records.append(
            Record(
                name,
                rows,
                vocab,
                hidden,
                most,
                round(float(children.float().mean()), 2),
                round(taken.graph, 5),
                round(taken.event, 5),
                round(gathered / 1e6, 3),
                round(moved / 1e6, 3),
                round((gathered + written) / taken.graph / 1e6, 1),
                round(floor, 5),
                round(taken.graph / floor, 2),
            )
        )
    return records


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--hiddens", type=int, nargs="+", default=HIDDENS)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--nodes", type=int, default=8192, help="inner nodes rows can stand at")
    parser.add_argument("--most", type=int, default=256, help="most children of a node")
    parser.add_argument("--topk", type=int, default=50)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--max-gib", type=float, default=24.0, help="of PyTorch's gather")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Check, measure, print, write."""
    options = parse(arguments)
    device = timing.device_of(options.device)
    rate = timing.rate_of(device, copy=True)
    print(f"{timing.describe(device)}, copy {rate / 1e9:.0f} GB/s, {options.dtype}")
    records: list[Record] = []
    for hidden in options.hiddens:
        for rows in options.rows:
            for record in measure(rows, hidden, options, rate):
                records.append(record)
                print(
                    f"{record.algorithm:<15} B={rows:<6} H={hidden:<5} {record.ms:>9.4f} ms "
                    f"{record.gb_per_s:>8.1f} GB/s  floor {record.floor_ms:.4f} ms "
                    f"({record.times_floor}x)"
                )
    columns = [field.name for field in fields(Record)]
    timing.write_csv(
        options.out / "bench_constrained_serving.csv", columns, [asdict(r) for r in records]
    )
    return records


if __name__ == "__main__":
    main()
