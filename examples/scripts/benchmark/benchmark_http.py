"""Latency and throughput through HTTP on a GPU, beside the engine alone.

    python -m examples.scripts.benchmark.benchmark_http
    python -m examples.scripts.benchmark.benchmark_http --contexts 5000 --clients 4,8

Starts the server on a loopback port as a process of its own, with a release of random weights in
the configuration of a real model, and loads the same release in this process: the engine alone, on
the same GPU, in turns with the server. Answers are compared first. Then for every context:

- the engine alone: one request at a time, and full batches one after the other;
- so many clients, each sending its next request when it is answered (closed loop);
- three times the load that was carried, with a deadline (open loop), at the first context.

Every request has a fresh random history, so that nothing of a prompt is cached.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from examples.scripts.benchmark.benchmark_prefix_cache import MODELS
from examples.scripts.benchmark.benchmark_service import (
    PATH,
    Histories,
    WrongAnswerError,
    overload_figures,
    query_of,
)
from examples.scripts.benchmark.http_load import (
    Connections,
    Reply,
    closed_loop,
    open_loop,
    percentile,
)
from examples.scripts.benchmark.kernel_timing import write_csv
from examples.scripts.benchmark.random_release import ReleaseShape, write_random_release
from rectokens.schemas.search import SearchRequest, SearchResult
from server.demo.running import RunningServer, running_server
from server.heap import pass_over_loaded
from server.recommender import prepare, present
from server.release import Release, load_release
from server.settings import Settings, load_settings

_DECODER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size")  # fmt: skip
COLUMNS = ("context", "beam", "clients", "requests_per_s", "median_ms", "p90_ms", "p99_ms",
           "queue_ms", "engine_ms", "added_ms", "alone_ms", "alone_per_s")  # fmt: skip
# In 16 bits scores closer than rounding change places with the shape of a batch.
_SCORE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
_SHARED = {"float32": 1.0, "bfloat16": 0.8, "float16": 0.9}
_CHECKED = 4
_TIMEOUT_MS = 60_000


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    Attributes:
        release: loaded in this process.
        settings: the server's.
        dtype: of the weights, by name.
        beam_width: W of every request.
        top_k: items of an answer.
    """

    release: Release
    settings: Settings
    dtype: str
    beam_width: int
    top_k: int

    def bodies(self, items: int, count: int, timeout_ms: int, seed: int) -> list[bytes]:
        """Requests with fresh histories of so many items."""
        histories = Histories(self.release, items, self.beam_width, seed)
        bodies = ({**histories.body(timeout_ms), "top_k": self.top_k} for _ in range(count))
        return [orjson.dumps(body) for body in bodies]

    def search_of(self, body: bytes) -> SearchRequest:
        """What the service makes of a request."""
        return prepare(query_of(orjson.loads(body), self.settings), self.release).search

    def alone(self, bodies: list[bytes]) -> float:
        """Seconds of the engine for a batch whose prompts are ready."""
        searches = [self.search_of(body) for body in bodies]
        started = time.perf_counter()
        outcome = self.release.engine.search(searches, self.release.trie)
        taken = time.perf_counter() - started
        for result in outcome.results:
            if not isinstance(result, SearchResult):
                raise WrongAnswerError(result.message)
        return taken

    def full_batch(self, context: int) -> int:
        """Requests of a batch that is full by the server's budgets."""
        limits = self.settings.batching
        most = (limits.max_prompt_tokens // context, limits.max_beam_rows // self.beam_width)
        return max(1, min(limits.max_requests, *most))


def check(subject: Subject, bodies: list[bytes], replies: list[Reply]) -> float:
    """Compare answers with the engine's own; the share of items in both.

    Raises:
        WrongAnswerError: too few items in common, or other scores.
    """
    shares = []
    for body, reply in zip(bodies, replies, strict=True):
        if reply.status != 200:
            raise WrongAnswerError(f"status {reply.status}: {reply.body[:500].decode()}")
        query = query_of(orjson.loads(body), subject.settings)
        release = subject.release
        (result,) = release.engine.search([subject.search_of(body)], release.trie).results
        if not isinstance(result, SearchResult):
            raise WrongAnswerError(result.message)
        mine = {item.item_id: item.score for item in present(result, query, release.catalog)}
        theirs = {one["item_id"]: one["score"] for one in orjson.loads(reply.body)["items"]}
        common = mine.keys() & theirs.keys()
        gap = max((abs(mine[one] - theirs[one]) for one in common), default=0.0)
        if gap > _SCORE_TOLERANCE[subject.dtype]:
            raise WrongAnswerError(f"scores differ by {gap:.3g}")
        if len(mine) != len(theirs) or not mine:
            raise WrongAnswerError(f"{len(theirs)} items through HTTP, {len(mine)} without")
        shares.append(len(common) / len(mine))
    share = statistics.mean(shares)
    if share < _SHARED[subject.dtype]:
        raise WrongAnswerError(f"{share:.0%} of the items are the same")
    return share


async def ask(base_url: str, bodies: list[bytes]) -> list[Reply]:
    """Answers to requests, one after the other."""
    connections = Connections(base_url, PATH)
    replies = [await connections.post(body) for body in bodies]
    await connections.close()
    return replies


async def clients_loop(
    base_url: str, bodies: Iterator[bytes], clients: int, seconds: float
) -> tuple[list[Reply], float]:
    """Replies of so many clients and the seconds they took; a short run before is left out."""
    connections = Connections(base_url, PATH)
    await closed_loop(connections, bodies, clients, min(1.0, seconds / 2))
    started = time.monotonic()
    replies = await closed_loop(connections, bodies, clients, seconds)
    taken = time.monotonic() - started
    await connections.close()
    return replies, taken


def row_of(
    subject: Subject, context: int, clients: int, replies: list[Reply], taken: float
) -> dict[str, float]:
    """Figures of a closed loop.

    Raises:
        WrongAnswerError: a request was not answered.
    """
    bad = next((reply for reply in replies if reply.status != 200), None)
    if bad is not None:
        raise WrongAnswerError(f"status {bad.status}: {bad.body[:500].decode()}")
    waited = [1e3 * reply.seconds for reply in replies]
    timings = [orjson.loads(reply.body)["timings"] for reply in replies]
    queue = [one["queue_ms"] for one in timings]
    engine = [one["prefill_ms"] + one["decode_ms"] for one in timings]
    added = [w - q - e for w, q, e in zip(waited, queue, engine, strict=True)]
    return {
        "context": context,
        "beam": subject.beam_width,
        "clients": clients,
        "requests_per_s": len(replies) / taken,
        "median_ms": percentile(waited, 0.5),
        "p90_ms": percentile(waited, 0.9),
        "p99_ms": percentile(waited, 0.99),
        "queue_ms": percentile(queue, 0.5),
        "engine_ms": percentile(engine, 0.5),
        "added_ms": percentile(added, 0.5),
    }


def measure_context(
    subject: Subject,
    base_url: str,
    context: int,
    items: int,
    clients: list[int],
    seconds: float,
    report: Console,
) -> list[dict[str, float]]:
    """All rows of one context."""
    bodies = subject.bodies(items, 400, _TIMEOUT_MS, seed=context)
    endless = itertools.cycle(bodies)
    share = check(subject, bodies[:_CHECKED], asyncio.run(ask(base_url, bodies[:_CHECKED])))
    report.print(f"context {context}: {share:.1%} of the items through HTTP as without")
    full = subject.full_batch(context)

    def alone(size: int) -> float:
        times: list[float] = []
        while len(times) < 4 or (sum(times) < seconds / 2 and len(times) < 40):
            times.append(subject.alone([next(endless) for _ in range(size)]))
        return statistics.median(times[1:])

    single, batch = alone(1), alone(full)
    rows = []
    for count in (1, *clients):
        replies, taken = asyncio.run(clients_loop(base_url, endless, count, seconds))
        row = row_of(subject, context, count, replies, taken)
        # One client is compared with one request at a time, more with full batches.
        size, own = (1, single) if count == 1 else (full, batch)
        rows.append({**row, "alone_ms": 1e3 * own, "alone_per_s": size / own})
        report.print({name: round(value, 2) for name, value in rows[-1].items()})
    return rows


def overload(
    subject: Subject,
    running: RunningServer,
    items: int,
    rate: float,
    seconds: float,
    timeout_ms: int,
) -> dict[str, float]:
    """Figures of an open loop at so many requests a second."""
    bodies = itertools.cycle(subject.bodies(items, 600, timeout_ms, seed=99))
    server = psutil.Process(running.pid)
    on_gpu = subject.release.engine.device.type == "cuda"
    resident: list[tuple[float, int]] = []
    used: list[tuple[float, int]] = []

    def look(elapsed: float) -> None:
        resident.append((elapsed, server.memory_info().rss))
        if on_gpu:
            free, total = torch.cuda.mem_get_info(subject.release.engine.device)
            used.append((elapsed, total - free))

    async def run() -> Any:
        connections = Connections(running.base_url, PATH)
        await connections.open(256)
        load = await open_loop(
            connections, bodies, rate, seconds, max_open=1_024, seed=1, every=look
        )
        await connections.close()
        return load

    figures = overload_figures(asyncio.run(run()), resident, timeout_ms, seconds)
    for half, late in (("first", False), ("second", True)):
        sizes = [size for at, size in used if (at > seconds / 2) == late]
        if sizes:
            figures[f"gpu_{half}_half_mib"] = statistics.median(sizes) / 2**20
    return figures


def table_of(rows: list[dict[str, float]], caption: str) -> Table:
    """The figures."""
    table = Table(title="through HTTP", caption=caption)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        texts = (f"{row[name]:,.1f}" if isinstance(row[name], float) else str(row[name])
                 for name in COLUMNS)  # fmt: skip
        table.add_row(*texts)
    return table


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "qwen3-1.7b",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "1000,5000",
    clients: Annotated[str, typer.Option(help="At once, for each context.")] = "4,8,32",
    beam_width: Annotated[int, typer.Option(min=1, help="W of each request.")] = 256,
    top_k: Annotated[int, typer.Option(min=1, help="Items of an answer.")] = 10,
    levels: Annotated[int, typer.Option(min=2, help="Codes of an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 8_192,
    items: Annotated[int, typer.Option(min=1, help="Items of the catalog.")] = 1_500_000,
    kv_memory_mib: Annotated[int, typer.Option(min=1, help="Of server and engine, each.")] = 12_288,
    widths: Annotated[str, typer.Option(help="Beam widths that are captured.")] = "64,256",
    flags: Annotated[str, typer.Option(help="More flags of the server, name=value,...")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measurement.")] = 4.0,
    factor: Annotated[float, typer.Option(min=1.0, help="Of the overload.")] = 3.0,
    overload_seconds: Annotated[float, typer.Option(min=0.0, help="0: no overload.")] = 10.0,
    timeout_ms: Annotated[int, typer.Option(min=1, help="Deadline in the overload.")] = 2_000,
    output: Annotated[Path | None, typer.Option(help="CSV file for the table.")] = None,
) -> None:
    """Compare answers, then measure."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    decoder = dict(zip(_DECODER, MODELS[model], strict=True))
    hidden, layers = decoder["hidden_size"], decoder["num_hidden_layers"]
    # A prompt is S a0 a1 a2 for each item, and S.
    sizes = {int(word): (int(word) - 1) // (levels + 1) for word in contexts.split(",")}
    shape = ReleaseShape(layers, hidden, items, levels, codebook_size, max(sizes.values()), seed=0)
    console = Console(width=190)
    started = time.perf_counter()
    given = {
        "device": device,
        "dtype": dtype,
        "log-level": "error",
        "engine.kv-memory-mib": str(kv_memory_mib),
        "engine.captured-beam-widths": widths,
        **dict(word.split("=", 1) for word in flags.split(",") if word),
    }
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        place = torch.device(device)
        path = write_random_release(Path(folder), shape, decoder, getattr(torch, dtype), place)
        if place.type == "cuda":
            torch.cuda.empty_cache()
        console.print(f"a release after {time.perf_counter() - started:.1f} s")
        named = {name.replace("-", "_"): value for name, value in given.items()}
        settings = load_settings({**named, "release": str(path)})
        loading = pool.submit(load_release, settings)
        words = tuple(word for name, value in given.items() for word in (f"--{name}", value))
        with running_server("--release", str(path), *words, timeout_s=300) as running:
            subject = Subject(loading.result(), settings, dtype, beam_width, top_k)
            # This process is the client too: its collections would be taken for the server's.
            pass_over_loaded()
            console.print(f"both ready after {time.perf_counter() - started:.1f} s")
            rows = []
            try:
                for context, count in sizes.items():
                    counts = [int(word) for word in clients.split(",")]
                    rows += measure_context(
                        subject, running.base_url, context, count, counts, seconds, console
                    )
            except WrongAnswerError as error:
                console.print("nothing more is timed:", error, markup=False)
                raise typer.Exit(1) from error
            if overload_seconds > 0:
                first = next(iter(sizes))
                best = max(r["requests_per_s"] for r in rows if r["context"] == first)
                figures = overload(
                    subject, running, sizes[first], factor * best, overload_seconds, timeout_ms
                )
                console.print("overload:", {k: round(v, 1) for k, v in figures.items()})
    where = torch.cuda.get_device_name() if device != "cpu" else "a CPU"
    console.print(table_of(rows, f"{model} in {dtype}, {where}; torch {torch.__version__}"))
    if output is not None:
        write_csv(output, COLUMNS, [{k: round(v, 3) for k, v in row.items()} for row in rows])


if __name__ == "__main__":
    typer.run(main)
