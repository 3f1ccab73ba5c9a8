"""What callers feel of a swap: latency before and during it, failures, memory, on a real service.

    python -m examples.scripts.benchmark.benchmark_swap --num-items 100000 --num-items 1000000

A service with a random model serves from a store. Requests arrive at a fixed rate, half of what it
can carry unless told otherwise, whether or not earlier ones have been answered: a service that
stands still for a moment is charged for everybody who waits. Meanwhile two catalogs are activated
in turn. "During" are the requests that were on their way while the new catalog was not yet served.
"""

from __future__ import annotations

import asyncio
import os
import platform
import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.scripts.benchmark.http_load import percentile
from examples.scripts.benchmark.kernel_timing import write_csv
from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release_store import ReleaseStore
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens
from server.demo.running import running_server

FINGERPRINT = "0" * 64
LEVELS, CODES = 4, 256
HISTORY_ITEMS, BEAM_WIDTH, TOP_K = 20, 32, 10
DEFAULT_SIZES = (100_000,)
_START_S, _SWAP_S = 300.0, 600.0
_PROBE_S, _PROBE_CLIENTS = 4.0, 8


@dataclass(frozen=True, slots=True)
class Load:
    """How it is asked.

    Attributes:
        rate: requests a second, None for half of what the service carries.
        quiet_s: seconds without a swap before the first, and between two.
        swaps: how many.
    """

    rate: float | None
    quiet_s: float
    swaps: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A request: when it was due, when it was answered (monotonic seconds), and how."""

    due_s: float
    end_s: float
    status: int

    @property
    def ms(self) -> float:
        """From when it was due to its answer."""
        return (self.end_s - self.due_s) * 1000


@dataclass(frozen=True, slots=True)
class Figures:
    """What was found for one catalog size. Times in milliseconds unless they say otherwise."""

    num_items: int
    new_model: bool
    rate: float
    requests: int
    failed: int
    swap_s: float
    p50_before: float
    p50_during: float
    p99_before: float
    p99_during: float
    p99_ratio: float
    resident_mib: float
    peak_mib: float


def split(
    samples: Sequence[Sample], swaps: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Latencies of requests apart from every swap, and of those that met one."""
    apart: list[float] = []
    met: list[float] = []
    for sample in samples:
        meets = any(sample.due_s < end and sample.end_s > begin for begin, end in swaps)
        (met if meets else apart).append(sample.ms)
    return apart, met


def make_store(root: Path, num_items: int, hidden: int, layers: int, two_models: bool) -> list[str]:
    """A store with two releases, the first of them active; their versions."""
    tokens = ItemTokens(
        offset=4, level_stride=CODES, num_levels=LEVELS, codebook_size=CODES, start_token_id=1
    )
    spec = RetrievalSpec(FINGERPRINT, tokens, PromptRecipe("item_history", 1, {"max_items": 50}))
    store = open_release_store(root)
    models = [
        _save_random_model(root, spec, hidden, layers, seed) for seed in range(1 + two_models)
    ]
    releases = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        catalog = build_catalog(
            [f"item-{row}" for row in range(num_items)],
            torch.randint(0, CODES, (num_items, LEVELS), generator=generator),
            codebook_size=CODES,
            tokenizer_fingerprint=FINGERPRINT,
        )
        folder = save_catalog(root / "catalogs", catalog)
        releases.append(store.bind(models[seed % len(models)], folder.name))
    store.activate(releases[0])
    return releases


def _save_random_model(root: Path, spec: RetrievalSpec, hidden: int, layers: int, seed: int) -> str:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=4 + LEVELS * CODES,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 128, 1),
        head_dim=64,
        tie_word_embeddings=True,
    )
    return save_model(root / "models", Qwen3ForCausalLM(config).eval(), spec).name


class Caller:
    """Sends requests with random histories and keeps what became of them."""

    def __init__(self, client: httpx.AsyncClient, num_items: int) -> None:
        self._client = client
        self._num_items = num_items
        self._rng = random.Random(0)
        self.samples: list[Sample] = []

    async def ask(self, due_s: float) -> None:
        """One request that was due at that time."""
        history = [f"item-{self._rng.randrange(self._num_items)}" for _ in range(HISTORY_ITEMS)]
        body = {"history": history, "top_k": TOP_K, "beam_width": BEAM_WIDTH}
        try:
            status = (await self._client.post("/v1/recommend", json=body)).status_code
        except httpx.HTTPError:
            status = 0
        self.samples.append(Sample(due_s, time.monotonic(), status))

    async def capacity(self) -> float:
        """Requests a second that are answered when a few callers ask without pause."""
        until = time.monotonic() + _PROBE_S

        async def client() -> None:
            while time.monotonic() < until:
                await self.ask(time.monotonic())

        await asyncio.gather(*(client() for _ in range(_PROBE_CLIENTS)))
        answered, self.samples = len(self.samples), []
        return answered / _PROBE_S

    async def keep_asking(self, rate: float, end: asyncio.Event) -> None:
        """Ask at a rate until the end, and wait for the last answers."""
        async with asyncio.TaskGroup() as group:
            due_s = time.monotonic()
            while not end.is_set():
                due_s += self._rng.expovariate(rate)
                await asyncio.sleep(max(due_s - time.monotonic(), 0))
                group.create_task(self.ask(due_s))


async def measure(
    base: str, pid: int, store: ReleaseStore, releases: Sequence[str], num_items: int, load: Load
) -> Figures:
    """Ask, swap meanwhile, and sum up."""
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as client:
        caller = Caller(client, num_items)
        await caller.capacity()  # warms up
        rate = load.rate or 0.5 * await caller.capacity()
        end = asyncio.Event()
        asking = asyncio.create_task(caller.keep_asking(rate, end))
        await asyncio.sleep(load.quiet_s)
        resident = _status_mib(pid, "VmRSS")
        swaps = []
        for number in range(load.swaps):
            swaps.append(await _swap(client, store, releases[(number + 1) % 2]))
            await asyncio.sleep(load.quiet_s)
        end.set()
        await asking
    before, during = split(caller.samples, swaps)
    p99_before, p99_during = percentile(before, 0.99), percentile(during, 0.99)
    return Figures(
        num_items=num_items,
        new_model=False,
        rate=round(rate, 1),
        requests=len(caller.samples),
        failed=sum(sample.status != 200 for sample in caller.samples),
        swap_s=round(median(last - first for first, last in swaps), 2),
        p50_before=round(percentile(before, 0.5), 1),
        p50_during=round(percentile(during, 0.5), 1),
        p99_before=round(p99_before, 1),
        p99_during=round(p99_during, 1),
        p99_ratio=round(p99_during / p99_before, 2),
        resident_mib=round(resident),
        peak_mib=round(_status_mib(pid, "VmHWM")),
    )


async def _swap(
    client: httpx.AsyncClient, store: ReleaseStore, release: str
) -> tuple[float, float]:
    """Activate a release; from when the pointer moved to when it was seen to be served."""
    await asyncio.to_thread(store.activate, release)
    begin, deadline = time.monotonic(), time.monotonic() + _SWAP_S
    while time.monotonic() < deadline:
        if (await client.get("/ready")).json().get("release_version") == release:
            return begin, time.monotonic()
        await asyncio.sleep(0.05)
    raise RuntimeError(f"release {release} was not served within {_SWAP_S:g} s")


def _status_mib(pid: int, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) / 1024 if found else float("nan")


def print_table(results: Sequence[Figures], console: Console) -> None:
    """One row a size."""
    table = Table(title=f"Swaps under load, {platform.machine()}, {os.cpu_count()} CPUs")
    for field in fields(Figures):
        table.add_column(field.name, justify="right")
    for result in results:
        table.add_row(*map(str, asdict(result).values()))
    console.print(table)


def main(
    num_items: Annotated[list[int] | None, typer.Option(help="Items; repeated for more.")] = None,
    new_model: Annotated[bool, typer.Option(help="Every swap brings its own model.")] = False,
    hidden: Annotated[int, typer.Option(help="Hidden size of the model, times 64.")] = 256,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 4,
    rate: Annotated[float | None, typer.Option(help="Requests/s; default half capacity.")] = None,
    quiet_s: Annotated[float, typer.Option(help="Seconds before and between swaps.")] = 10.0,
    swaps: Annotated[int, typer.Option(help="How many.")] = 5,
    flag: Annotated[
        list[str] | None, typer.Option(help="For the service, e.g. --device=cuda.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where stores are written.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the figures here.")] = None,
) -> None:
    """Measure swaps of catalogs of several sizes."""
    results = []
    flags = ["--store.poll-s", "0.2", "--jobs.no-start-worker", "--cpu-threads", "1"]
    flags += flag or ()
    for size in num_items or DEFAULT_SIZES:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            store_root = Path(root) / "store"
            releases = make_store(store_root, size, hidden, layers, new_model)
            with running_server("--store.path", str(store_root), *flags, timeout_s=_START_S) as one:
                store = open_release_store(store_root)
                load = Load(rate, quiet_s, swaps)
                figures = asyncio.run(measure(one.base_url, one.pid, store, releases, size, load))
        results.append(replace(figures, new_model=new_model))
    print_table(results, Console(width=200))
    if csv_file is not None:
        write_csv(
            csv_file,
            [field.name for field in fields(Figures)],
            [asdict(result) for result in results],
        )


if __name__ == "__main__":
    typer.run(main)
