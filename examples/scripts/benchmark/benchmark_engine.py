"""Latency of the engine: context by batch, where the time goes, memory by beam width.

    python -m examples.scripts.benchmark.benchmark_engine
    python -m examples.scripts.benchmark.benchmark_engine --model qwen3-0.6b --beam-width 5000 \\
        --contexts 1000 --batches 1 --no-baselines

A model of random weights searches a random catalog of 3 levels of 8,192 codes. Every timed batch
is of fresh random users, so that nothing of it is cached; what a returning user gains is in
``benchmark_prefix_cache``. Answers are checked first: against Hugging Face ``generate`` with
``prefix_allowed_tokens_fn`` on the same model, and alone against in a batch. ``constraint_ms`` is
the constraint, the filters and the selection of all levels, from logits to beams, replayed by
themselves. ``floor_ms`` is the arithmetic of the model at ``--tflops`` and nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.scripts.benchmark import kernel_timing as timing
from examples.scripts.benchmark.benchmark_beam_step import bench_of
from examples.scripts.benchmark.benchmark_prefix_cache import MODELS, build
from rectokens.decoding.constrained_decoding import autoregressive_generate
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import Normalization, SearchRequest, SearchResult
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceOptions
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import BatchOutcome, SearchEngine
from server.heap import pass_over_imports

COLUMNS = ("context", "batch", "beam", "levels", "median_ms", "p90_ms", "prefill_ms", "decode_ms",
           "constraint_ms", "peak_mb", "floor_ms", "model")  # fmt: skip
_BASELINE_BEAM = 50
_SCORE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    Attributes:
        name: of the model's configuration.
        lm: the model.
        tokens: where the item tokens lie in its vocabulary.
        trie: the catalog.
        engine: searches the catalog with the model.
    """

    name: str
    lm: Any
    tokens: ItemTokens
    trie: CatalogTrie
    engine: SearchEngine

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.trie.device


def users(
    subject: Subject, context: int, batch: int, beam: int, seed: int, rule: Normalization
) -> list[SearchRequest]:
    """Requests of random users: items end to end, the last token the one that starts an item."""
    tokens = subject.tokens
    rng = np.random.default_rng(seed)
    items = -(-context // (1 + tokens.num_levels))
    requests = []
    for _ in range(batch):
        codes = rng.integers(tokens.codebook_size, size=(items, tokens.num_levels))
        ids = [t for row in codes.tolist() for t in (tokens.start_token_id, *tokens.encode(row))]
        prompt = (*ids[: context - 1], tokens.start_token_id)
        requests.append(SearchRequest(prompt, beam, beam, normalization=rule))
    return requests


def answers(outcome: BatchOutcome, beam: int) -> list[SearchResult]:
    """The results, all there.

    Raises:
        RuntimeError: a request failed, or got fewer items than it wanted, or one twice.
    """
    found = []
    for result in outcome.results:
        if not isinstance(result, SearchResult):
            raise RuntimeError(f"the engine failed: {result.message}")
        if len({hit.item_index for hit in result.hits}) != beam:
            raise RuntimeError(f"{len(result.hits)} items, some repeated; wanted {beam}")
        found.append(result)
    return found


def overlap(one: SearchResult, other: SearchResult) -> float:
    """Share of the items of one that the other has too."""
    mine, theirs = ({hit.item_index for hit in result.hits} for result in (one, other))
    return len(mine & theirs) / len(mine)


def constraint_ms(subject: Subject, batch: int, beam: int) -> float:
    """Milliseconds of all that happens between logits and beams in one search."""
    bench = bench_of(subject.trie, batch, beam, mixed=False)
    steps = []
    bench.begin()
    for depth in range(subject.trie.num_levels):
        steps.append((depth, *bench.logits(depth)))
        bench.step(*steps[-1])

    def search() -> None:
        bench.ends()
        for depth, logits, norm in steps:
            bench.step(depth, logits, norm)

    search()
    return timing.time_call(search, subject.device).graph


def floor_ms(subject: Subject, context: int, batch: int, beam: int, tflops: float) -> float:
    """Milliseconds that the multiplications of a search take at best."""
    config = subject.lm.config
    heads, dim, layers = config.num_attention_heads, config.head_dim, config.num_hidden_layers
    weights = sum(p.numel() for p in subject.lm.get_decoder().layers.parameters())
    rows = batch * (context + (subject.trie.num_levels - 1) * beam)
    pairs = batch * (context**2 / 2 + (subject.trie.num_levels - 1) * beam * context)
    head = batch * (1 + (subject.trie.num_levels - 2) * beam) * config.hidden_size
    flops = 2 * rows * weights + 4 * pairs * heads * dim * layers
    flops += 2 * head * subject.tokens.codebook_size
    return flops / tflops / 1e9


def measure(
    subject: Subject,
    context: int,
    batch: int,
    beam: int,
    repeats: int,
    tflops: float,
    rest_s: float,
) -> dict[str, Any]:
    """A row of the table; the device rests for so long before each batch."""
    times: list[float] = []
    prefill: list[float] = []
    decode: list[float] = []
    is_cuda = subject.device.type == "cuda"
    for turn in range(repeats + 2):
        requests = users(subject, context, batch, beam, turn, "children")
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        time.sleep(rest_s)
        started = time.perf_counter()
        outcome = subject.engine.search(requests, subject.trie)
        taken = time.perf_counter() - started
        answers(outcome, beam)
        if turn > 1:
            times.append(1e3 * taken)
            prefill.append(1e3 * outcome.prefill_s)
            decode.append(1e3 * outcome.decode_s)
    peak = torch.cuda.max_memory_allocated() / 1e6 if is_cuda else float("nan")
    values = (
        context, batch, beam, subject.trie.num_levels, statistics.median(times),
        float(np.quantile(times, 0.9)), statistics.median(prefill), statistics.median(decode),
        constraint_ms(subject, batch, beam), peak, floor_ms(subject, context, batch, beam, tflops),
        subject.name,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


class AllowedTokens:
    """A ``prefix_allowed_tokens_fn`` over the catalog; what it has answered it remembers."""

    def __init__(self, trie: CatalogTrie, tokens: ItemTokens, prompt_length: int) -> None:
        self._row_ptrs = trie.row_ptrs.cpu().numpy()
        self._codes = trie.codes.cpu().numpy().view(np.uint16)
        self._tokens = tokens
        self._length = prompt_length
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, _: int, sequence: Tensor) -> list[int]:
        """Token ids that may follow a sequence."""
        prefix = tuple(sequence[self._length :].tolist())
        found = self._known.get(prefix)
        if found is None:
            node = 0
            for level, token in enumerate(prefix):
                first, last = self._row_ptrs[node : node + 2]
                code = token - self._tokens.token_id(level, 0)
                node = int(first + np.searchsorted(self._codes[first:last], code)) + 1
            first, last = self._row_ptrs[node : node + 2]
            start = self._tokens.token_id(len(prefix), 0)
            found = (self._codes[first:last].astype(np.int64) + start).tolist()
            self._known[prefix] = found
        return found


@torch.inference_mode()
def by_generate(
    subject: Subject, request: SearchRequest
) -> tuple[dict[tuple[int, ...], float], float]:
    """Semantic IDs with scores, and seconds, of Hugging Face beam search."""
    ids = torch.tensor([request.prompt], device=subject.device)
    trie, length = subject.trie, ids.shape[1]
    started = time.perf_counter()
    output = subject.lm.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=request.beam_width,
        num_return_sequences=request.beam_width,
        max_new_tokens=trie.num_levels,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        prefix_allowed_tokens_fn=AllowedTokens(trie, subject.tokens, length),
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    sequences = output.sequences[:, length:].tolist()
    scores = output.sequences_scores.tolist()
    taken = time.perf_counter() - started
    found = {subject.tokens.decode(ids): s for ids, s in zip(sequences, scores, strict=True)}
    return found, taken


def by_library(subject: Subject, trie: CompactCSRTrie, request: SearchRequest) -> float:
    """Seconds of the library's ``autoregressive_generate``."""
    ids = torch.tensor([request.prompt], device=subject.device)
    width = request.beam_width
    config = GenerationConfig(subject.trie.num_levels, width, width, temperature=0.0)
    started = time.perf_counter()
    autoregressive_generate(subject.lm, trie, ids, config).tolist()
    return time.perf_counter() - started


def library_trie(subject: Subject) -> CompactCSRTrie:
    """The catalog over the model's token ids."""
    trie, tokens = subject.trie, subject.tokens
    leaves = trie.leaf_codes(torch.arange(trie.num_leaves, device=trie.device))
    starts = torch.tensor([tokens.token_id(level, 0) for level in range(trie.num_levels)])
    ids = leaves + starts.to(leaves.device)
    return CompactCSRTrie.from_sorted_batch(ids, tokens.end, dense_lookup_layers=1)


def compare(subject: Subject, context: int, repeats: int, console: Console) -> None:
    """The engine beside ``generate`` and the library's loop; the answers first.

    Raises:
        RuntimeError: the scores differ by more than rounding explains.
    """
    beam = min(_BASELINE_BEAM, subject.trie.num_items)
    kind: dict[str, list[float]] = {"engine": [], "HF generate": [], "autoregressive_generate": []}
    library = library_trie(subject)
    gap, shared = 0.0, []
    for turn in range(repeats + 1):
        (request,) = users(subject, context, 1, beam, 7_000 + turn, "vocab")
        theirs, seconds = by_generate(subject, request)
        started = time.perf_counter()
        (mine,) = answers(subject.engine.search([request], subject.trie), beam)
        taken = time.perf_counter() - started
        ours = {hit.semantic_id: hit.score for hit in mine.hits}
        common = ours.keys() & theirs.keys()
        shared.append(len(common) / len(ours))
        gap = max(gap, *(abs(ours[key] - theirs[key]) for key in common), 0.0)
        loop = by_library(subject, library, request)
        if turn:
            for name, value in zip(kind, (taken, seconds, loop), strict=True):
                kind[name].append(1e3 * value)
    if gap > _SCORE_TOLERANCE[subject.lm.dtype] or not shared:
        raise RuntimeError(f"scores of the engine and of generate differ by {gap:.3g}")
    own = statistics.median(kind["engine"])
    figures = ", ".join(
        f"{name} {statistics.median(v):.1f} ms ({statistics.median(v) / own:.0f} x)"
        for name, v in kind.items()
    )
    console.print(
        f"context {context}, batch 1, beam {beam}, normalization vocab: {figures}; "
        f"{statistics.mean(shared):.1%} of the items shared with generate, "
        f"scores of those within {gap:.2g}"
    )


def batch_overlap(subject: Subject, context: int, batch: int, beam: int) -> float:
    """Share of its items that a request keeps when it is in a batch."""
    requests = users(subject, context, batch, beam, 9_000, "children")
    together = answers(subject.engine.search(requests, subject.trie), beam)
    # Cached pages would make it the same computation; another engine state, other rows.
    alone = [
        answers(subject.engine.search([request], subject.trie), beam)[0] for request in requests[:2]
    ]
    return statistics.mean(map(overlap, alone, together))


def fp8_overlap(
    subject: Subject, other: Subject, contexts: list[int], beam: int
) -> Iterator[tuple[int, float, float, float]]:
    """How near FP8 comes: context, share of the 10 best and of all items, gap of scores."""
    for context in contexts:
        requests = users(subject, context, 8, beam, 13_000, "children")
        pairs = [
            (answers(one.engine.search([request], one.trie), beam)[0] for one in (subject, other))
            for request in requests
        ]
        best, shares, gaps = [], [], []
        for plain, rounded in pairs:
            mine = {hit.item_index: hit.score for hit in plain.hits}
            theirs = {hit.item_index: hit.score for hit in rounded.hits}
            gaps += [abs(mine[item] - theirs[item]) for item in mine.keys() & theirs.keys()]
            shares.append(overlap(plain, rounded))
            best.append(overlap(SearchResult(plain.hits[:10]), SearchResult(rounded.hits[:10])))
        gap = statistics.median(gaps) if gaps else float("nan")
        yield context, statistics.mean(best), statistics.mean(shares), gap


def beam_memory(subject: Subject, contexts: list[int], beams: list[int]) -> list[dict[str, float]]:
    """Megabytes that one search takes beyond weights, pages and captured searches."""
    rows = []
    for context in contexts:
        for beam in beams:
            requests = users(subject, context, 1, beam, 11_000, "children")
            subject.engine.search(requests, subject.trie)  # the second time its prompt is cached
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            answers(subject.engine.search(requests, subject.trie), beam)
            used = (torch.cuda.max_memory_allocated() - before) / 1e6
            rows.append({"context": context, "beam": beam, "mb": used})
    return rows


def report(rows: list[dict[str, Any]], caption: str) -> Table:
    """The figures."""
    table = Table(title="latency of a batch", caption=caption)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_text(row[column]) for column in COLUMNS))
    return table


def _text(value: float | str) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "qwen3-1.7b",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "1000,5000",
    batches: Annotated[str, typer.Option(help="Users in a batch.")] = "1,8",
    beam_width: Annotated[int, typer.Option(min=1, help="Beams, and items wanted.")] = 256,
    levels: Annotated[int, typer.Option(min=2, help="Codes of an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 8_192,
    items: Annotated[int, typer.Option(min=1, help="Items of the catalog.")] = 1_500_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed batches of each shape.")] = 20,
    rest_ms: Annotated[int, typer.Option(min=0, help="Of the device, before each.")] = 0,
    memory_mib: Annotated[int, typer.Option(min=1, help="For context KV.")] = 8_192,
    baselines: Annotated[bool, typer.Option(help="Also time what others offer.")] = True,
    fp8: Annotated[bool, typer.Option(help="Also time the layers in FP8.")] = False,
    widths: Annotated[str, typer.Option(help="Beam widths whose memory is measured.")] = "",
    tflops: Annotated[float, typer.Option(min=1, help="Of the card, for the floor.")] = 790.0,
    out: Annotated[Path | None, typer.Option(help="CSV to write or to append to.")] = None,
) -> None:
    """Check answers, then time."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    console = Console(width=160)
    pass_over_imports()  # as the service does
    kind = getattr(torch, dtype)
    lm, tokens, trie = build(model, device, kind, levels, codebook_size, items)
    sizes, counts = (sorted(map(int, text.split(","))) for text in (contexts, batches))
    buckets = Buckets(tuple(counts), (beam_width,), max(counts) * beam_width)
    started = time.perf_counter()
    engine = build_engine(
        lm, tokens, PoolOptions(memory_bytes=memory_mib << 20), DeviceOptions(buckets)
    )
    subject = Subject(model, lm, tokens, trie, engine)
    engine.search(users(subject, sizes[0], 1, beam_width, 1, "children"), trie)
    console.print(f"ready in {time.perf_counter() - started:.1f} s: {type(engine).__name__}")
    subjects = [subject]
    if fp8:
        in_fp8 = DeviceOptions(buckets, fp8=True)
        rounded = build_engine(lm, tokens, PoolOptions(memory_bytes=memory_mib << 20), in_fp8)
        subjects.append(Subject(f"{model} fp8", lm, tokens, trie, rounded))
        for context, best, share, gap in fp8_overlap(*subjects, sizes, beam_width):
            console.print(
                f"FP8, context {context}: {best:.1%} of the 10 best items, {share:.1%} of "
                f"{beam_width}, as in {dtype}; scores {gap:.2g} apart"
            )
    rows = []
    for context in sizes:
        for batch in counts:
            for one in subjects:
                if batch > 1:
                    share = batch_overlap(one, context, batch, beam_width)
                    console.print(f"{context} x {batch}: {share:.1%} of the items as when alone")
                shape = context, batch, beam_width
                rows.append(measure(one, *shape, repeats, tflops, rest_ms / 1e3))
                console.print({k: _text(v) for k, v in rows[-1].items()})
    where = torch.cuda.get_device_name() if device != "cpu" else "a CPU"
    console.print(
        report(
            rows,
            f"{model} of random weights in {dtype}, {where}; beam {beam_width}, {levels} x "
            f"{codebook_size} codes, {trie.num_items:,} items; {repeats} batches of fresh users; "
            f"floor at {tflops:.0f} TFLOP/s; torch {torch.__version__}",
        )
    )
    if out is not None:
        rounded = [
            {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        ]
        timing.write_csv(out, COLUMNS, rounded, append=True)
    if widths and device != "cpu":
        for row in beam_memory(subject, sizes, sorted(map(int, widths.split(",")))):
            console.print("memory of a search:", {k: round(v, 1) for k, v in row.items()})
    if baselines:
        compare(subject, sizes[0], min(repeats, 3), console)


if __name__ == "__main__":
    typer.run(main)
