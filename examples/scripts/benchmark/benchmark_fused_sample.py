"""Fused sampling and top-k beside compiled PyTorch, every row at the root of a flat trie.

``python -m examples.scripts.benchmark.benchmark_fused_sample``

Arms: ``fused_sample`` and ``fused_topk``, the ops; ``sparse_pytorch_sample``, compiled sparse
linear, softmax and multinomial; ``sparse_pytorch_topk``, compiled sparse linear and ``torch.topk``.
Draws must be children, top-k values those of the reference, before anything is timed. ``ms_`` is
graph replay; in the table of details ``event_ms_`` is the time between events, ``floor_ms_product``
what gathering and multiplying the children's weights once takes in the same run, and
``times_floor_`` how many times that an op takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from examples.scripts.benchmark.benchmark_vtnk import BATCHES, DTYPES, HIDDEN, VOCABS, root_state
from rectokens.decoding.vntk import sparse_linear_pytorch
from rectokens.ops.constrained_node_transition import (
    fused_linear_constrained_node_transition_sampling,
    fused_linear_constrained_node_transition_topk,
)
from rectokens.schemas.state import ConstraintState

ALGORITHMS = ("fused_sample", "sparse_pytorch_sample", "fused_topk", "sparse_pytorch_topk")
FUSED = ("fused_sample", "fused_topk")
PAIRS = {
    "speedup_fused_vs_sparse_pytorch_sample": ("sparse_pytorch_sample", "fused_sample"),
    "speedup_fused_topk_vs_sparse_pytorch_topk": ("sparse_pytorch_topk", "fused_topk"),
}


def arms_of(
    a: Tensor, weight: Tensor, state: ConstraintState, k: int, wanted: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """Calls: sampling arms return tokens (B,), top-k arms logits (B, k)."""
    device, trie, node = a.device, state.trie, state.cur_node
    seed = torch.zeros((), dtype=torch.long, device=device)
    heat = torch.ones(1, device=device)

    def draw(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
        logits = sparse_linear_pytorch(x, w, n, trie, 0)[2]
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1)

    def best(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
        return sparse_linear_pytorch(x, w, n, trie, 0)[2].topk(k, dim=-1).values

    arms: dict[str, Callable[[], Any]] = {}
    if "fused_sample" in wanted:
        arms["fused_sample"] = lambda: fused_linear_constrained_node_transition_sampling(
            a, weight.T, state, rng_seed=seed, temperature=heat
        )[2]
    if "sparse_pytorch_sample" in wanted:
        drawn = timing.compiled(draw, device)
        arms["sparse_pytorch_sample"] = lambda: drawn(a, weight, node)
    if "fused_topk" in wanted:
        arms["fused_topk"] = lambda: fused_linear_constrained_node_transition_topk(
            a, weight.T, state, k
        )[2]
    if "sparse_pytorch_topk" in wanted:
        ranked = timing.compiled(best, device)
        arms["sparse_pytorch_topk"] = lambda: ranked(a, weight, node)
    return arms


def check(name: str, result: Tensor, expected: Tensor, allowed: int) -> None:
    """Draws must be children; values those of a top-k over the reference's logits.

    Raises:
        RuntimeError: they are not.
    """
    if name.endswith("sample"):
        if not bool(((result >= 0) & (result < allowed)).all()):
            raise RuntimeError(f"{name}: drew a token that is no child")
    elif not torch.allclose(result, expected, atol=1e-2):
        raise RuntimeError(f"{name}: logits differ from the reference")


def measure(rows: int, vocab: int, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    state, allowed = root_state(rows, vocab, options.sparsity, device)
    k = min(options.topk, allowed)
    a = torch.randn(rows, options.hidden, device=device).to(dtype)
    weight = (torch.randn(vocab, options.hidden, device=device) / options.hidden**0.5).to(dtype)
    expected = (a.float() @ weight[:allowed].float().T).topk(k, dim=-1).values
    line: dict[str, Any] = {"B": rows, "N": vocab}
    for name, call in arms_of(a, weight, state, k, options.algorithms).items():
        check(name, call(), expected, allowed)
        taken = timing.time_call(call, device)
        line[f"ms_{name}"] = round(taken.graph, 5)
        line[f"event_ms_{name}"] = round(taken.event, 5)
    for column, (slow, fast) in PAIRS.items():
        line[column] = timing.ratio(line.get(f"ms_{slow}"), line.get(f"ms_{fast}"))
    line["k"] = k
    line |= timing.floors(a, weight, torch.arange(allowed, device=device), None, device)
    for name in FUSED:
        line[f"times_floor_{name}"] = timing.ratio(line.get(f"ms_{name}"), line["floor_ms_product"])
    return line


def columns_of(algorithms: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns of the table, and those that its details add: event times, floors, k."""
    floors = ["floor_ms_product", "floor_ms_product_bf16"]
    details = [*(f"event_ms_{name}" for name in algorithms), "k", *floors]
    details += [f"times_floor_{name}" for name in FUSED]
    return ["B", "N", *(f"ms_{name}" for name in algorithms), *PAIRS], details


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--sparsity", type=float, default=0.01, help="share of N that is allowed")
    parser.add_argument("--topk", type=int, default=50, help="k, capped at the children")
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
    print(f"{timing.describe(device)}, H={options.hidden}, top-{options.topk}")
    lines = []
    for rows in options.batches:
        for vocab in options.vocabs:
            lines.append(measure(rows, vocab, options))
            print("  ".join(f"{name}={value}" for name, value in lines[-1].items()))
    columns, details = columns_of(options.algorithms)
    timing.write_tables(options.out, "bench_fused_sample", columns, details, lines)
    timing.heatmaps(options.out / "bench_fused_sample.png", lines, "N", "B", list(PAIRS))
    return lines


if __name__ == "__main__":
    main()
