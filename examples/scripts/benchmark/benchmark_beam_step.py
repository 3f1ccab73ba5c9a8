"""The beam step on static buffers: constraint, filters, normalization, and the exact best W.

``python -m examples.scripts.benchmark.benchmark_beam_step``

One row a level of a catalog, batch and beam width. ``ms`` is graph replay of the step alone: from
logits (bfloat16; of all codes of the level, or of the beams' children where the engine gathers
those) to the beams of the next level, the model's part not included. ``options`` is ``plain``, or
``mixed``: a shared constraint set and 1,000 exclusions each, every second request with a
temperature. ``ms_pytorch``, between events, is the same step by the definition in plain PyTorch on
the same device, which waits for the host; the beams of both are compared first. ``ends`` in place
of a level is the start and the end of the search: filters prepared, items found, answers packed.
``pairs`` are (beam, child) pairs of the batch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from rectokens.decoding import device_search_reference as plain_pytorch
from rectokens.decoding.device_beams import BeamBuffers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import StepShapes, TrieTable
from rectokens.ops.beam_step import beam_step_, begin_search_, child_logits, finish_search_
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest

COLUMNS = ("catalog", "options", "B", "W", "level", "logits", "pairs", "ms", "ms_pytorch")
SHAPES = ((1, 50), (1, 256), (8, 50), (8, 256), (32, 50), (32, 256), (1, 5000))
HIDDEN = 64
EXCLUDED = 1000


@dataclass
class Bench:
    """A search of random logits, everything static."""

    table: TrieTable
    buffers: BeamBuffers
    requests: RequestTables
    hidden: list[Tensor]
    weight: Tensor

    def logits(self, depth: int) -> tuple[Tensor, Tensor | None]:
        """What the engine would hand to a step, and the level's norms where children are given."""
        if depth > 0 and self.buffers.shapes.levels[depth].gathers:
            dense = (self.hidden[depth] @ self.weight.T).float().logsumexp(-1)
            return child_logits(
                self.table, self.buffers, depth, self.hidden[depth], self.weight
            ), dense
        return self.hidden[depth] @ self.weight.T, None

    def step(self, depth: int, logits: Tensor, norm: Tensor | None) -> None:
        """One level; the search must have begun."""
        beam_step_(self.table, self.buffers, self.requests, depth, logits,
                   compact=norm is not None, level_log_norm=norm)  # fmt: skip

    def begin(self) -> None:
        """Start the search over; the beams of earlier levels stay."""
        begin_search_(self.buffers, self.requests)

    def begin_and_step(self, depth: int, logits: Tensor, norm: Tensor | None) -> None:
        """What can be repeated: a step needs a search that has begun."""
        self.begin()
        self.step(depth, logits, norm)

    def ends(self) -> None:
        """A search without its levels."""
        self.begin()
        finish_search_(self.table, self.buffers, self.requests)


def catalog_of(kind: str, items: int, levels: int, codes: int, device: torch.device) -> CatalogTrie:
    """Random semantic IDs; ``skewed``: the first codes of the first level have many more items."""
    g = torch.Generator(device=device).manual_seed(0)
    ids = torch.randint(codes, (items, levels), generator=g, device=device)
    if kind == "skewed":
        share = torch.rand(items, generator=g, device=device)
        ids[:, 0] = (share.square() * codes).long()
    return CatalogTrie.from_codes(ids, codes)[0]


def bench_of(trie: CatalogTrie, batch: int, width: int, mixed: bool) -> Bench:
    """Buffers, requests and inputs."""
    device, g = trie.device, torch.Generator().manual_seed(width + batch)
    shapes = StepShapes.of(trie, width)
    excluded = min(EXCLUDED, trie.num_items // 4)
    requests = RequestTables(batch, batch * excluded, device)
    prefix = None
    if mixed:
        kept = torch.rand(trie.num_items, generator=g) < 0.5
        prefix = torch.cat([torch.zeros(1, dtype=torch.int32), kept.cumsum(0).int()]).to(device)
    asked = [
        SearchRequest(
            (0,), width, 1, temperature=float(mixed and row % 2 == 0), seed=row,
            excluded_items=torch.randperm(trie.num_items, generator=g)[:excluded].sort().values
            if mixed else None,
            allowed_prefix=prefix,
        )
        for row in range(batch)
    ]  # fmt: skip
    requests.load(asked, trie.num_items)
    scale = 2 / math.sqrt(HIDDEN)
    weight = (torch.randn(trie.codebook_size, HIDDEN, generator=g) * scale).bfloat16().to(device)
    hidden = [
        torch.randn(batch, 1 if depth == 0 else width, HIDDEN, generator=g).bfloat16().to(device)
        for depth in range(trie.num_levels)
    ]
    return Bench(TrieTable(trie, shapes), BeamBuffers(batch, shapes, device), requests, hidden,
                 weight)  # fmt: skip


def check(bench: Bench, depth: int, plain: Callable[[], None]) -> None:
    """The same beams by both, but for the order of nearly equal ones."""
    found = bench.buffers.at(depth + 1)
    plain()
    wanted = bench.buffers.at(depth + 1)
    ranking = [
        torch.where(bench.requests.temperature[:, None] > 0, beams.perturbed, beams.scores)
        for beams in (found, wanted)
    ]
    torch.testing.assert_close(*ranking, rtol=1e-5, atol=1e-4)


def measure(bench: Bench, reference: bool) -> Iterator[dict[str, Any]]:
    """A row a level, from the first on, and one of the ends."""
    device, buffers = bench.buffers.device, bench.buffers
    empty = timing.time_call(bench.begin, device).graph
    for depth in range(buffers.shapes.num_levels):
        logits, norm = bench.logits(depth)
        call = partial(bench.begin_and_step, depth, logits, norm)
        call()
        taken = timing.time_call(call, device).graph - empty
        nodes = buffers.nodes[depth].long()
        row_ptrs = bench.table.trie.row_ptrs
        children = (row_ptrs[nodes + 1] - row_ptrs[nodes]) * buffers.scores[depth].isfinite()
        row = {"level": depth, "logits": "all" if norm is None else "children",
               "pairs": int(children.sum()), "ms": round(taken, 5)}  # fmt: skip
        if reference:
            plain = partial(plain_pytorch.step, bench.table, buffers, bench.requests, depth,
                            logits, norm is not None, None, norm)  # fmt: skip
            call()
            check(bench, depth, plain)
            row["ms_pytorch"] = round(timing.time_call(plain, device, graph=False).event, 3)
            call()
        yield row
    bench.ends()
    taken = timing.time_call(bench.ends, device).graph
    yield {"level": "ends", "ms": round(taken, 5)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_500_000)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--catalogs", nargs="+", default=["uniform", "skewed"],
                        choices=["uniform", "skewed"])  # fmt: skip
    parser.add_argument("--options", nargs="+", default=["plain", "mixed"],
                        choices=["plain", "mixed"])  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=[f"{b}x{w}" for b, w in SHAPES],
                        help="batch x beam width")  # fmt: skip
    parser.add_argument("--no-pytorch", action="store_true", help="leave the reference out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, measure, print, write."""
    options = parse(arguments)
    device = timing.device_of(options.device)
    print(f"{timing.describe(device)}, {options.items} items, {options.levels} x {options.codes}")
    lines = []
    for kind in options.catalogs:
        trie = catalog_of(kind, options.items, options.levels, options.codes, device)
        for asked in options.options:
            for shape in options.shapes:
                batch, width = map(int, shape.split("x"))
                bench = bench_of(trie, batch, width, asked == "mixed")
                for row in measure(bench, not options.no_pytorch):
                    lines.append({"catalog": kind, "options": asked, "B": batch, "W": width, **row})
                    print("  ".join(str(lines[-1].get(name, "")) for name in COLUMNS), flush=True)
    timing.write_csv(options.out / "beam_step.csv", COLUMNS, lines)
    return lines


if __name__ == "__main__":
    main()
