"""What HTTP, queueing, batching, JSON and metrics add to the engine; and three times the load.

    python -m examples.scripts.benchmark.benchmark_service
    python -m examples.scripts.benchmark.benchmark_service --release DIR --output service.csv

Starts the server on a loopback port as a process of its own, with a random release unless --release
names one. First the answers are compared with the engine's own, in this process; then, in turns:

- one request at a time: what the client waits beyond the engine's time of that request;
- saturation: requests a second through HTTP with more clients than a batch holds, and of the engine
  alone on full batches of the same requests, one after the other;
- overload: so many times the requests a second that were measured, for --overload-seconds, with a
  deadline. Answered requests must keep it, the others must be refused at once, memory must be flat.

Load is bounded: at most --max-open requests are unanswered at any time.
"""

from __future__ import annotations

import asyncio
import itertools
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from examples.scripts.benchmark.http_load import (
    Connections,
    OpenLoad,
    closed_loop,
    open_loop,
    percentile,
)
from examples.scripts.benchmark.kernel_timing import write_csv
from examples.scripts.benchmark.random_release import ReleaseShape, make_random_release
from rectokens.schemas.search import SearchResult
from server.demo.running import running_server
from server.queries import RecommendQuery
from server.recommender import prepare, present
from server.release import Release, load_release
from server.settings import Settings, load_settings

PATH = "/v1/recommend"
CHECKED = 16
REFUSED_WITHIN_S = 0.05
# Small enough to be full before memory is watched.
KV_MEMORY_MIB = 64


class WrongAnswerError(RuntimeError):
    """Two that should answer the same do not; nothing is timed then."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Of a measurement at full load.

    Attributes:
        per_s: requests a second.
        cpu_s: CPU time of a request, all threads of the process; it hardly depends on what else
            the machine does.
    """

    per_s: float
    cpu_s: float


class Histories:
    """Random histories, the same for HTTP and for the engine; no two alike."""

    def __init__(self, release: Release, length: int, beam_width: int, seed: int) -> None:
        self._release, self._length, self._beam_width = release, length, beam_width
        self._rng = random.Random(seed)

    def body(self, timeout_ms: int = 60_000) -> dict[str, Any]:
        """A request of the API."""
        items = self._rng.choices(range(self._release.catalog.num_items), k=self._length)
        return {
            "history": self._release.catalog.ids_of(items),
            "top_k": min(10, self._beam_width),
            "beam_width": self._beam_width,
            "timeout_ms": timeout_ms,
        }

    def bodies(self, timeout_ms: int = 60_000) -> Iterator[bytes]:
        """Requests without end."""
        while True:
            yield orjson.dumps(self.body(timeout_ms))

    def ready_bodies(self, count: int, timeout_ms: int) -> Iterator[bytes]:
        """Requests without end, made beforehand, so that an overload costs the client little."""
        return itertools.cycle(list(itertools.islice(self.bodies(timeout_ms), count)))


def query_of(body: dict[str, Any], settings: Settings) -> RecommendQuery:
    """What the service makes of such a request."""
    defaults = settings.defaults
    return RecommendQuery(
        parts=tuple(body["history"]),
        parts_param="history",
        top_k=body["top_k"],
        beam_width=body["beam_width"],
        temperature=0.0,
        seed=None,
        exclude_history=defaults.exclude_history,
        exclude_items=(),
        constraint_sets=(),
        normalization=defaults.normalization,
        with_metadata=False,
        with_level_scores=False,
        deadline_s=float("inf"),
    )


class EngineAlone:
    """The engine of the release in this process, without a service around it."""

    def __init__(self, release: Release, settings: Settings, histories: Histories) -> None:
        self._release, self._settings, self._histories = release, settings, histories

    def answer(self, body: dict[str, Any]) -> list[tuple[str, float]]:
        """Items and scores of one request."""
        query = query_of(body, self._settings)
        search = prepare(query, self._release).search
        (result,) = self._release.engine.search([search], self._release.trie).results
        if not isinstance(result, SearchResult):
            raise WrongAnswerError(result.message)
        items = present(result, query, self._release.catalog)
        return [(item.item_id, item.score) for item in items]

    def rate(self, seconds: float) -> Rate:
        """Full batches of requests whose prompts are ready, one after the other."""
        size = self._settings.batching.max_requests
        taken, cpu, done = 0.0, 0.0, 0
        while taken < seconds:
            queries = [query_of(self._histories.body(), self._settings) for _ in range(size)]
            searches = [prepare(query, self._release).search for query in queries]
            started, cpu_started = time.perf_counter(), time.process_time()
            self._release.engine.search(searches, self._release.trie)
            taken += time.perf_counter() - started
            cpu += time.process_time() - cpu_started
            done += size
        return Rate(done / taken, cpu / done)


async def compare(base_url: str, alone: EngineAlone, histories: Histories) -> None:
    """Ask both the same.

    Raises:
        WrongAnswerError: the answers differ.
    """
    connections = Connections(base_url, PATH)
    for _ in range(CHECKED):
        body = histories.body()
        reply = await connections.post(orjson.dumps(body))
        if reply.status != 200:
            raise WrongAnswerError(f"status {reply.status}: {reply.body.decode()}")
        found = [(one["item_id"], one["score"]) for one in orjson.loads(reply.body)["items"]]
        expected = alone.answer(body)
        scores = zip((s for _, s in found), (s for _, s in expected), strict=True)
        if {i for i, _ in found} != {i for i, _ in expected} or any(
            abs(a - b) > 1e-4 for a, b in scores
        ):
            raise WrongAnswerError(f"HTTP answers {found}, the engine {expected}")
    await connections.close()


async def one_at_a_time(base_url: str, histories: Histories, seconds: float) -> list[float]:
    """Seconds that each request took beyond the engine's own time."""
    connections = Connections(base_url, PATH)
    replies = await closed_loop(connections, histories.bodies(), 1, seconds)
    await connections.close()
    added = []
    for reply in replies:
        timings = orjson.loads(reply.body)["timings"]
        added.append(reply.seconds - (timings["prefill_ms"] + timings["decode_ms"]) / 1e3)
    return added


async def saturated(
    base_url: str, histories: Histories, server: psutil.Process, clients: int, seconds: float
) -> tuple[Rate, list[float]]:
    """The rate through HTTP, and seconds of each request beyond its queueing and its batch."""
    connections = Connections(base_url, PATH)
    bodies = histories.bodies()
    # The queue fills, and the service learns what its batches cost.
    await closed_loop(connections, bodies, clients, min(seconds, 2.0))
    started, cpu_started = time.monotonic(), cpu_seconds(server)
    replies = await closed_loop(connections, bodies, clients, seconds)
    taken, cpu = time.monotonic() - started, cpu_seconds(server) - cpu_started
    await connections.close()
    added = []
    for reply in replies:
        if reply.status != 200:
            raise WrongAnswerError(f"status {reply.status} while saturated: {reply.body.decode()}")
        timings = orjson.loads(reply.body)["timings"]
        inside = timings["queue_ms"] + timings["prefill_ms"] + timings["decode_ms"]
        added.append(reply.seconds - inside / 1e3)
    return Rate(len(replies) / taken, cpu / len(replies)), added


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time that a process has taken so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def overloaded(
    base_url: str,
    histories: Histories,
    server: psutil.Process,
    rate: float,
    seconds: float,
    timeout_ms: int,
    max_open: int,
) -> tuple[OpenLoad, list[tuple[float, int]]]:
    """The load, and the server's memory as (seconds since the start, bytes)."""
    connections = Connections(base_url, PATH)
    memory: list[tuple[float, int]] = []
    await connections.open(max_open)
    load = await open_loop(
        connections,
        histories.ready_bodies(2_000, timeout_ms),
        rate,
        seconds,
        max_open=max_open,
        seed=1,
        every=lambda elapsed: memory.append((elapsed, server.memory_info().rss)),
    )
    await connections.close()
    return load, memory


def overload_figures(
    load: OpenLoad, memory: Sequence[tuple[float, int]], timeout_ms: int, seconds: float
) -> dict[str, float]:
    """What is claimed of an overloaded service, as figures."""
    by_status = Counter(reply.status for reply in load.replies)
    answered = [reply.seconds for reply in load.replies if reply.status == 200]
    refused = [reply.seconds for reply in load.replies if reply.status == 429]
    halves = [[size for at, size in memory if (at > seconds / 2) == late] for late in (False, True)]
    first, second = (statistics.median(half) if half else float("nan") for half in halves)
    return {
        "offered_per_s": len(load.replies) / seconds,
        "answered": len(answered),
        "answered_per_s": len(answered) / seconds,
        "answered_median_ms": 1e3 * percentile(answered, 0.5),
        "answered_p99_ms": 1e3 * percentile(answered, 0.99),
        "late": sum(taken > timeout_ms / 1e3 for taken in answered) + by_status[504],
        "refused": len(refused),
        "refused_median_ms": 1e3 * percentile(refused, 0.5),
        "refused_p99_ms": 1e3 * percentile(refused, 0.99),
        "refused_within_50_ms_percent": 100
        * sum(taken <= REFUSED_WITHIN_S for taken in refused)
        / max(len(refused), 1),
        "other_answers": sum(n for status, n in by_status.items() if status not in (200, 429, 504)),
        "unsent": load.unsent,
        "client_lag_p99_ms": 1e3 * percentile(load.lag_s, 0.99),
        "memory_first_half_mib": first / 2**20,
        "memory_second_half_mib": second / 2**20,
    }


@contextmanager
def release_or_random(release: Path | None, shape: ReleaseShape) -> Iterator[Path]:
    """The folder of the release that is measured."""
    if release is not None:
        yield release
        return
    with tempfile.TemporaryDirectory() as folder:
        yield make_random_release(Path(folder), shape)


def measure(
    path: Path,
    *,
    history: int,
    beam_width: int,
    threads: int,
    seconds: float,
    turns: int,
    overload: float,
    overload_seconds: float,
    timeout_ms: int,
    max_open: int,
) -> dict[str, float]:
    """All figures of one release."""
    flags = {
        "cpu-threads": threads,
        "log-level": "error",
        "engine.kv-memory-mib": KV_MEMORY_MIB,
        # Connections are opened before they are needed.
        "http.keep-alive-s": 600,
    }
    settings = load_settings(
        {name.replace("-", "_"): str(value) for name, value in flags.items()}
        | {"release": str(path)}
    )
    torch.set_num_threads(threads)
    release = load_release(settings)
    histories = Histories(release, history, beam_width, seed=0)
    alone = EngineAlone(release, settings, histories)
    clients = 2 * settings.batching.max_requests
    options = tuple(word for name, value in flags.items() for word in (f"--{name}", str(value)))
    with running_server("--release", str(path), *options) as running:
        base_url, server = running.base_url, psutil.Process(running.pid)
        asyncio.run(compare(base_url, alone, histories))
        single: list[float] = []
        added: list[float] = []
        engine_rates: list[Rate] = []
        http_rates: list[Rate] = []
        for _ in range(turns):
            single += asyncio.run(one_at_a_time(base_url, histories, seconds))
            engine_rates.append(alone.rate(seconds))
            rate, more = asyncio.run(saturated(base_url, histories, server, clients, seconds))
            http_rates.append(rate)
            added += more
        http_rate = statistics.median(rate.per_s for rate in http_rates)
        ratios = [h.per_s / e.per_s for h, e in zip(http_rates, engine_rates, strict=True)]
        figures = {
            "single_added_median_ms": 1e3 * percentile(single, 0.5),
            "single_added_p90_ms": 1e3 * percentile(single, 0.9),
            "engine_per_s": statistics.median(rate.per_s for rate in engine_rates),
            "http_per_s": http_rate,
            "http_part_of_engine_percent": 100 * statistics.median(ratios),
            "engine_cpu_ms": 1e3 * statistics.median(rate.cpu_s for rate in engine_rates),
            "http_cpu_ms": 1e3 * statistics.median(rate.cpu_s for rate in http_rates),
            "saturated_added_median_ms": 1e3 * percentile(added, 0.5),
            "saturated_added_p90_ms": 1e3 * percentile(added, 0.9),
        }
        load, memory = asyncio.run(
            overloaded(
                base_url,
                histories,
                server,
                overload * http_rate,
                overload_seconds,
                timeout_ms,
                max_open,
            )
        )
    return figures | overload_figures(load, memory, timeout_ms, overload_seconds)


def main(
    release: Annotated[Path | None, typer.Option(help="Release folder; none: random.")] = None,
    num_layers: Annotated[int, typer.Option(min=1, help="Of the random model.")] = 4,
    hidden_size: Annotated[int, typer.Option(min=64, help="Of the random model.")] = 256,
    num_items: Annotated[int, typer.Option(min=1, help="Of the random catalog.")] = 20_000,
    history: Annotated[int, typer.Option(min=1, help="Items in each history.")] = 30,
    beam_width: Annotated[int, typer.Option(min=1, help="W of each request.")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads of the engine.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measurement.")] = 8.0,
    turns: Annotated[int, typer.Option(min=1, help="Times each is measured.")] = 3,
    overload: Annotated[float, typer.Option(min=1.0, help="Times the load it can carry.")] = 3.0,
    overload_seconds: Annotated[float, typer.Option(min=0.5, help="Of the overload.")] = 30.0,
    timeout_ms: Annotated[int, typer.Option(min=1, help="Deadline in the overload.")] = 10_000,
    max_open: Annotated[int, typer.Option(min=1, help="Most requests unanswered.")] = 512,
    output: Annotated[Path | None, typer.Option(help="CSV file for the figures.")] = None,
) -> None:
    """Compare answers, then measure."""
    shape = ReleaseShape(num_layers, hidden_size, num_items, 3, 256, history, seed=0)
    console = Console()
    with release_or_random(release, shape) as path:
        try:
            figures = measure(
                path,
                history=history,
                beam_width=beam_width,
                threads=threads,
                seconds=seconds,
                turns=turns,
                overload=overload,
                overload_seconds=overload_seconds,
                timeout_ms=timeout_ms,
                max_open=max_open,
            )
        except WrongAnswerError as error:
            console.print("the answers differ, so nothing is timed:", error, markup=False)
            raise typer.Exit(1) from error
    table = Table(
        title="the service around the engine",
        caption=f"{path.name}, histories of {history} items, beam {beam_width}; {threads} engine "
        f"threads; torch {torch.__version__}, Python {platform.python_version()}",
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    if output is not None:
        write_csv(output, list(figures), [figures])


if __name__ == "__main__":
    typer.run(main)
