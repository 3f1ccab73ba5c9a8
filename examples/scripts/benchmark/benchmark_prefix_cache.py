"""What a returning user costs, with the prefix cache and without.

    python -m examples.scripts.benchmark.benchmark_prefix_cache
    python -m examples.scripts.benchmark.benchmark_prefix_cache --model qwen3-1.7b --device cuda

A model of random weights searches a random catalog. Every run takes fresh random users: their
first visit, and a second one after ``--new-items`` more items. Both visits are made with the
cache and without, in turn, so that a busy neighbour slows both; the answers are compared first.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from examples.scripts.benchmark.kernel_timing import write_csv
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceOptions
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import SearchEngine

# hidden size, layers, heads, key-value heads, head dimension, intermediate size
MODELS = {
    "demo": (128, 2, 4, 4, 32, 256),
    "small": (512, 8, 8, 4, 64, 1_024),
    "qwen3-0.6b": (1_024, 28, 16, 8, 128, 3_072),
    "qwen3-1.7b": (2_048, 28, 16, 8, 128, 6_144),
}
_TEXT_VOCAB = 1_024
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of traffic.

    Attributes:
        context: tokens of a second visit.
        batch: users in a batch.
        beam_width: W.
        new_items: items between the visits.
    """

    context: int
    batch: int
    beam_width: int
    new_items: int


def build(
    model: str, device: str, dtype: torch.dtype, levels: int, codebook_size: int, items: int
) -> tuple[Any, ItemTokens, CatalogTrie]:
    """A random model and a random catalog."""
    hidden, layers, heads, kv_heads, head_dim, intermediate = MODELS[model]
    tokens = ItemTokens(_TEXT_VOCAB, codebook_size, levels, codebook_size, start_token_id=1)
    config = transformers.Qwen3Config(
        vocab_size=tokens.end,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    codes = torch.randint(codebook_size, (items, levels))
    trie, _ = CatalogTrie.from_codes(codes, codebook_size)
    return lm, tokens, trie.to(torch.device(device))


def visits(case: Case, tokens: ItemTokens, seed: int) -> list[list[SearchRequest]]:
    """First and second visit of fresh random users, a batch each."""
    generator = torch.Generator().manual_seed(seed)
    item = 1 + tokens.num_levels
    items = -(-case.context // item)
    batches: list[list[SearchRequest]] = [[], []]
    for _ in range(case.batch):
        codes = torch.randint(tokens.codebook_size, (items, tokens.num_levels), generator=generator)
        ids = [t for row in codes.tolist() for t in (tokens.start_token_id, *tokens.encode(row))]
        history = [*ids[len(ids) - case.context + 1 :], tokens.start_token_id]
        first = case.context - case.new_items * item
        for batch, length in zip(batches, (first, case.context), strict=True):
            prompt = (*history[: length - 1], tokens.start_token_id)
            batch.append(SearchRequest(prompt, case.beam_width, case.beam_width))
    return batches


def run(
    engine: SearchEngine, batch: list[SearchRequest], trie: CatalogTrie
) -> tuple[float, float, int]:
    """Seconds in all, seconds of the prompts, and cached tokens of one batch."""
    started = time.perf_counter()
    outcome = engine.search(batch, trie)
    return time.perf_counter() - started, outcome.prefill_s, sum(outcome.cached_tokens)


def largest_difference(
    kept: SearchEngine, fresh: SearchEngine, case: Case, tokens: ItemTokens, trie: Any
) -> float:
    """Of the best scores of second visits, with the cache and without."""
    first, second = visits(case, tokens, seed=1 << 20)
    kept.search(first, trie)
    worst = 0.0
    results = (engine.search(second, trie).results for engine in (kept, fresh))
    for mine, theirs in zip(*results, strict=True):
        if not isinstance(mine, SearchResult) or not isinstance(theirs, SearchResult):
            raise RuntimeError(f"the engine failed: {mine}, {theirs}")
        for one, other in zip(mine.hits[:10], theirs.hits[:10], strict=True):
            worst = max(worst, abs(one.score - other.score))
    return worst


def measure(
    kept: SearchEngine,
    fresh: SearchEngine,
    case: Case,
    tokens: ItemTokens,
    trie: CatalogTrie,
    repeats: int,
) -> dict[str, float]:
    """Medians, in milliseconds."""
    names = ("off_ms", "first_ms", "returning_ms")
    total: dict[str, list[float]] = {name: [] for name in names}
    prefill: dict[str, list[float]] = {name: [] for name in names}
    hits = 0
    for turn in range(repeats + 1):
        first, second = visits(case, tokens, seed=turn)
        for name, engine, batch in (
            ("off_ms", fresh, second),
            ("first_ms", kept, first),
            ("returning_ms", kept, second),
        ):
            seconds, prefill_s, cached = run(engine, batch, trie)
            if turn:
                total[name].append(1e3 * seconds)
                prefill[name].append(1e3 * prefill_s)
            if name == "returning_ms":
                hits = cached
    if hits == 0:
        raise RuntimeError("nothing was cached; give more memory or longer contexts")
    row = {name: statistics.median(values) for name, values in total.items()}
    row |= {f"prefill_{name}": statistics.median(values) for name, values in prefill.items()}
    return row | {"cached_tokens": hits / case.batch}


def report(rows: list[dict[str, float]], caption: str) -> Table:
    """The figures."""
    table = Table(title="returning users", caption=caption)
    for column in ("context", "batch", "cached", "off, ms", "first visit, ms", "returning, ms"):
        table.add_column(column, justify="right")
    table.add_column("gain", justify="right")
    table.add_column("prompts only", justify="right")
    for row in rows:
        table.add_row(
            f"{row['context']:.0f}",
            f"{row['batch']:.0f}",
            f"{row['cached_tokens']:.0f}",
            *(f"{row[name]:.2f}" for name in ("off_ms", "first_ms", "returning_ms")),
            f"{row['off_ms'] / row['returning_ms']:.1f} x",
            f"{row['prefill_off_ms'] / row['prefill_returning_ms']:.1f} x",
        )
    return table


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "",
    contexts: Annotated[str, typer.Option(help="Tokens of a second visit.")] = "200,1000",
    batches: Annotated[str, typer.Option(help="Users in a batch.")] = "1,4",
    beam_width: Annotated[int, typer.Option(min=1, help="Beams, and items wanted.")] = 50,
    new_items: Annotated[int, typer.Option(min=1, help="Items between the visits.")] = 5,
    levels: Annotated[int, typer.Option(min=1, help="Codes of an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 256,
    items: Annotated[int, typer.Option(min=1, help="Items of the catalog.")] = 20_000,
    memory_mib: Annotated[int, typer.Option(min=1, help="Of the cache.")] = 1_024,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 2,
    out: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Compare answers, then time."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    torch.set_num_threads(threads)
    console = Console(width=120)
    kind = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    lm, tokens, trie = build(model, device, kind, levels, codebook_size, items)
    counts = sorted(map(int, batches.split(",")))
    captured = None  # on a GPU the shapes that are timed
    if device != "cpu":
        captured = DeviceOptions(Buckets(tuple(counts), (beam_width,), counts[-1] * beam_width))
    kept, fresh = (
        build_engine(lm, tokens, PoolOptions(memory_mib << 20, keep=keep), captured)
        for keep in (True, False)
    )
    rows = []
    for context in map(int, contexts.split(",")):
        for batch in counts:
            case = Case(context, batch, beam_width, new_items)
            gap = largest_difference(kept, fresh, case, tokens, trie)
            if not gap <= _TOLERANCE[kind]:
                console.print(f"{case}: scores differ by {gap:.2g}, so nothing is timed")
                raise typer.Exit(1)
            figures = measure(kept, fresh, case, tokens, trie, repeats)
            rows.append({"context": context, "batch": batch, **figures, "score_gap": gap})
    where = torch.cuda.get_device_name() if device != "cpu" else f"{threads} CPU threads"
    caption = (
        f"{model} of random weights in {str(kind).removeprefix('torch.')}, {where}; beam "
        f"{beam_width}, {levels} x {codebook_size} codes, {items:,} items, {new_items} new items; "
        f"medians of {repeats} runs in turn, fresh users each; torch {torch.__version__}"
    )
    console.print(report(rows, caption))
    if out is not None:
        write_csv(out, list(rows[0]), rows)


if __name__ == "__main__":
    typer.run(main)
