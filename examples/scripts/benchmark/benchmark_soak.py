"""Thousands of random requests of every kind; each answer checked, memory watched.

    python -m examples.scripts.benchmark.benchmark_soak
    python -m examples.scripts.benchmark.benchmark_soak --device cpu --dtype float32 --requests 2000

Batches of random size hold random prompts, some of which return and have grown, random widths, top
k, temperatures, normalizations, exclusions, constraint sets and allow-lists; the catalog is swapped
every few batches. Of each answer is counted: items that the catalog does not have under that
semantic ID, items returned twice, items that a filter forbids, scores out of order or not finite,
and answers of fewer items than exist. All of these must be 0. Memory is read after every batch.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from examples.scripts.benchmark.benchmark_prefix_cache import MODELS, build
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest, SearchResult
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceOptions
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import BatchOutcome, EngineFault

_RETURNING = 64  # prompts that may come again
_SWAP_EVERY = 8  # batches
_WARM_PART = 0.25  # of all requests, before memory is watched
_ROUNDING = 1e-3  # of scores that are compared with one another


@dataclass(frozen=True, slots=True)
class Catalog:
    """What answers are checked against.

    Attributes:
        trie: on the engine's device.
        codes: (N, L), semantic ID of each item.
        sets: prefix sums of constraint sets, on the engine's device, each int32 (N + 1,).
        members: bool (N,) of each set.
    """

    trie: CatalogTrie
    codes: NDArray[np.int64]
    sets: tuple[Tensor, ...]
    members: tuple[NDArray[np.bool_], ...]


def random_catalog(
    items: int, levels: int, codebook_size: int, seed: int, device: torch.device
) -> Catalog:
    """Skewed codes, so that some nodes have many children, and items that collide."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(items, levels, generator=generator) ** 3 * codebook_size).long()
    trie, order = CatalogTrie.from_codes(codes, codebook_size)
    members = [torch.rand(items, generator=generator) < part for part in (0.5, 0.01, 0.0001)]
    sets = [torch.cat([torch.zeros(1), one.cumsum(0)]).int() for one in members]
    return Catalog(
        trie.to(device),
        codes[order].numpy(),
        tuple(one.to(device) for one in sets),
        tuple(one.numpy() for one in members),
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and which of its catalog's items it allows, bool (N,)."""

    request: SearchRequest
    allowed: NDArray[np.bool_]


class Traffic:
    """Random requests.

    Args:
        tokens: where the item tokens lie.
        most_items: longest history of a prompt, in items.
        widths: beam widths are at most this.
        seed: of it all.
    """

    def __init__(self, tokens: ItemTokens, most_items: int, widths: int, seed: int) -> None:
        self._tokens, self._most, self._widths = tokens, most_items, widths
        self._rng = np.random.default_rng(seed)
        self._before: list[list[int]] = []

    def batch(self, catalog: Catalog, most: int) -> list[Asked]:
        """Up to so many requests."""
        return [self._request(catalog) for _ in range(self._rng.integers(1, most + 1))]

    def _prompt(self, codes: NDArray[np.int64]) -> list[int]:
        rng, tokens = self._rng, self._tokens
        old: list[int] = []
        if self._before and rng.random() < 0.3:
            old = self._before[rng.integers(len(self._before))]
        count = int(rng.integers(1, 6 if old else self._most + 1))
        rows = codes[rng.integers(len(codes), size=count)].tolist()
        new = [t for row in rows for t in (tokens.start_token_id, *tokens.encode(row))]
        history = [*old, *new][-self._most * (1 + tokens.num_levels) :]
        self._before.append(history)
        if len(self._before) > _RETURNING:
            self._before.pop(int(rng.integers(_RETURNING)))
        return [*history, tokens.start_token_id]

    def _request(self, catalog: Catalog) -> Asked:
        rng = self._rng
        items = len(catalog.codes)
        allowed = np.ones(items, dtype=np.bool_)
        excluded = prefix = listed = None
        if rng.random() < 0.5:
            size = int(rng.choice([1, 20, min(300, items)]))
            some = np.unique(rng.integers(items, size=size))
            excluded = torch.from_numpy(some)
            allowed[some] = False
        if rng.random() < 0.4:
            which = int(rng.integers(len(catalog.sets)))
            prefix = catalog.sets[which]
            allowed &= catalog.members[which]
        if rng.random() < 0.2:
            some = np.unique(rng.integers(items, size=int(rng.choice([1, 50, 1_000]))))
            listed = torch.from_numpy(some)
            mask = np.zeros(items, dtype=np.bool_)
            mask[some] = True
            allowed &= mask
        width = int(rng.choice([rng.integers(1, 65), rng.integers(1, self._widths + 1)]))
        request = SearchRequest(
            prompt=tuple(self._prompt(catalog.codes)),
            beam_width=width,
            top_k=int(rng.integers(1, width + 1)),
            temperature=float(rng.choice([0.0, 0.0, 0.7, 2.0])),
            seed=int(rng.integers(2**62)),
            normalization=NORMALIZATIONS[int(rng.integers(len(NORMALIZATIONS)))],
            excluded_items=excluded,
            allowed_prefix=prefix,
            allowed_items=listed,
        )
        return Asked(request, allowed)


def faults_of(
    asked: Asked, result: SearchResult | EngineFault, codes: NDArray[np.int64]
) -> Counter[str]:
    """What is wrong with an answer, counted by kind; empty where nothing is."""
    faults: Counter[str] = Counter()
    if isinstance(result, EngineFault):
        return Counter({"failed": 1})
    hits = result.hits
    indices = [hit.item_index for hit in hits]
    for hit in hits:
        item = hit.item_index
        known = 0 <= item < len(codes) and tuple(codes[item].tolist()) == hit.semantic_id
        if not known:
            faults["invalid"] += 1
        elif not asked.allowed[item]:
            faults["forbidden"] += 1
    faults["repeated"] += len(indices) - len(set(indices))
    scores = [hit.score for hit in hits]
    faults["not finite"] += sum(not math.isfinite(score) for score in scores)
    if asked.request.temperature == 0:
        pairs = itertools.pairwise(scores)
        faults["out of order"] += sum(later > one + _ROUNDING for one, later in pairs)
    wanted = min(asked.request.top_k, int(asked.allowed.sum()))
    faults["missing"] += max(wanted - len(hits), 0)
    faults["too many"] += max(len(hits) - wanted, 0)
    told = result.shortfall is None or result.shortfall.returned == len(hits)
    faults["shortfall untold"] += not told or (wanted < asked.request.top_k) == (
        result.shortfall is None
    )
    return +faults


def memory_mib(device: torch.device) -> tuple[float, float]:
    """MiB that tensors take and MiB that the process holds: of the GPU, or of the machine."""
    if device.type == "cuda":
        allocated, reserved = (
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
        )
        return allocated / 2**20, reserved / 2**20
    resident = psutil.Process().memory_info().rss / 2**20
    return resident, resident


@dataclass(frozen=True, slots=True)
class Soak:
    """What came of it.

    Attributes:
        requests: answered.
        batches: of them.
        items: returned.
        faults: by kind.
        seconds: in calls of the engine.
        allocated_mib: after each batch, see :func:`memory_mib`.
        reserved_mib: likewise.
        resident_mib: of the process on the machine, likewise.
    """

    requests: int
    batches: int
    items: int
    faults: Counter[str]
    seconds: float
    allocated_mib: Sequence[float]
    reserved_mib: Sequence[float]
    resident_mib: Sequence[float]


def soak(
    engine: Any,
    catalogs: Sequence[Catalog],
    traffic: Traffic,
    requests: int,
    batch: int,
    limit_s: float,
) -> Soak:
    """Answer so many requests, or as many as there is time for."""
    process = psutil.Process()
    faults: Counter[str] = Counter()
    done = items = number = 0
    spent = 0.0
    allocated, reserved, resident = [], [], []
    ends = time.monotonic() + limit_s

    def batches() -> Iterator[tuple[list[Asked], Catalog]]:
        drawn = 0
        for count in itertools.count():
            if drawn >= requests or time.monotonic() > ends:
                return
            catalog = catalogs[count // _SWAP_EVERY % len(catalogs)]
            asked = traffic.batch(catalog, batch)
            drawn += len(asked)
            yield asked, catalog

    for asked, catalog, outcome, seconds in answered(engine, batches()):
        number += 1
        spent += seconds
        for one, result in zip(asked, outcome.results, strict=True):
            faults += faults_of(one, result, catalog.codes)
            items += len(result.hits) if isinstance(result, SearchResult) else 0
        done += len(asked)
        here, held = memory_mib(engine.device)
        allocated.append(here)
        reserved.append(held)
        resident.append(process.memory_info().rss / 2**20)
    return Soak(done, number, items, faults, spent, allocated, reserved, resident)


def answered(
    engine: Any, batches: Iterator[tuple[list[Asked], Catalog]]
) -> Iterator[tuple[list[Asked], Catalog, BatchOutcome, float]]:
    """Batches with their answers, and the seconds in calls of the engine since the one before.

    As in the service, a batch is begun before the one ahead of it is finished, where the engine
    begins batches.
    """
    ahead: tuple[list[Asked], Catalog, Callable[[], BatchOutcome]] | None = None
    for asked, catalog in batches:
        started = time.perf_counter()
        prepared = engine.prepare([one.request for one in asked], catalog.trie)
        running = engine.begin(prepared)
        finish = partial(engine.run, prepared) if running is None else running.finish
        if ahead is not None:
            yield *ahead[:2], ahead[2](), time.perf_counter() - started
        ahead = asked, catalog, finish
    if ahead is not None:
        started = time.perf_counter()
        yield *ahead[:2], ahead[2](), time.perf_counter() - started


def halves(values: Sequence[float]) -> tuple[float, float, float]:
    """Medians of the two halves after the warm part, and the largest of the second."""
    warm = values[int(_WARM_PART * len(values)) :]
    middle = len(warm) // 2
    first, second = warm[:middle], warm[middle:]
    return statistics.median(first), statistics.median(second), max(second)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    requests: Annotated[int, typer.Option(min=1, help="Answered at most.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Requests of the largest batch.")] = 32,
    seconds: Annotated[float, typer.Option(min=1, help="It takes at most.")] = 600.0,
    width: Annotated[int, typer.Option(min=1, help="Widest beam.")] = 300,
    history: Annotated[int, typer.Option(min=1, help="Items of the longest history.")] = 100,
    levels: Annotated[int, typer.Option(min=2, help="Codes of an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 1_024,
    items: Annotated[int, typer.Option(min=1, help="Items of each catalog.")] = 200_000,
    memory_mib: Annotated[int, typer.Option(min=1, help="For context KV.")] = 1_024,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
) -> None:
    """Ask, check and count; the exit status is 1 where anything was wrong."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    console = Console(width=160)
    lm, tokens, _ = build(model, device, getattr(torch, dtype), levels, codebook_size, 8)
    captured = None
    if device != "cpu":
        captured = DeviceOptions(Buckets((1, 2, 4, 8, 16, 32), (64, 256), 4_096))
    engine = build_engine(lm, tokens, PoolOptions(memory_bytes=memory_mib << 20), captured)
    place = engine.device
    catalogs = [
        random_catalog(size, levels, codebook_size, number, place)
        for number, size in enumerate((items, max(items * 9 // 10, 1)))
    ]
    traffic = Traffic(tokens, history, width, seed)
    for catalog in catalogs:
        engine.search([one.request for one in traffic.batch(catalog, 1)], catalog.trie)
    found = soak(engine, catalogs, traffic, requests, batch, seconds)
    where = torch.cuda.get_device_name() if place.type == "cuda" else "a CPU"
    console.print(
        f"{type(engine).__name__}, {model} in {dtype}, {where}: {found.requests:,} requests in "
        f"{found.batches:,} batches, {found.items:,} items, {found.seconds:.1f} s of the engine"
    )
    console.print("faults:", dict(found.faults) or "none")
    for name, values in (
        ("memory of tensors", found.allocated_mib),
        ("memory held", found.reserved_mib),
        ("resident memory of the process", found.resident_mib),
    ):
        if len(values) >= 4:
            first, second, most = halves(values)
            console.print(f"{name}: {first:.0f} MiB, then {second:.0f}, at most {most:.0f}")
    if found.faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
